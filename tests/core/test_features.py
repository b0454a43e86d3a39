"""Rows of benchmarks/features.py: each is valid and differs from the plain run, and every choice has a row."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest

from tests.support.feature_rows import ROWS, job_of
from trainer_core.config.optimizer import OptimizerName, SchedulerName
from trainer_core.config.training import (
    HuberSchedule,
    LossType,
    RampShape,
    RolloutSampler,
    RolloutStrategy,
    SigmaDistribution,
)

ARGUMENTS = argparse.Namespace(steps=100, tokenizer=Path("tokenizer"), device="cpu")


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_allowed_and_changes_something(row: str) -> None:
    plain, changed = (job_of(changes, "row", Path("work"), ARGUMENTS) for changes in ({}, ROWS[row]))
    assert (changed == plain) == (not ROWS[row])


def test_every_choice_has_a_row() -> None:
    jobs = [job_of(changes, "row", Path("work"), ARGUMENTS) for changes in ROWS.values()]
    assert {job.optimizer.optimizer for job in jobs} == set(get_args(OptimizerName)) - {"adamw-8bit"}  # CUDA only
    assert {job.optimizer.lr_scheduler for job in jobs} == set(get_args(SchedulerName))
    assert {job.noise.sigma_distribution for job in jobs} == set(get_args(SigmaDistribution))
    assert {job.noise.loss_type for job in jobs} == set(get_args(LossType))
    assert {job.noise.huber_schedule for job in jobs} == set(get_args(HuberSchedule))
    assert {job.rollout.scheduled_sampling_sampler for job in jobs} == set(get_args(RolloutSampler))
    assert {job.rollout.scheduled_sampling_strategy for job in jobs} == set(get_args(RolloutStrategy))
    assert {job.rollout.scheduled_sampling_ramp_shape for job in jobs} == set(get_args(RampShape))
