"""A run folder: which settings may continue it, its checkpoints, its lock, and what a killed process leaves."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tools.comfyui import REPO
from trainer_core.config import EmaConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig, resume_key
from trainer_core.errors import DiskError, RunFolderError
from trainer_core.runs.folder import Checkpoint, RunFolder


def key_of(**changes: Any) -> dict[str, Any]:
    return resume_key(
        TrainConfig(run_dir="run", encoded="pairs.json", model=ModelConfig(base="/models/Edit"), **changes)
    )


def entered(path: Path, key: dict[str, Any]) -> RunFolder:
    """Opens and closes the run folder. Returns it."""
    with RunFolder.open(path, key) as run:
        return run


def without(key: dict[str, Any], section: str, *names: str) -> dict[str, Any]:
    """The key as an older version without these settings wrote it."""
    return {**key, section: {name: value for name, value in key[section].items() if name not in names}}


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path: Path) -> None:
    old = without(without(key_of(), "lora", "lora_type", "init_lora"), "optimizer", "weight_decay")
    del old["rollout"]
    entered(tmp_path / "run", old)
    assert entered(tmp_path / "run", key_of()).changes(key_of()) == []
    for changes, named in (
        ({"lora": LoraConfig(lora_type="dora")}, "lora.lora_type: was 'lora', now 'dora'"),
        ({"ema": EmaConfig(use_ema=True)}, "ema: was None, now"),
        (
            {"optimizer": OptimizerConfig(lr_scheduler="cosine")},
            "lr_scheduler: was 'constant_with_warmup', now 'cosine'",
        ),
    ):
        with pytest.raises(RunFolderError) as caught:
            entered(tmp_path / "run", key_of(**changes))
        assert named in str(caught.value)


def test_of_the_average_too(tmp_path: Path) -> None:
    averaged = EmaConfig(use_ema=True)
    entered(tmp_path / "run", without(key_of(ema=averaged), "ema", "ema_update_interval"))
    entered(tmp_path / "run", key_of(ema=averaged))
    with pytest.raises(RunFolderError, match=r"ema\.ema_update_interval: was 1, now 2"):
        entered(tmp_path / "run", key_of(ema=EmaConfig(use_ema=True, ema_update_interval=2)))


def test_settings_that_are_not_used_may_change(tmp_path: Path) -> None:
    entered(tmp_path / "run", key_of(optimizer=OptimizerConfig(lion_beta2=0.5), lora=LoraConfig(lokr_factor=4)))
    entered(tmp_path / "run", key_of(optimizer=OptimizerConfig(prodigy_d_coef=2.0)))
    with pytest.raises(RunFolderError) as caught:
        entered(tmp_path / "run", key_of(optimizer=OptimizerConfig(optimizer="lion")))
    assert str(caught.value).splitlines()[1:-1] == ["  - optimizer.optimizer: was 'adamw', now 'lion'"]
    lion = OptimizerConfig(optimizer="lion", lion_beta2=0.5)
    entered(tmp_path / "lion", key_of(optimizer=lion))
    with pytest.raises(RunFolderError, match=r"optimizer\.lion_beta2: was 0\.5, now 0\.6"):
        entered(tmp_path / "lion", key_of(optimizer=dataclasses.replace(lion, lion_beta2=0.6)))


def test_a_setting_that_only_a_later_version_knows_is_named(tmp_path: Path) -> None:
    entered(tmp_path / "run", {**key_of(), "coming": 3})
    with pytest.raises(RunFolderError, match="coming: was 3, now None"):
        entered(tmp_path / "run", key_of())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """An open run with a running average and checkpoints of steps 2 and 4."""
    with RunFolder.open(tmp_path / "run", key_of(ema=EmaConfig(use_ema=True))) as run:
        for step in (2, 4):
            run.save_checkpoint(checkpoint(step), 5)
        yield run


def checkpoint(step: int) -> Checkpoint:
    tensors = {"a.b": torch.full((3,), float(step))}
    return Checkpoint({"step": step, "loss": 0.5}, tensors, tensors, tensors)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("part", ["lora.safetensors", "optimizer.safetensors", "ema.safetensors", "report.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_and_replaced(part: str, damage: Any, run: RunFolder) -> None:
    damage(run.checkpoints / "step-000004" / part)
    assert run.steps_done() == 2
    found = run.latest_checkpoint()
    assert found is not None and found.step == 2
    run.save_checkpoint(checkpoint(4), 5)
    found = run.latest_checkpoint()
    assert found is not None and found.step == run.steps_done() == 4
    assert names(run) == ["step-000002", "step-000004", "step-000004.damaged"]


def test_a_whole_checkpoint_is_left_as_it_is(run: RunFolder) -> None:
    written = (run.checkpoints / "step-000004" / "lora.safetensors").stat().st_mtime_ns
    run.save_checkpoint(checkpoint(4), 5)
    assert (run.checkpoints / "step-000004" / "lora.safetensors").stat().st_mtime_ns == written


def test_folders_of_other_names_are_nobodys_checkpoints(run: RunFolder) -> None:
    strays = ["step-000006.bak", "step-x", "step-", "notes"]
    for name in strays:
        (run.checkpoints / name).mkdir()
    assert run.steps_done() == 4
    run.save_checkpoint(checkpoint(6), 1)
    assert names(run) == sorted(["step-000006", *strays])


def test_a_damaged_later_checkpoint_does_not_push_out_the_newest(run: RunFolder) -> None:
    cut(run.checkpoints / "step-000004" / "lora.safetensors")
    run.save_checkpoint(checkpoint(3), 1)
    assert run.steps_done() == 3
    run.save_checkpoint(checkpoint(4), 1)
    assert run.steps_done() == 4 and names(run) == ["step-000004", "step-000004.damaged"]


def test_a_write_that_fails_leaves_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_core.runs.folder.write_atomically", None)
    with pytest.raises(TypeError):
        run.save_checkpoint(checkpoint(6), 1)
    assert names(run) == ["step-000002", "step-000004"]


def test_a_checkpoint_that_is_open_in_another_program(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On Windows it can't be renamed then: an old one stays, and a new one is not saved."""
    replace = Path.replace

    def refuse(what: str) -> Callable[[Path, Path], Path]:
        def renamed(path: Path, new: Path) -> Path:
            if what in path.name:
                raise PermissionError(13, "Access is denied", str(path))
            return replace(path, new)

        return renamed

    monkeypatch.setattr("trainer_core.files._RENAME_SECONDS", 0.0)
    monkeypatch.setattr(Path, "replace", refuse("step-000002"))
    run.save_checkpoint(checkpoint(6), 1)
    assert names(run) == ["step-000002", "step-000006"]
    assert f"{run.checkpoints / 'step-000002'} can't be deleted (Access is denied)" in caplog.text
    monkeypatch.setattr(Path, "replace", refuse(".step-000008"))
    with pytest.raises(DiskError, match="step-000008 can't be used: permission denied"):
        run.save_checkpoint(checkpoint(8), 1)
    assert names(run) == ["step-000002", "step-000006"]
    monkeypatch.setattr(Path, "replace", replace)
    run.save_checkpoint(checkpoint(8), 1)
    assert names(run) == ["step-000008"]


