"""Renames several files of a data set as one change: after a crash, the next change finishes it. No file is replaced.

The renames come in phases, and a list of them is written before the first one. Within a phase, a file that is still in
its old place has not been renamed yet, so a phase can be repeated.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..disk import disk_errors
from ..errors import DatasetError
from ..files import clean_leftovers, rename, write_atomically
from ..json_text import read_json
from ..text import shown
from .folders import TRASH, DataSet
from .names import is_path_of_names

UNFINISHED = ".unfinished.json"
Move = tuple[str, str]  # old and new path below the data set's folder
_locks: dict[str, threading.Lock] = {}
_cleaned: set[str] = set()


@contextmanager
def changing(data_set: DataSet) -> Iterator[None]:
    """Only one thread at a time changes a data set. First finishes a change that a crash interrupted.

    Raises:
        DatasetError: the interrupted change can't be finished.
        DiskError: the disk fails.
    """
    key = str(data_set.root)
    with _locks.setdefault(key, threading.Lock()):
        if key not in _cleaned:
            clean_leftovers(data_set.root)
            _cleaned.add(key)
        finish(data_set)
        yield


def move_all(data_set: DataSet, phases: Sequence[Sequence[Move]]) -> None:
    """Rename files, phase by phase. If one can't be renamed, those before it get their old names back.

    Raises:
        DatasetError: a file is gone, a new name is taken, or a folder is a link.
        DiskError: a file can't be renamed, or the disk is full.
    """
    done: list[Move] = []
    with disk_errors(data_set.root):
        try:
            for number, phase in enumerate(phases):
                _write(data_set, phases, number)
                for move in phase:
                    _rename(data_set, move)
                    done.append(move)
        except (OSError, DatasetError):
            for old, new in reversed(done):
                with suppress(OSError, DatasetError):
                    _rename(data_set, (new, old))
            _remove_list(data_set)
            raise
        _remove_list(data_set)
        for old in {Path(old).parent for phase in phases for old, _ in phase if old.startswith(f"{TRASH}/")}:
            for folder in (old, *old.parents[:-2]):  # up to the trash itself, if they are empty now
                with suppress(OSError):
                    (data_set.root / folder).rmdir()


def finish(data_set: DataSet) -> None:
    """Finish the renames that a crash interrupted.

    Raises:
        DatasetError: the list of renames can't be used, or a file can't be renamed.
        DiskError: the disk fails.
    """
    path = data_set.root / UNFINISHED
    if not path.is_file() or path.is_symlink():
        return
    current, phases = _read(path)
    with disk_errors(data_set.root):
        for number, phase in list(enumerate(phases))[current:]:
            if number > current:
                _write(data_set, phases, number)
            for old, new in phase:
                if os.path.lexists(data_set.root / old) and not os.path.lexists(data_set.root / new):
                    _rename(data_set, (old, new))
        _remove_list(data_set)


def _read(path: Path) -> tuple[int, list[list[Move]]]:
    """The phase that was interrupted, and all phases."""
    try:
        stored = read_json(path, UNFINISHED)
        current, phases = stored["phase"], [[(old, new) for old, new in phase] for phase in stored["phases"]]
        names = [name for phase in phases for move in phase for name in move]
        usable = type(current) is int and 0 <= current <= len(phases) and all(map(_is_ours, names))
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable() from error
    if not usable:
        raise _unusable()
    return current, phases


def _unusable() -> DatasetError:
    return DatasetError(
        f"The file {UNFINISHED} in the data set's folder can't be used. It lists files that were being renamed when "
        "the program ended. Check that all pictures are there, then delete it."
    )


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and "/" in name and is_path_of_names(name.removeprefix(f"{TRASH}/"))


def _write(data_set: DataSet, phases: Sequence[Sequence[Move]], number: int) -> None:
    write_atomically(data_set.root / UNFINISHED, json.dumps({"phase": number, "phases": phases}).encode())


def _remove_list(data_set: DataSet) -> None:
    (data_set.root / UNFINISHED).unlink(missing_ok=True)


def check_folders(data_set: DataSet, path: Path) -> None:
    """Refuse a path in the data set if a folder on the way to it is a link, which may lead anywhere.

    Raises:
        DatasetError: a folder is a link.
    """
    for folder in path.relative_to(data_set.root).parents:
        if (data_set.root / folder).is_symlink():
            raise DatasetError(
                f"The folder {shown(folder.name)} of the data set is a link, so nothing is written there."
            )


def _rename(data_set: DataSet, move: Move) -> None:
    old, new = (data_set.root / name for name in move)
    check_folders(data_set, old)
    check_folders(data_set, new)
    if os.path.lexists(new):
        raise DatasetError(f"{shown(new.name)} exists already, so nothing was changed. Reload the page and try again.")
    if not os.path.lexists(old):
        raise DatasetError(f"{shown(old.name)} is gone, so nothing was changed. Reload the page and try again.")
    new.parent.mkdir(parents=True, exist_ok=True)
    rename(old, new)
