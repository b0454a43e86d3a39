"""The base model's validation pictures: drawn once per run, kept for later starts of it, drawn anew if they differ."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.narrow import make_base, make_pairs, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig, ValidationConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.events import SilentObserver, Stop
from trainer_core.files import read_tensors, write_tensors
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training import validation, validation_pictures
from trainer_core.training.validation import Validator

PROMPTS = ("paint it red", "draw it with a pencil")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> EncodedDataset:
    folder, encoding = tmp_path_factory.mktemp("base"), small_encoding(num_eval_images=1, validation_prompts=PROMPTS)
    return encode_dataset(pair_folders(make_pairs(folder / "pairs", 2)), BaseModel(model), encoding, folder / "cache")


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=2,
        lora=LoraConfig(lora_rank=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        validation=ValidationConfig(
            validation_step_interval=1, validation_num_inference_steps=2, strength_sweep="none"
        ),
    )


class PauseAfter(SilentObserver):
    """Pauses after a step."""

    def __init__(self, step: int) -> None:
        self._step, self._stop = step, Stop.NO

    def on_step(self, report: Any) -> None:
        if report.step == self._step:
            self._stop = Stop.PAUSE

    def should_stop(self) -> Stop:
        return self._stop


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the adapter was on, for each picture drawn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    pictures: list[bool] = []
    original = validation.sample_latents

    def sample(transformer: torch.nn.Module, *arguments: Any, **rest: Any) -> torch.Tensor:
        pictures.append(
            any(not each.disable_adapters for each in transformer.modules() if isinstance(each, BaseTunerLayer))
        )
        return original(transformer, *arguments, **rest)

    monkeypatch.setattr(validation, "sample_latents", sample)
    return pictures


def test_a_run_that_continues_reads_them(config: TrainConfig, drawn: list[bool], tmp_path: Path) -> None:
    train_lora(config, PauseAfter(1))
    assert drawn == [False] * 3 + [True] * 3
    files = sorted((tmp_path / "run" / "base_pictures").iterdir())
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-100])  # damaged: this one is drawn again
    drawn.clear()
    result = train_lora(config)
    assert drawn == [False] + [True] * 3
    whole = train_lora(dataclasses.replace(config, run_dir=str(tmp_path / "whole")))
    assert result.samples is not None and whole.samples is not None
    assert result.samples.grid_file.read_bytes() == whole.samples.grid_file.read_bytes()
    assert all(read_tensors(each)["latents"].shape == (16, 12, 12) for each in files)


CHANGES: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "steps": lambda config: changed(config, validation_num_inference_steps=3),
    "guidance": lambda config: changed(config, validation_guidance=2.0),
    "seed": lambda config: changed(config, validation_seed=1),
    "size": lambda config: changed(config, validation_resolution="64x64"),
    "precision": lambda config: dataclasses.replace(
        config, model=dataclasses.replace(config.model, base_model_precision="int8-quanto")
    ),
}


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, validation=dataclasses.replace(config.validation, **values))


def names(encoded: EncodedDataset, config: TrainConfig) -> set[str]:
    validator = Validator(encoded, BaseModel(config.model), config.validation)
    return {validator._base_name(shot) for shot in validator._shots}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_setting_changes_their_names(what: str, encoded: EncodedDataset, config: TrainConfig) -> None:
    before = names(encoded, config)
    assert len(before) == 3 and names(encoded, config) == before
    assert not before & names(encoded, CHANGES[what](config))


def test_another_model_reference_or_negative_prompt_changes_their_names(
    encoded: EncodedDataset, config: TrainConfig, tokenizer_dir: Path, tmp_path: Path
) -> None:
    before = names(encoded, config)
    other = make_base(tmp_path / "other", tokenizer_dir, seed=7)
    assert not before & names(encoded, dataclasses.replace(config, model=other))
    shutil.copytree(config.model.base, tmp_path / "moved")
    moved = dataclasses.replace(config.model, base=str(tmp_path / "moved"))
    assert before == names(encoded, dataclasses.replace(config, model=moved))
    (entry,) = encoded.validation_pairs
    for value in ({"negative": "other"}, {"references": ("other",)}, {"key": "other"}):
        pairs = (dataclasses.replace(entry, **value),)
        assert not before & names(dataclasses.replace(encoded, validation_pairs=pairs), config)


def test_a_changed_number_of_steps_draws_anew(config: TrainConfig, drawn: list[bool], tmp_path: Path) -> None:
    train_lora(config, PauseAfter(1))
    drawn.clear()
    train_lora(changed(config, validation_num_inference_steps=1))
    assert drawn == [False] * 3 + [True] * 3
    assert len(list((tmp_path / "run" / "base_pictures").iterdir())) == 6


def test_wrong_content_is_not_used(encoded: EncodedDataset, config: TrainConfig, tmp_path: Path) -> None:
    shot = Validator(encoded, BaseModel(config.model), config.validation)._shots[0]
    path = tmp_path / "one.safetensors"
    latents = torch.randn(shot.latents_shape)
    for tensors in ({"latents": latents[:, 1:]}, {"other": latents}, {"latents": latents * float("nan")}):
        write_tensors(path, tensors)
        assert validation_pictures.read_base(path, shot) is None
    validation_pictures.keep_base(path, latents)
    found = validation_pictures.read_base(path, shot)
    assert found is not None and torch.equal(found, latents)


def test_a_full_disk_costs_only_the_copy(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(validation_pictures, "write_tensors", full)
    result = train_lora(changed(config, validation_step_interval=0))
    assert result.samples is not None and not (tmp_path / "run" / "base_pictures").exists()
    assert "No space left on device" in caplog.text
