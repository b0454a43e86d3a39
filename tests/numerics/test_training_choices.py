"""With each choice of noise, loss, optimizer and rollout, a resumed run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.narrow import networks_of, read_rows
from tests.support.runs import Steps, StopAfter, equal, lora_tensors, named
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.config import (
    BatchingConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.events import SILENT
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.runs.folder import RunFolder
from trainer_core.training import pair_losses as losses_module
from trainer_core.training.validation import Validator

NOISE: dict[str, dict[str, Any]] = {
    "stratified": {"stratified_sigmas": True},
    "mode, huber": {"sigma_distribution": "mode", "stratified_sigmas": True, "loss_type": "huber"},
    "cosmap, smooth_l1": {"sigma_distribution": "cosmap", "loss_type": "smooth_l1", "huber_schedule": "exponential"},
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
    "lion": {"learning_rate": 1e-3, "lr_scheduler": "polynomial"},
    "prodigy": {"learning_rate": 1.0, "lr_scheduler": "constant", "lr_warmup_steps": 0},
    "adamw-schedulefree": {"lr_scheduler": "constant_with_warmup"},
}

ROLLOUTS: dict[str, dict[str, Any]] = {
    "unipc with ReflexFlow": {"probability": 0.5},
    "euler on a ramp": {"sampler": "euler", "ramp_steps": 3, "start_step": 1, "prob_end": 1.0, "reflexflow": False},
}


def rollout_config(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{f"scheduled_sampling_{name}": value for name, value in changes.items()})


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Five steps. `stopped_and_continued` stops in the middle of one."""
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
    """Asserts that a resumed run equals the uninterrupted one, and returns the latter's reports."""
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(config: TrainConfig, name: str) -> None:
    """Validation during the run must have no effect either."""
    settings = {"learning_rate": 3e-3, "lr_warmup_steps": 2, **OPTIMIZERS[name]}
    chosen = dataclasses.replace(config, optimizer=OptimizerConfig(optimizer=name, **settings))
    seen = stopped_and_continued(chosen)
    never = ValidationConfig(validation_step_interval=0, num_validation_images=0)
    unseen = train_lora(named(chosen, "unseen", validation=never))
    assert equal(lora_tensors(unseen), load_file(Path(config.run_dir).parent / "unbroken" / "unbroken.safetensors"))
    assert all(report.learning_rate > 0 for report in seen.reports)


def test_schedule_free_is_validated_and_exported_as_its_average(config: TrainConfig) -> None:
    free = OptimizerConfig(optimizer="adamw-schedulefree", learning_rate=3e-2, lr_warmup_steps=0)
    chosen = dataclasses.replace(config, optimizer=free, lora=LoraConfig(lora_rank=4, lora_alpha=4))
    seen = Steps()
    result = train_lora(chosen, seen)
    checkpoint = RunFolder(result.run_dir).latest_checkpoint()
    assert checkpoint is not None
    exported = {
        name.removeprefix("diffusion_model.").removesuffix(".weight"): value
        for name, value in lora_tensors(result).items()
    }
    assert exported.keys() == checkpoint.lora.keys()
    for name, trained in checkpoint.lora.items():
        average = torch.lerp(trained, checkpoint.optimizer[f"{name}/z"], 1 - 1 / 0.9)
        torch.testing.assert_close(exported[name], average)
        assert not torch.equal(exported[name], trained)
    on_average = validation_loss_of(chosen, exported)
    assert seen.reports[-1].validation_loss == pytest.approx(on_average, rel=1e-6)
    assert validation_loss_of(chosen, checkpoint.lora) != pytest.approx(on_average, rel=1e-4)


def validation_loss_of(config: TrainConfig, lora: dict[str, torch.Tensor]) -> float:
    """The validation loss with these adapter weights."""
    networks = networks_of(config)
    with torch.no_grad():
        for name, parameter in networks.lora.items():
            parameter.copy_(lora[name])
    validator = Validator(load_encoded(Path(config.encoded)), BaseModel(config.model), config.validation)
    return validator.loss(networks.transformer, networks.device, SILENT)


@pytest.mark.parametrize("row", ROLLOUTS)
def test_rollouts(config: TrainConfig, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout draws no dropout, and the reported number of extra forward passes is right."""
    calls, original = [], losses_module.predict_velocity
    monkeypatch.setattr(losses_module, "predict_velocity", lambda *a: calls.append(a[1].shape[0]) or original(*a))
    dropping = dataclasses.replace(config, lora=LoraConfig(lora_rank=4, lora_dropout=0.2))
    chosen = dataclasses.replace(dropping, rollout=rollout_config(max_step_offset=3, **ROLLOUTS[row]))
    seen = stopped_and_continued(chosen)
    made = [report.extra_forwards for report in seen.reports]
    calls.clear()
    again = Steps()
    train_lora(named(chosen, "again"), again)
    assert [report.extra_forwards for report in again.reports] == made
    assert sum(count or 0 for count in made) == len(calls) > 0
    if row == "euler on a ramp":
        assert made[:2] == [None, None] and made[2] is not None  # the ramp begins at step 1, with a probability of 0


def test_a_rollout_of_probability_zero_changes_nothing(config: TrainConfig) -> None:
    plain = train_lora(named(config, "plain"))
    for name, changes in {"zero": {"probability": 0.0}, "later": {"probability": 1.0, "start_step": 99}}.items():
        idle = dataclasses.replace(named(config, name), rollout=rollout_config(max_step_offset=10, **changes))
        result = train_lora(idle)
        assert equal(lora_tensors(result), lora_tensors(plain))
        rows, expected = (read_rows(each.run_dir / "metrics.jsonl") for each in (result, plain))
        assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


def test_validation_loss_is_squared_whatever_the_training_counts(config: TrainConfig) -> None:
    untrained = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-12), max_train_steps=2)
    losses = []
    for loss_type in ("l2", "huber"):
        seen = Steps()
        train_lora(dataclasses.replace(named(untrained, loss_type), noise=NoiseConfig(loss_type=loss_type)), seen)
        losses.append(seen.reports[-1].validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
