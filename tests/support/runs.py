"""A small training run that uses many features, and observers that stop or record it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.events import SilentObserver, StepReport, Stop
from trainer_core.run import TrainResult


def twelve_steps(encoded: EncodedDataset, model: ModelConfig, run_dir: Path) -> TrainConfig:
    """Twelve steps with checkpoints, validation, gradient accumulation, dropout and a learning rate schedule."""
    return TrainConfig(
        run_dir=str(run_dir),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=12,
        seed=5,
        lora=LoraConfig(lora_rank=4, lora_alpha=6, lora_targets="attention", lora_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine", lr_warmup_steps=2),
        batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=2),
        checkpoints=CheckpointConfig(checkpoint_step_interval=3, checkpoints_total_limit=2),
        validation=ValidationConfig(
            validation_step_interval=5, validation_num_inference_steps=2, num_validation_images=1
        ),
    )


def named(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    """The same settings in a run folder of another name."""
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent / name), **changes)


def lora_tensors(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.lora_file is not None
    return load_file(result.lora_file)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class StopAfter(SilentObserver):
    """Asks to stop once `should_stop` was called more than `asked` times since this process's first step."""

    def __init__(self, asked: int, stop: Stop = Stop.PAUSE) -> None:
        self.left, self.stop, self.training = asked, stop, False

    def on_step(self, report: StepReport) -> None:
        self.training = True

    def should_stop(self) -> Stop:
        self.left -= self.training
        return self.stop if self.left < 0 else Stop.NO


class Steps(SilentObserver):
    """Records the report of each step."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)


class PauseAt(SilentObserver):
    """Asks to pause once this step is done."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def on_step(self, report: StepReport) -> None:
        self.done = report.step

    def should_stop(self) -> Stop:
        return Stop.PAUSE if self.done >= self.step else Stop.NO
