"""A run folder by itself: whose it is, what it holds, and what is left of a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core.config import EmaConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig, resume_key
from trainer_core.errors import RunFolderError
from trainer_core.training.run_folder import RunFolder


def key_of(**changes: Any) -> dict[str, Any]:
    return resume_key(
        TrainConfig(run_dir="run", encoded="pairs.json", model=ModelConfig(base="/models/Edit"), **changes)
    )


def without(key: dict[str, Any], section: str, *names: str) -> dict[str, Any]:
    """The key as a version wrote it that did not know these settings yet."""
    return {**key, section: {name: value for name, value in key[section].items() if name not in names}}


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path: Path) -> None:
    old = without(without(key_of(), "lora", "lora_type", "init_lora"), "optimizer", "weight_decay")
    del old["rollout"]
    RunFolder.open(tmp_path / "run", old)
    assert RunFolder.open(tmp_path / "run", key_of()).changes(key_of()) == []
    for changes, named in (
        ({"lora": LoraConfig(lora_type="dora")}, "lora.lora_type 'lora' -> 'dora'"),
        ({"ema": EmaConfig(use_ema=True)}, "ema None ->"),
        ({"optimizer": OptimizerConfig(lr_scheduler="cosine")}, "lr_scheduler 'constant_with_warmup' -> 'cosine'"),
    ):
        with pytest.raises(RunFolderError) as caught:
            RunFolder.open(tmp_path / "run", key_of(**changes))
        assert named in str(caught.value)


def test_of_the_average_too(tmp_path: Path) -> None:
    averaged = EmaConfig(use_ema=True)
    RunFolder.open(tmp_path / "run", without(key_of(ema=averaged), "ema", "ema_update_interval"))
    RunFolder.open(tmp_path / "run", key_of(ema=averaged))
    with pytest.raises(RunFolderError, match=r"ema\.ema_update_interval 1 -> 2"):
        RunFolder.open(tmp_path / "run", key_of(ema=EmaConfig(use_ema=True, ema_update_interval=2)))


def test_a_setting_that_only_a_later_version_knows_is_named(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", {**key_of(), "coming": 3})
    with pytest.raises(RunFolderError, match="coming 3 -> None"):
        RunFolder.open(tmp_path / "run", key_of())
