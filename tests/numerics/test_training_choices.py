"""Every choice of noise and loss: a run stopped on the way and continued equals the unbroken one bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.test_run import Steps, StopAfter, equal, lora_tensors, named
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.run import train_lora

NOISE: dict[str, dict[str, Any]] = {
    "stratified": {"stratified_sigmas": True},
    "mode, huber": {"sigma_distribution": "mode", "stratified_sigmas": True, "loss_type": "huber"},
    "cosmap, smooth_l1": {"sigma_distribution": "cosmap", "loss_type": "smooth_l1", "huber_schedule": "exponential"},
}


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Five steps; the stop comes in the middle of one."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=5,
        seed=5,
        lora=LoraConfig(lora_rank=4),
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_warmup_steps=2),
        batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=2),
        validation=ValidationConfig(validation_step_interval=2, num_validation_images=0),
    )


def stopped_and_continued(config: TrainConfig) -> Steps:
    """Asserts that it equals the unbroken run, whose reports are returned."""
    unbroken, broken, seen = named(config, "unbroken"), named(config, "broken"), Steps()
    whole = train_lora(unbroken, seen)
    paused = train_lora(broken, StopAfter(5))
    assert 0 < paused.steps_done < config.max_train_steps
    assert equal(lora_tensors(train_lora(broken)), lora_tensors(whole))
    return seen


@pytest.mark.parametrize("row", NOISE)
def test_noise_and_loss(config: TrainConfig, row: str) -> None:
    chosen = dataclasses.replace(config, noise=NoiseConfig(**NOISE[row]))
    seen = stopped_and_continued(chosen)
    plain = Steps()
    train_lora(named(config, "plain"), plain)
    assert [report.loss for report in seen.reports] != [report.loss for report in plain.reports]
    for report in seen.reports:
        assert report.loss_by_sigma and torch.isfinite(torch.tensor(list(report.loss_by_sigma.values()))).all()


def test_validation_loss_is_squared_whatever_the_training_counts(config: TrainConfig) -> None:
    untrained = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-12), max_train_steps=2)
    losses = []
    for loss_type in ("l2", "huber"):
        seen = Steps()
        train_lora(dataclasses.replace(named(untrained, loss_type), noise=NoiseConfig(loss_type=loss_type)), seen)
        losses.append(seen.reports[-1].validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
