"""The best step of a run: its checkpoint and LoRA are kept and exported. And which strength to use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import PauseAt, Steps, equal, lora_tensors, named, twelve_steps
from trainer_core.adapters.frozen_loras import load_with_frozen_loras
from trainer_core.adapters.inject import load_into
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import LoraConfig, LoraType, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.events import SilentObserver
from trainer_core.files import read_metadata
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.run import train_lora
from trainer_core.runs.result import find_result
from trainer_core.training import validation as validation_module
from trainer_core.training.strengths import STRENGTHS, Measured, advised

CPU = torch.device("cpu")


class Notes(SilentObserver):
    def __init__(self) -> None:
        self.all: list[str] = []

    def on_note(self, text: str) -> None:
        self.all.append(text)


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Without pictures: the validation loss decides which step is the best."""
    config = twelve_steps(encoded, model, tmp_path / "run")
    return dataclasses.replace(config, validation=dataclasses.replace(config.validation, num_validation_images=0))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Validation losses that runs get, one after the other: of steps 5, 10 and 12."""
    given: list[float] = []
    monkeypatch.setattr(validation_module.Validator, "loss", lambda *_: given.pop(0))
    return given


@pytest.fixture
def strengths(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """PSNR of the pictures that runs draw with each of the strengths."""
    given: list[float] = []
    monkeypatch.setattr(validation_module.Validator, "draws_targets", True)
    monkeypatch.setattr(validation_module.Validator, "psnr", lambda *_: given.pop(0))
    return given


def test_the_best_step_is_exported_beside_the_last(
    config: TrainConfig, losses: list[float], strengths: list[float]
) -> None:
    losses += [0.3, 0.1, 0.2]
    strengths += [20 - 5 * abs(strength - 0.8) for strength in STRENGTHS]
    notes = Notes()
    result = train_lora(config, notes)
    run = result.run_dir
    assert result.best_file == run / "run-best.safetensors" and result.strength == 0.8
    assert equal(load_file(result.best_file), load_file(run / "samples/step-000010/lora.safetensors"))
    header = read_metadata(result.best_file)
    assert (header["modelspec.title"], header["ss_steps"]) == ("run-best", "10")
    assert header["qwen_edit_trainer.strength"] == "0.8" and header["modelspec.usage_hint"] == "Use at strength 0.8."
    assert result.lora_file and "qwen_edit_trainer.strength" not in read_metadata(result.lora_file)
    assert any("best at step 10 of 12 (validation loss 0.1000" in note for note in notes.all)
    assert any("Use run-best.safetensors at strength 0.8." in note for note in notes.all)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000010", "step-000012"]
    assert find_result(config) == result
    result.best_file.unlink()
    assert find_result(config) is None


def test_the_last_step_can_be_the_best(config: TrainConfig, losses: list[float], strengths: list[float]) -> None:
    losses += [0.3, 0.2, 0.1]
    strengths += [20.0] * len(STRENGTHS)
    result = train_lora(config)
    assert result.best_file is None and result.strength == 1 and result.lora_file
    assert read_metadata(result.lora_file)["qwen_edit_trainer.strength"] == "1"
    assert not list(result.run_dir.glob("*-best*"))


def test_the_checkpoint_of_the_best_step_stays(config: TrainConfig, losses: list[float]) -> None:
    """With a limit of one checkpoint, whether or not checkpoints are due at that step."""
    losses += [0.1, 0.2, 0.3]
    checkpoints = dataclasses.replace(config.checkpoints, checkpoints_total_limit=1)
    result = train_lora(dataclasses.replace(config, checkpoints=checkpoints))
    names = sorted(path.name for path in (result.run_dir / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000012"]


def test_neither_is_done_if_not_asked_for(config: TrainConfig, losses: list[float]) -> None:
    losses += [0.1, 0.2, 0.3]
    validation = dataclasses.replace(
        config.validation,
        keep_best=False,
        strength_sweep="none",
        validation_loras_total_limit=0,
        num_validation_images=1,
    )
    result = train_lora(dataclasses.replace(config, validation=validation))
    assert result.best_file is None and result.strength is None and not losses
    assert not list(result.run_dir.glob("samples/*/*.safetensors"))


def test_the_best_alone_can_be_kept(config: TrainConfig, losses: list[float]) -> None:
    losses += [0.3, 0.1, 0.2]
    validation = dataclasses.replace(config.validation, validation_loras_total_limit=0)
    result = train_lora(dataclasses.replace(config, validation=validation))
    kept = [path.parent.name for path in result.run_dir.glob("samples/*/*.safetensors")]
    assert kept == ["step-000010"]


@pytest.fixture
def losses_at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The true validation losses of the network at each of the strengths, in place of its pictures' PSNR."""
    found: list[float] = []
    loss = validation_module.Validator.loss

    def psnr(self: Any, *arguments: Any) -> float:
        found.append(loss(self, *arguments))
        return 20.0

    monkeypatch.setattr(validation_module.Validator, "draws_targets", True)
    monkeypatch.setattr(validation_module.Validator, "psnr", psnr)
    return found


def of_kind(config: TrainConfig, lora_type: LoraType, precision: Any, steps: int) -> TrainConfig:
    return dataclasses.replace(
        config,
        max_train_steps=steps,
        model=dataclasses.replace(config.model, mixed_precision=precision),
        lora=LoraConfig(lora_rank=4, lora_type=lora_type, lora_targets="attention"),
    )


