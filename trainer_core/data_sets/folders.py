"""Finds data sets below a root: folders that hold a folder of targets and at least one of references."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..disk import disk_errors
from ..errors import DatasetError
from ..text import brief, shown
from .names import SIDES, checked_new_name, is_one_name, is_path_of_names, side_of_folder

TRASH = ".trash"
HELD_OUT = "held_out.txt"
MASK_FOLDERS = ("mask", "masks")
_MOST_FOLDERS = 2_000  # below the root, that are looked at
_MOST_ENTRIES = 2_000  # of such a folder
_MOST_KEPT = 10_000
_SETTLED_NS = 2 * 10**9  # a folder could change again without changing its timestamp


class NotFoundError(DatasetError):
    """There is no such data set, picture or removal."""


class NameTakenError(DatasetError):
    """Something else has the name of a new data set."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set's folders. `root` is a real path, `sides` has those that exist."""

    name: str
    root: Path
    sides: Mapping[str, Path]
    notes: tuple[str, ...] = ()

    def folder(self, side: str) -> Path:
        """The folder of a side, which may not exist yet."""
        return self.sides.get(side, self.root / side)

    @property
    def references(self) -> tuple[Path, ...]:
        """The folders of references that exist."""
        return tuple(folder for side, folder in self.sides.items() if side != "target")

    def picture(self, side: str, file: str) -> Path:
        """The real path of an existing file of a side. `file` may have subfolders, separated by slashes.

        Raises:
            NotFoundError: there is no such file, or it lies elsewhere.
        """
        if side in self.sides and is_path_of_names(file):
            path = Path(os.path.realpath(self.sides[side] / file))
            if path.is_relative_to(self.sides[side]) and path.is_file():
                return path
        raise NotFoundError(f"The data set {shown(self.name)} has no such picture. Reload the page.")


class Usage(NamedTuple):
    """How many files a data set has, and their bytes, with those in its trash and those that are being received.

    The trash counts, because it fills the disk as well. It is never emptied without its owner.
    """

    files: int
    bytes: int


def usage(root: Path) -> Usage:
    """The files below a folder. Doesn't follow links."""
    files = size = 0
    waiting = [] if root.is_symlink() else [str(root)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    files += 1
                    with suppress(OSError):  # a file that another upload has just renamed
                        size += entry.stat(follow_symlinks=False).st_size
    return Usage(files, size)


def find_data_sets(root: Path) -> list[str]:
    """The names of the data sets below a root, sorted. Looks at names of folders only, so it takes milliseconds."""
    return list(_data_sets(root))


def open_data_set(root: Path, name: str) -> DataSet:
    """The data set of this name.

    Raises:
        NotFoundError: there is none, or it or one of its folders is a link that leads out of it.
    """
    real_root = Path(os.path.realpath(root))
    folder = real_root / name if is_one_name(name) else real_root
    found = _sides_in(folder) if folder != real_root and _is_folder(folder) else {}
    if not _is_complete(found):
        raise NotFoundError(
            f"There is no data set named {brief(name)}. A data set is a folder in ComfyUI's input folder with the "
            "folders reference and target in it."
        )
    real = Path(os.path.realpath(folder))
    sides = {side: folder / found[side][0] for side in SIDES if side in found}
    outside = [each.name for each in sides.values() if os.path.realpath(each) != str(real / each.name)]
    if outside or not real.is_relative_to(real_root):
        what = f"the folder {shown(outside[0])} in it" if outside else "its folder"
        raise NotFoundError(
            f"The data set {shown(name)} can't be used, because {what} is a link. Put the folder itself there."
        )
    return DataSet(name, real, {side: real / path.name for side, path in sides.items()}, tuple(_notes(real, found)))


def create_data_set(root: Path, name: object) -> DataSet:
    """Make an empty data set.

    Raises:
        DatasetError: the name is not allowed.
        NameTakenError: something has this name already.
        DiskError: the folders can't be made.
    """
    checked = checked_new_name(name)
    folder = Path(os.path.realpath(root)) / checked
    beside = {entry.name.casefold() for entry in folder.parent.iterdir()} if folder.parent.is_dir() else set()
    if checked.casefold() in beside:
        raise NameTakenError(f"ComfyUI's input folder already has a file or folder named {shown(checked)}.")
    with disk_errors(folder):
        for side in ("reference", "target"):
            (folder / side).mkdir(parents=True)
    return open_data_set(root, checked)


def _data_sets(root: Path) -> Iterator[str]:
    try:
        with os.scandir(root) as listing:
            names = [entry.name for entry in listing if _entry_is_folder(entry) and is_one_name(entry.name)]
    except OSError:
        return
    for name in sorted(names)[:_MOST_FOLDERS]:
        if _is_complete(_sides_in(root / name)) and not _leads_out(root / name, root):
            yield name


def _leads_out(folder: Path, root: Path) -> bool:
    return folder.is_symlink() and not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root))


class _Known:
    """The sides of folders that were looked at, by path, while the folder's modification time stays the same."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, dict[str, list[str]]]] = {}
        self._lock = threading.Lock()

    def sides(self, folder: Path) -> dict[str, list[str]]:
        try:
            changed = folder.stat().st_mtime_ns
        except OSError:
            return {}
        with self._lock:
            then, found = self._found.get(str(folder), (-1, {}))
        if then == changed:
            return found
        found = _listed_sides(folder)
        if time.time_ns() - changed < _SETTLED_NS:
            return found
        with self._lock:
            if len(self._found) >= _MOST_KEPT:
                self._found.clear()
            self._found[str(folder)] = changed, found
        return found


_KNOWN = _Known()


def _sides_in(folder: Path) -> dict[str, list[str]]:
    """The folders by side, the one to use first."""
    return _KNOWN.sides(folder)


def _listed_sides(folder: Path) -> dict[str, list[str]]:
    try:
        with os.scandir(folder) as listing:
            names = [entry.name for entry in islice(listing, _MOST_ENTRIES) if _entry_is_folder(entry)]
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    known = [(each, name) for name in names if (each := side_of_folder(name))]
    for each, name in sorted(known, key=lambda item: item[0].rank):
        found.setdefault(each.side, []).append(name)
    return found


def _is_complete(found: Mapping[str, list[str]]) -> bool:
    return "target" in found and "reference" in found


def _notes(root: Path, found: Mapping[str, list[str]]) -> Iterator[str]:
    for used, *others in found.values():
        if others:
            yield (
                f"The folder {shown(others[0])} is not used, because the folder {shown(used)} is read for the same "
                "side. Move its pictures there, or rename it."
            )
    masks = next((name for name in MASK_FOLDERS if _is_folder(root / name)), "")
    if masks:
        yield f"The folder {masks} is not used here. To train with masks, use the node Pair Edit Folders."


def _entry_is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
