"""Settings that can't be trained are refused before hours of encoding and before a large model is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import write_job
from trainer_core.__main__ import main
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import LoraConfig, MemoryConfig, ModelConfig, TrainConfig
from trainer_core.errors import ConfigError, MissingPackageError, ModelFileError, TrainerError
from trainer_core.run import train_lora


def without(package: str) -> Callable[[str], object]:
    """A `find_spec` that does not find `package`."""
    return lambda name: None if name.split(".")[0] == package else find_spec(name)


CASES: dict[str, tuple[dict[str, Any], type[TrainerError], str]] = {
    "target": (
        {"lora": LoraConfig(lora_targets="pattern", lora_target_pattern="nothing")},
        ConfigError,
        "lora_target_pattern 'nothing' matches no layer",
    ),
    "rank": ({"lora": LoraConfig(rank_pattern=("77 = 4",))}, ConfigError, "rank_pattern '77 = 4' matches none"),
    "start": ({"lora": LoraConfig(init_lora="nowhere.safetensors")}, ModelFileError, "nowhere.safetensors"),
    "streamed": ({"memory": MemoryConfig(memory="manual", blocks_to_stream=2)}, ConfigError, "blocks_to_stream is 2"),
    "compiled": ({"memory": MemoryConfig(compile_blocks="on")}, ConfigError, "needs a CUDA device, but .* cpu"),
    "tensorboardX": ({}, MissingPackageError, "A training run needs the package tensorboardX"),
    "bitsandbytes": (
        {"model": {"base_model_precision": "nf4-bnb"}},
        MissingPackageError,
        "The precision nf4-bnb needs the package bitsandbytes",
    ),
}
LOOKED_UP_IN = {"tensorboardX": "runs.metrics", "bitsandbytes": "precision.quantise"}


@pytest.mark.parametrize("case", CASES)
def test_before_the_model_is_loaded(
    case: str, encoded: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, kind, words = CASES[case]
    changes = {**changes, "model": dataclasses.replace(model, **changes.get("model", {}))}
    if case in LOOKED_UP_IN:
        monkeypatch.setattr(f"trainer_core.{LOOKED_UP_IN[case]}.find_spec", without(case))
    monkeypatch.setattr(
        "trainer_core.adapters.frozen_loras.load_transformer", lambda *_, **__: pytest.fail("it was loaded")
    )
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), encoded=str(encoded.manifest), gradient_checkpointing=False, **changes
    )
    with pytest.raises(kind, match=words):
        train_lora(config)
    assert not Path(config.run_dir).exists()


def test_before_anything_is_encoded(model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = write_job(tmp_path, model, num_pairs=2)
    caplog.set_level(logging.INFO)
    nothing = ["--set", "lora.lora_targets=pattern", "--set", "lora.lora_target_pattern=nothing"]
    assert main(["train", str(job), *nothing]) == 1
    assert "matches no layer" in caplog.text
    assert not list(tmp_path.rglob("cache/**/*.safetensors"))


@pytest.mark.parametrize("part", ["transformer_file", "text_encoder_file", "vae_file"])
def test_a_file_that_is_no_model_is_named_by_every_command(
    part: str, model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """check, plan, encode and train look at the headers of all three networks before they encode anything."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 40900000000\n"
    (tmp_path / "wrong.safetensors").write_bytes(pointer)
    job = write_job(tmp_path, model, num_pairs=2, model={part: "wrong.safetensors"})
    for command in ("check", "plan", "encode", "train"):
        caplog.clear()
        assert main([command, str(job)]) == 1
        assert "git-lfs pointer in place of the 40.9 GB file" in caplog.messages[-1], command
        assert not any((tmp_path / "cache").rglob("*.safetensors"))
        assert not (tmp_path / "runs").exists()