HOLD = """
import json, sys
from pathlib import Path
from trainer_core.runs.folder import RunFolder
with RunFolder.open(Path(sys.argv[1]), json.loads(sys.argv[2])) as run:
    (run.checkpoints / ".step-000002.1.ab.tmp").mkdir()
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_also_after_a_kill(tmp_path: Path) -> None:
    path, key = tmp_path / "run", key_of()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), json.dumps(key)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "inside\n"
        try:
            with pytest.raises(
                RunFolderError, match=rf"{re.escape(str(path))} is in use.*Wait until it ends.*run\.lock"
            ):
                entered(path, key)
            assert len(list((path / "checkpoints").iterdir())) == 1, "the other's unfinished checkpoint must stay"
        finally:
            other.kill()
    assert list((entered(path, key).path / "checkpoints").iterdir()) == []


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def broken() -> None:
        with RunFolder.open(path, key_of()), pytest.raises(RunFolderError, match="in use"):
            entered(path, key_of())
        with RunFolder.open(path, key_of()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert entered(path, key_of()).state()["state"] == "started"


def test_a_drive_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_lock: FileLock, timeout: float) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert entered(tmp_path / "run", key_of()).state()
    assert "can't be locked" in caplog.text


def test_a_checkpoint_that_can_not_be_read_is_not_called_damaged(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trainer_core.runs.folder.check_digest", refuse)
    with pytest.raises(RunFolderError, match=r"step-000004 can't be read: Permission denied"):
        run._set_damaged_aside()
    assert names(run) == ["step-000002", "step-000004"]
