"""Whole runs whose micro-batches are captured and replayed, without CUDA: they equal ordinary runs, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.fake_graphs import FakePasses, FakePool
from tests.support.runs import Steps, StopAfter, equal, lora_tensors, twelve_steps
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import ModelConfig, RolloutConfig, TrainConfig
from trainer_core.memory.step_graphs import StepGraphs
from trainer_core.run import TrainResult, train_lora
from trainer_core.training import step as step_module


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Twelve steps with gradient accumulation, two sizes of micro-batches, validation and rollouts; no dropout."""
    config = twelve_steps(encoded, model, tmp_path / "run")
    rollout = RolloutConfig(scheduled_sampling_max_step_offset=2, scheduled_sampling_probability=0.5)
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, lora_dropout=0.0), rollout=rollout)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[FakePool]:
    """Graphs are used from the first step of every run from now on. Collects their pools."""
    found: list[FakePool] = []

    def pool(*_: object) -> FakePool:
        found.append(FakePool())
        return found[-1]

    def started(weights: list, pool: FakePool) -> StepGraphs:
        graphs = StepGraphs(weights, pool)  # type: ignore[arg-type]
        graphs.start()
        return graphs

    monkeypatch.setattr(step_module, "CapturePool", pool)
    monkeypatch.setattr(step_module, "StepGraphs", started)
    return found


def elsewhere(config: TrainConfig, name: str) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent / name))


def test_a_run_with_graphs_equals_one_without(
    config: TrainConfig, pools: list[FakePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    observers = [Steps(), Steps()]
    graphed = train_lora(config, observers[0])
    assert sum(each.replays for each in pools[0].captured) > 12 and pools[0].freed > 1  # freed by validations too
    monkeypatch.setattr(FakePool, "capture", lambda *_: pytest.fail("captured"))
    monkeypatch.setattr(StepGraphs, "start", lambda _: None)
    assert equal(lora_tensors(graphed), lora_tensors(train_lora(elsewhere(config, "plain"), observers[1])))
    ours, plain = ([report.loss for report in each.reports] for each in observers)
    assert ours == plain


def stopped(config: TrainConfig, train: Callable[..., TrainResult] = train_lora) -> TrainResult:
    first = train(config, StopAfter(9))
    assert 0 < first.steps_done < config.max_train_steps
    return train(config)


def test_a_stop_between_two_replays_changes_nothing(config: TrainConfig, pools: list[FakePool]) -> None:
    unbroken, broken = train_lora(config), stopped(elsewhere(config, "broken"))
    assert all(each.captured for each in pools)
    assert equal(lora_tensors(broken), lora_tensors(unbroken))


def test_memory_that_runs_out_in_a_replay_ends_no_step(
    config: TrainConfig, pools: list[FakePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the step's earlier micro-batches are computed anew."""
    unbroken, forward, failed = train_lora(config), FakePasses.forward, list[int]()

    def runs_out(self: FakePasses, inputs: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        if self.replays == 1:  # never in a capture
            failed.append(len(pools[1].captured))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, inputs)

    monkeypatch.setattr(FakePasses, "forward", runs_out)
    assert equal(lora_tensors(train_lora(elsewhere(config, "short"))), lora_tensors(unbroken))
    assert failed == [len(pools[1].captured)]  # nothing is captured afterwards
