"""`train --example` runs a complete training from a preset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer_core.__main__ import main

EXAMPLES = ("qwen_image.edit-v1-lora", "qwen_image.edit-v2-lora")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_whole_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command in an empty folder suffices. The test makes the example shorter and smaller."""
    monkeypatch.chdir(tmp_path)
    smaller = ("max_train_steps=1", "encoding.resolution=64", "validation.num_validation_images=0")
    changes = [part for change in smaller for part in ("--set", change)]
    assert main(["train", "--example", name, *changes]) == 0
    lora = Path(capsys.readouterr().out.strip())
    assert lora.is_file() and lora.is_relative_to(tmp_path)
    config = json.loads((lora.parent / "config.json").read_text())
    pair = json.loads(Path(config["encoded"]).read_text())["pairs"][0]
    assert len(pair["references"]) == (3 if "v2" in name else 1)
    assert config["model"]["base_model_precision"] == "int8-quanto"