@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_strength_scales_the_weight_change(
    lora_type: LoraType,
    precision: Any,
    config: TrainConfig,
    losses_at: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network at a strength predicts what it predicts with the exported file at that strength, as ComfyUI's LoRA
    loader applies it. At strength 1 it is the validated one."""
    validators: list[Any] = []
    init = validation_module.Validator.__init__

    def kept(self: Any, *arguments: Any, **named_arguments: Any) -> None:
        validators.append(self)
        init(self, *arguments, **named_arguments)

    monkeypatch.setattr(validation_module.Validator, "__init__", kept)
    config, steps = of_kind(config, lora_type, precision, 5), Steps()
    result = train_lora(config, steps)
    assert result.lora_file
    assert losses_at[STRENGTHS.index(1.0)] == steps.reports[-1].validation_loss
    assert len(set(losses_at)) == len(STRENGTHS)
    for strength in (0.6, 1.2):
        transformer = load_with_frozen_loras(BaseModel(config.model), CPU)
        follow_comfyui(transformer)
        load_into(transformer, result.lora_file, strength)
        wanted = validators[0].loss(transformer, CPU, SilentObserver())
        found = losses_at[STRENGTHS.index(strength)]
        assert found == pytest.approx(wanted, rel=2e-3 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr"])
def test_the_best_step_is_compared_with_its_own_weights(
    lora_type: LoraType, config: TrainConfig, losses_at: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16: at strength 1, its loss is that of the step's validation."""
    from trainer_core import run as run_module

    keep, done = run_module.keep_step_loras, []

    def worse_at_last(parts: Any, step: int, variants: Any, losses: Any, samples: Any) -> None:
        done.append(losses["LoRA"])
        keep(parts, step, variants, {name: loss + step for name, loss in losses.items()}, samples)

    monkeypatch.setattr(run_module, "keep_step_loras", worse_at_last)
    result = train_lora(of_kind(config, lora_type, "bf16", 10))
    assert result.best_file and read_metadata(result.best_file)["ss_steps"] == "5"
    assert losses_at[STRENGTHS.index(1.0)] == pytest.approx(done[0], rel=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), OSError(28, "The disk is full")])
def test_an_error_while_strengths_are_compared_keeps_the_result(
    error: Exception,
    config: TrainConfig,
    losses: list[float],
    strengths: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses += [0.3, 0.2, 0.1]

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("trainer_core.results.compare", fails)
    notes = Notes()
    result = train_lora(config, notes)
    assert result.lora_file and result.strength is None and find_result(config) == result
    assert any("Strengths were not compared (" in note and "The LoRA is saved." in note for note in notes.all)


def test_an_earlier_best_file_does_not_stay_under_that_name(config: TrainConfig, losses: list[float]) -> None:
    """The run goes on, and its new last step is the best."""
    constant = dataclasses.replace(config.optimizer, lr_scheduler="constant_with_warmup")
    config = dataclasses.replace(config, optimizer=constant)
    losses += [0.1, 0.2, 0.3, 0.05, 0.04]
    first = train_lora(config)
    assert first.best_file and first.best_file.is_file()
    second = train_lora(dataclasses.replace(config, max_train_steps=16))
    assert second.best_file is None and not first.best_file.exists()
    assert (second.run_dir / "run-step-5.safetensors").is_file()


def test_steps_validated_otherwise_are_not_compared(config: TrainConfig, losses: list[float]) -> None:
    """A run that goes on with other validation settings has its best step among those that have them."""
    losses += [0.05, 0.2, 0.3]
    train_lora(config, PauseAt(6))
    other = dataclasses.replace(config.validation, validation_seed=43)
    result = train_lora(dataclasses.replace(config, validation=other))
    assert result.best_file and "run-best" in result.best_file.name
    assert read_metadata(result.best_file)["ss_steps"] == "10"


def test_the_comparison_changes_nothing_of_the_run(config: TrainConfig) -> None:
    drawn = dataclasses.replace(config.validation, num_validation_images=1)
    without = train_lora(
        named(config, "without", validation=dataclasses.replace(drawn, keep_best=False, strength_sweep="none"))
    )
    assert train_lora(named(config, "pictures", validation=drawn), PauseAt(6)).lora_file is None
    with_pictures = train_lora(named(config, "pictures", validation=drawn))
    assert equal(lora_tensors(without), lora_tensors(with_pictures))
    assert with_pictures.strength in STRENGTHS
    header = read_metadata(with_pictures.best_file or with_pictures.lora_file)  # type: ignore[arg-type]
    assert header["qwen_edit_trainer.strengths"].startswith("PSNR ")


def test_which_strength_is_advised() -> None:
    def measured(*psnr: float) -> list[Measured]:
        return [Measured(*each) for each in zip(STRENGTHS, psnr, strict=True)]

    assert advised(measured(*[20.0] * 6)) == 1
    assert advised(measured(20.05, *[20.0] * 5)) == 1  # gains too little
    assert advised(measured(*[20.0] * 5, 20.2)) == 1.2


def test_when_strengths_are_compared() -> None:
    def compares(**settings: Any) -> bool:
        return ValidationConfig(**settings).compares_strengths

    assert not compares()  # 30 steps with guidance
    assert compares(validation_lora="x-8steps.safetensors") and compares(strength_sweep="pictures")
    assert not compares(validation_lora="x-8steps.safetensors", strength_sweep="none")
    assert compares(validation_num_inference_steps=8, validation_guidance=4.0)
    assert not compares(validation_num_inference_steps=9, validation_guidance=4.0)
