"""A run folder: all files of one run, written so that a kill at any moment keeps the last complete state.

run.json          the settings that determine the weights, and how the run ended
dataset.json      the training pairs, to say later what has changed
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..conditioning.encoded import EncodedDataset, trained_values
from ..config import completed_key, unused_settings
from ..disk import disk_errors
from ..errors import DamagedFileError, RunFolderError
from ..files import (
    check_digest,
    clean_leftovers,
    is_leftover,
    is_whole,
    read_tensors,
    remove,
    rename,
    set_aside,
    temporary_beside,
    write_atomically,
    write_tensors,
    written_beside,
)
from ..text import counted, reason_of
from .changes import DATASET, differences, in_words
from .lock import LOCK, locked
from .records import STATE, is_row, read_row, read_state

FORMAT = 1
RULES = 4  # raise it when the same settings train other weights, and say in result.py which settings do
_FOLDERS = ("samples", "checkpoints", "tensorboard", "base_pictures")
_FILES = (STATE, DATASET, "config.json", "metrics.jsonl", LOCK)
_LOG = logging.getLogger(__name__)
_SET_ASIDE = re.compile(r"step-[0-9]{1,12}\.damaged(-\d+)?")
_CHECKPOINT = re.compile(r"step-[0-9]{1,12}")  # the whole name: a user's copy such as step-000250.bak is ignored


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
    def open(cls, path: Path, key: Mapping[str, Any], encoded: EncodedDataset | None = None) -> Iterator[RunFolder]:
        """Create the folder, or open that of a run with the same settings, and lock it inside the context.

        Deletes what killed processes left in it. Sets damaged checkpoints aside, with a warning. `encoded` is the
        dataset that `key` names.

        Raises:
            RunFolderError: the folder isn't a run, is damaged or in use, or belongs to a run with other settings; says
                what has changed.
        """
        folder = cls(path)
        folder.check_key(key, encoded)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with locked(path) as is_locked:
            folder._enter(key, encoded)
            clean_leftovers(path, nobody_writes=is_locked)
            folder._set_damaged_aside()
            yield folder

    def check_key(self, key: Mapping[str, Any], encoded: EncodedDataset | None = None) -> None:
        """Check that the folder is a run with these settings, or that a run can start in it.

        Raises:
            RunFolderError: it isn't, or it is damaged.
        """
        self._check_files()
        if self.state() and (changed := self.changes(key)):
            raise RunFolderError(
                f"The run {self.path.name!r} was started with other settings or pairs:\n"
                f"{in_words(self.path, changed, encoded)}\n"
                "Undo these changes to continue it, or choose another name to start a new run."
                f"{self.way_from_lora()} Nothing was changed."
            )

    def _check_files(self) -> None:
        """Check that the folder is a run or empty, and that its parts are files and folders as needed."""
        if not self.path.exists():
            return
        wrong = "is a file, but the run needs a folder of that name"
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path} {wrong}. Choose another name, or move the file away.")
        for name in _FOLDERS:
            if (self.path / name).exists() and not (self.path / name).is_dir():
                raise RunFolderError(f"{self.path / name} {wrong}. Move it out of the run folder.")
        for file in (*(self.path / name for name in _FILES), *self.path.glob("*.safetensors")):
            if file.is_dir():
                raise RunFolderError(
                    f"{file} is a folder, but the run needs a file of that name. Move it out of the run folder."
                )
        names = (each.name for each in self.path.iterdir())
        if not self.state() and any(name != LOCK and not is_leftover(name) for name in names):
            raise RunFolderError(
                f"The folder {self.path} is not empty, but it is not a run: {STATE} is missing. Put that file back, or "
                "choose another name."
            )

    def _enter(self, key: Mapping[str, Any], encoded: EncodedDataset | None) -> None:
        self.check_key(key, encoded)  # again, because another process may have changed it before it was locked
        if not self.state():
            self.write_state(key=dict(key), state="started")
        if not self.steps_done() and not self.lost_steps():
            self.write_state(rules=RULES)
        if encoded is not None and not (self.path / DATASET).exists():
            write_atomically(self.path / DATASET, json.dumps(trained_values(encoded), ensure_ascii=False).encode())
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def way_from_lora(self) -> str:
        """A sentence on how a new run can start from this run's LoRA; empty if there is no LoRA file."""
        result = self.state().get("result")
        if not result or not is_whole(self.path / result["lora_file"]):
            return ""
        return f" The new run can start from this run's LoRA: set init_lora to {self.path / result['lora_file']}."

    def _set_damaged_aside(self) -> None:
        """Rename damaged checkpoints that are newer than the newest usable one.

        Raises:
            RunFolderError: one can't be renamed.
        """
        for folder in reversed(self._checkpoint_folders()):
            problem = self._problem(folder)
            if not problem:
                return
            aside = set_aside(folder)
            if aside is None:
                raise RunFolderError(
                    f"The checkpoint {folder} can't be used: {problem} It can't be renamed either. Move it out of the "
                    "run folder."
                )
            _LOG.warning(
                "The checkpoint %s can't be used: %s It was renamed to %s. An earlier one is used if there is one.",
                folder,
                problem,
                aside.name,
            )

    def _problem(self, folder: Path) -> str:
        """Why a checkpoint can't be used, as a sentence; empty if it can. Reads its files to check their digests.

        Raises:
            RunFolderError: a file can't be read, for example because of its permissions.
        """
        try:
            for part in self._parts():
                check_digest(folder / f"{part}.safetensors")
        except DamagedFileError as error:
            return str(error)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            pass
        except OSError as error:
            raise RunFolderError(f"The checkpoint {folder} can't be read: {error.strerror}.") from error
        return "" if self._is_complete(folder) else "a file is missing or cut short."

    def lost_steps(self) -> int:
        """Steps that were saved once, if the folder has no usable checkpoint any more; else 0."""
        state = self.state()
        if self.steps_done():
            return 0
        counts = (state.get("saved", 0), state.get("steps", 0), (state.get("result") or {}).get("steps", 0))
        aside = (_step_of(each) for each in self.checkpoints.glob("step-*") if _SET_ASIDE.fullmatch(each.name))
        return max(*counts, *aside)

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

        If it was deleted since this object read or wrote it, the values are those of then: the run goes on with them.

        Raises:
            RunFolderError: the file is damaged.
        """
        try:
            version = _version_of(self.path / STATE)
        except (FileNotFoundError, NotADirectoryError):
            return dict(self._state.get("state", {}))
        except OSError as error:
            raise RunFolderError(f"Can't read {self.path / STATE}: {error.strerror}.") from error
        if self._state.get("version") != version:
            self._state.update(version=version, state=read_state(self.path))
        return dict(self._state["state"])

    def changes(self, key: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(dotted name, value in the folder, value in `key`) of each differing setting that determines the weights.

        A setting that one of the two does not use is left out. What decides that differs too, or neither uses it.
        """
        old, new = completed_key(self.state()["key"]), json.loads(json.dumps(key))
        unused = unused_settings(old) | unused_settings(new)
        return [each for each in differences(old, new) if each[0] not in unused]

    def write_state(self, **values: Any) -> None:
        """Set some values in run.json."""
        if not self.writes:
            return
        text = json.dumps({**self.state(), "format": FORMAT, **values}, indent=1, ensure_ascii=False)
        write_atomically(self.path / STATE, text.encode())
        self._state.update(version=_version_of(self.path / STATE), state=json.loads(text))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Save all settings of this start."""
        if self.writes:
            write_atomically(self.path / "config.json", json.dumps(config, indent=1, ensure_ascii=False).encode())

    def save_checkpoint(self, checkpoint: Checkpoint, limit: int, best: int = 0) -> None:
        """Write a checkpoint under a temporary name, rename it, and keep the newest `limit` up to its step, and that of
        the step `best`.

        A complete checkpoint of the same step is kept as it is; an incomplete one is set aside. Checkpoints of later
        steps are incomplete, or the run would have resumed from them, so they don't count.
        """
        final = self.checkpoints / f"step-{checkpoint.step:06d}"
        if not self.writes or self._is_complete(final):
            return
        if not self.path.is_dir():
            _LOG.warning("The run folder %s was deleted while it was in use. It is made again.", self.path)
        with written_beside(final) as temporary:
            temporary.mkdir(parents=True)
            for part in self._parts():
                write_tensors(temporary / f"{part}.safetensors", getattr(checkpoint, part))
            write_atomically(temporary / "report.json", json.dumps(checkpoint.report).encode())
            if final.exists():
                set_aside(final)
        _flush_folder(self.checkpoints)
        self.write_state(saved=checkpoint.step)
        for old in [each for each in self._checkpoint_folders() if _step_of(each) <= checkpoint.step][:-limit]:
            if _step_of(old) != best:
                _delete(old)

    def steps_done(self) -> int:
        """Steps of the newest complete checkpoint; 0 without one."""
        folder = self._newest_complete()
        return _step_of(folder) if folder else 0

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint; None without one.

        Raises:
            DamagedFileError: it was changed after `open` checked it.
        """
        folder = self._newest_complete()
        if folder is None:
            return None
        tensors = {part: read_tensors(folder / f"{part}.safetensors") for part in self._parts()}
        return Checkpoint(_report_in(folder), **tensors)

    def _newest_complete(self) -> Path | None:
        return next(filter(self._is_complete, reversed(self._checkpoint_folders())), None)

    def _is_complete(self, folder: Path) -> bool:
        files = (folder / f"{part}.safetensors" for part in self._parts())
        report = _report_in(folder)
        return is_row(report) and report["step"] == _step_of(folder) and all(map(is_whole, files))

    def _parts(self) -> tuple[str, ...]:
        """Names of a checkpoint's tensor files under this run's settings."""
        return ("lora", "optimizer", "ema") if "ema" in self.state().get("key", {}) else ("lora", "optimizer")

    def _checkpoint_folders(self) -> list[Path]:
        found = (path for path in self.checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(path.name))
        return sorted(found, key=_step_of)

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics rows. Passes over damaged lines, with a warning unless it is the last, which a kill cuts short.

        Raises:
            RunFolderError: the file can't be read.
        """
        if not self.metrics_file.is_file():
            return []
        try:
            rows = [read_row(line) for line in self.metrics_file.read_bytes().splitlines()]
        except OSError as error:
            raise RunFolderError(f"Can't read {self.metrics_file}: {error.strerror}.") from error
        if None in rows[:-1]:
            damaged = counted(rows.count(None), "damaged line")
            _LOG.warning("%s has %s, left out here.", self.metrics_file, damaged)
        return [row for row in rows if row is not None]

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


def _version_of(path: Path) -> tuple[int, ...]:
    """A value that changes whenever the file is replaced, as every atomic write does."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").partition(".")[0])


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint that is no longer needed. If that fails, it stays until the next one is saved."""
    try:
        # Renamed first: a kill must not leave a part of a checkpoint under its name.
        remove(rename(checkpoint, temporary_beside(checkpoint)))
    except OSError as error:
        _LOG.warning("The old checkpoint %s can't be deleted (%s).", checkpoint, reason_of(error))


def _report_in(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint; empty if it can't be read."""
    try:
        return read_row((folder / "report.json").read_bytes()) or {}
    except OSError:
        return {}


def _flush_folder(path: Path) -> None:
    """Make a rename in this folder durable; Windows can't."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
