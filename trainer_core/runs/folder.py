"""A run folder: all files of one run, written so that a kill at any moment keeps the last complete state.

run.json          the settings that determine the weights, and how the run ended
config.json       all settings of the last start
metrics.jsonl     one JSON object per step
tensorboard/      the same as TensorBoard event files
samples/          validation grids (step-000250.png) and their single pictures (step-000250/)
base_pictures/    latents of the base model's validation pictures, by a digest of all that determines them
checkpoints/      resumable states (step-000250/)
run.lock          locked by the training process
<name>.safetensors  the LoRA file
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..config import completed_key
from ..disk import disk_errors
from ..errors import RunFolderError
from ..files import is_whole, read_tensors, write_atomically, write_tensors, written_beside

FORMAT = 1
LOCK = "run.lock"
_LOG = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"step-\d+")  # the whole name, so that a user's copy such as step-000250.bak is ignored


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State after a step; tensors by name. `report` is the step's metrics row, in case a kill cut the metrics file."""

    report: dict[str, Any]
    lora: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)  # empty without EMA

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return int(self.report["step"])


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and atomic writes of one run. `writes` is False in processes other than the leader, which only read."""

    path: Path
    writes: bool = True
    _state: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # run.json as last read or written

    @classmethod
    @contextmanager
    def open(cls, path: Path, key: Mapping[str, Any]) -> Iterator[RunFolder]:
        """Create the folder, or open that of a run with the same settings, and lock it inside the context.

        Raises:
            RunFolderError: the folder isn't a run, is in use, or belongs to a run with other settings; lists each
                setting with both values.
        """
        folder = cls(path)
        folder.check_key(key)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            folder._enter(key)
            yield folder

    def check_key(self, key: Mapping[str, Any]) -> None:
        """Raise RunFolderError if the folder isn't a run, or belongs to a run with other settings."""
        if self.path.exists() and not self.state() and any(each.name != LOCK for each in self.path.iterdir()):
            raise RunFolderError(f"The folder {self.path} is not empty and is not a run. Choose another run name.")
        if self.state() and (changed := self.changes(key)):
            changes = ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changed)
            raise RunFolderError(
                f"The run {self.path.name!r} was started with other settings: {changes}. Set them back to continue it, "
                "or choose another run name to start a new run. Nothing was changed."
            )

    def _enter(self, key: Mapping[str, Any]) -> None:
        self.check_key(key)  # again, because another process may have changed it before it was locked
        if not self.state():
            self.write_state(key=dict(key), state="started")
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for left_over in self.checkpoints.glob(".step-*.tmp"):  # of a killed process; the lock excludes others
            shutil.rmtree(left_over, ignore_errors=True)

    @property
    def metrics_file(self) -> Path:
        """The file with one JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Folder of the validation pictures."""
        return self.path / "samples"

    @property
    def base_pictures(self) -> Path:
        """Folder of the latents of the base model's validation pictures."""
        return self.path / "base_pictures"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def grid_file(self, step: int) -> Path:
        """Path of a step's validation grid."""
        return self.samples / f"step-{step:06d}.png"

    def state(self) -> dict[str, Any]:
        """The values in run.json; empty if it doesn't exist. Reads the file only if it has changed.

        Raises:
            RunFolderError: the file is damaged.
        """
        path = self.path / "run.json"
        try:
            version = _version_of(path)
        except FileNotFoundError:
            return {}
        if self._state.get("version") != version:
            try:
                state = dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise RunFolderError(f"{path} is damaged: {error}. Choose another run name.") from error
            self._state.update(version=version, state=state)
        return dict(self._state["state"])

    def changes(self, key: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(dotted name, value in the folder, value in `key`) of each differing setting that determines the weights."""
        return _differences(completed_key(self.state()["key"]), json.loads(json.dumps(key)))

    def write_state(self, **values: Any) -> None:
        """Set some values in run.json."""
        if not self.writes:
            return
        text = json.dumps({**self.state(), "format": FORMAT, **values}, indent=1, ensure_ascii=False)
        write_atomically(self.path / "run.json", text.encode())
        self._state.update(version=_version_of(self.path / "run.json"), state=json.loads(text))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Save all settings of this start."""
        if self.writes:
            write_atomically(self.path / "config.json", json.dumps(config, indent=1, ensure_ascii=False).encode())

    def save_checkpoint(self, checkpoint: Checkpoint, limit: int) -> None:
        """Write a checkpoint under a temporary name, rename it, and keep the newest `limit` up to its step.

        A complete checkpoint of the same step is kept as it is; an incomplete one is replaced. Checkpoints of later
        steps are incomplete, or the run would have resumed from them, so they don't count.
        """
        final = self.checkpoints / f"step-{checkpoint.step:06d}"
        if not self.writes or self._is_complete(final):
            return
        with written_beside(final) as temporary:
            temporary.mkdir()
            for part in self._parts():
                write_tensors(temporary / f"{part}.safetensors", getattr(checkpoint, part))
            write_atomically(temporary / "report.json", json.dumps(checkpoint.report).encode())
            if final.exists():
                shutil.rmtree(final)
        _flush_folder(self.checkpoints)
        for old in [each for each in self._checkpoint_folders() if _step_of(each) <= checkpoint.step][:-limit]:
            shutil.rmtree(old)

    def steps_done(self) -> int:
        """Steps of the newest complete checkpoint; 0 without one."""
        folder = self._newest_complete()
        return _step_of(folder) if folder else 0

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint; None without one."""
        folder = self._newest_complete()
        if folder is None:
            return None
        tensors = {part: read_tensors(folder / f"{part}.safetensors") for part in self._parts()}
        return Checkpoint(_report_in(folder), **tensors)

    def _newest_complete(self) -> Path | None:
        return next(filter(self._is_complete, reversed(self._checkpoint_folders())), None)

    def _is_complete(self, folder: Path) -> bool:
        files = (folder / f"{part}.safetensors" for part in self._parts())
        return _report_in(folder).get("step") == _step_of(folder) and all(map(is_whole, files))

    def _parts(self) -> tuple[str, ...]:
        """Names of a checkpoint's tensor files under this run's settings."""
        return ("lora", "optimizer", "ema") if "ema" in self.state().get("key", {}) else ("lora", "optimizer")

    def _checkpoint_folders(self) -> list[Path]:
        found = (path for path in self.checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(path.name))
        return sorted(found, key=_step_of)

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics rows, up to a line that a kill cut short."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def metrics_until(self, checkpoint: Checkpoint | None) -> None:
        """Cut the metrics back to the checkpoint's step, and add that step's row if a kill lost it."""
        if checkpoint is None:
            self.write_metrics([])
            return
        kept = [row for row in self.metrics() if row["step"] <= checkpoint.step]
        if not kept or kept[-1]["step"] < checkpoint.step:
            kept.append(checkpoint.report)
        self.write_metrics(kept)

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the metrics file."""
        if self.writes:
            write_atomically(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows).encode())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it however the process ends.

    Raises:
        RunFolderError: another process holds it.
    """
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"The run folder {path} is in use by another training run. Wait until it ends, stop it, or choose another "
            f"run name. If no training is running on any machine, delete {LOCK} in the folder. Nothing was changed."
        ) from error
    except (OSError, NotImplementedError) as error:  # some network drives
        _LOG.warning("The run folder %s can't be locked (%s). Make sure that no other run uses it.", path, error)
    try:
        yield
    finally:
        lock.release()


def _version_of(path: Path) -> tuple[int, ...]:
    """A value that changes whenever the file is replaced, as every atomic write does."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _report_in(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint; empty if it can't be read."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every setting that differs."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((prefix + name, before, after))
    return found


def _flush_folder(path: Path) -> None:
    """Make a rename in this folder durable; Windows can't."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
