"""The trash of a data set: what is in it, and how it is emptied.

Each removal has a folder there, whose name is the token that undoes it. Whatever else lies there is left alone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from ..files import remove
from ..text import counted
from .adding import usage
from .changes import TOKEN, restorable
from .folders import TRASH, DataSet
from .moves import check_folders


@dataclass(frozen=True, slots=True, kw_only=True)
class Trash:
    """Number and size of the files in the trash. `newest`: token and files of the newest removal that can be undone;
    "" if there is none."""

    files: int
    bytes: int
    newest: str
    newest_files: list[str]


def read_trash(data_set: DataSet) -> Trash:
    """What is in the trash. Doesn't follow links."""
    removals = _removals(data_set)
    sizes = [usage(folder) for folder in removals]
    files, size = sum(each.files for each in sizes), sum(each.bytes for each in sizes)
    for folder in removals:
        if found := restorable(data_set, folder):
            return Trash(files=files, bytes=size, newest=folder.name, newest_files=found)
    return Trash(files=files, bytes=size, newest="", newest_files=[])


def empty_trash(data_set: DataSet, files: object, size: object) -> None:
    """Delete what is in the trash for good. Must be called inside `moves.changing`.

    `files` and `size` are the number and the bytes that the user was told, so nothing else is deleted.

    Raises:
        DatasetError: they differ from what is there now, the trash is a link, or files can't be deleted.
    """
    check_folders(data_set, data_set.root / TRASH / "x")
    now = read_trash(data_set)
    if type(files) is not int or type(size) is not int or (files, size) != (now.files, now.bytes):
        raise DatasetError("The trash has changed, so nothing was deleted. Look at it again.")
    for folder in _removals(data_set):
        remove(folder)
    with suppress(OSError):
        (data_set.root / TRASH).rmdir()
    if left := read_trash(data_set).files:
        raise DatasetError(
            f"{counted(left, 'file')} in {TRASH} could not be deleted. Close the programs that use them, and try again."
        )


def _removals(data_set: DataSet) -> list[Path]:
    """The folders of all removals, the newest first."""
    trash = data_set.root / TRASH
    found: list[tuple[int, Path]] = []
    if not trash.is_symlink():
        with suppress(OSError), os.scandir(trash) as listing:  # a change in another thread may remove folders
            for entry in listing:
                if TOKEN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
    return [folder for _, folder in sorted(found, reverse=True)]
