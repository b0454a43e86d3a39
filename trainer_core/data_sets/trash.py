"""The trash of a data set: what is in it, and how it is emptied.

Each removal has a folder there, whose name is the token that undoes it. Whatever else lies there is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..config import digest
from ..errors import DatasetError
from ..files import remove
from ..text import counted
from .changes import TOKEN, restorable
from .folders import TRASH, DataSet, Usage, usage
from .moves import check_folders


@dataclass(frozen=True, slots=True, kw_only=True)
class Trash:
    """Number and size of the files in the trash. `state`: changes with what is in it. `newest`: token and files of the
    newest removal that can be undone; "" if there is none."""

    files: int
    bytes: int
    state: str
    newest: str
    newest_files: list[str]


def read_trash(data_set: DataSet) -> Trash:
    """What is in the trash. Doesn't follow links."""
    removals = _removals(data_set)
    newest = next(((folder.name, found) for folder in removals if (found := restorable(data_set, folder))), ("", []))
    return Trash(
        files=sum(each.files for each in removals.values()),
        bytes=sum(each.bytes for each in removals.values()),
        state=_state(removals),
        newest=newest[0],
        newest_files=newest[1],
    )


def empty_trash(data_set: DataSet, state: object) -> None:
    """Delete what is in the trash for good. Must be called inside `moves.changing`.

    `state` is that of the trash that the user was told about, so nothing else is deleted.

    Raises:
        DatasetError: it has another state now, the trash is a link, or files can't be deleted.
    """
    check_folders(data_set, data_set.root / TRASH / "x")
    removals = _removals(data_set)
    if state != _state(removals):
        raise DatasetError("The trash has changed, so nothing was deleted. Look at it again.")
    for folder in removals:
        remove(folder)
    with suppress(OSError):
        (data_set.root / TRASH).rmdir()
    if left := sum(usage(folder).files for folder in removals):
        raise DatasetError(
            f"{counted(left, 'file')} in {TRASH} could not be deleted. Close the programs that use them, and try again."
        )


def _removals(data_set: DataSet) -> dict[Path, Usage]:
    """The folders of all removals with what is in them, the newest first."""
    trash = data_set.root / TRASH
    found: list[tuple[int, Path]] = []
    if not trash.is_symlink():
        with suppress(OSError), os.scandir(trash) as listing:  # a change in another thread may remove folders
            for entry in listing:
                if TOKEN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
    return {folder: usage(folder) for _, folder in sorted(found, reverse=True)}


def _state(removals: Mapping[Path, Usage]) -> str:
    """A digest of these removals' tokens, with the number and the bytes of their files."""
    sizes = sorted((folder.name, *size) for folder, size in removals.items())
    return digest(sizes)
