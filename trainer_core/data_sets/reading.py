"""What is in a data set: its pairs, the pictures without a partner, captions, and the pairs that are held out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import digest
from ..data.captions import read_text
from ..data.folders import Folder, file_states, scan_folder
from ..data.images import picture_header
from ..data.sides import captions_beside_references
from ..errors import DatasetError
from ..geometry import Size
from ..text import LONGEST_PROMPT, printable, some_of
from .folders import HELD_OUT, DataSet
from .likeness import Suggestion, suggestions
from .names import REFERENCES

_MOST_HEADERS = 2_000  # that one reading opens; later ones open the rest
_MOST_KEPT = 50_000
_MOST_NOTES = 50


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of one side. `file` is its path below the side's folder. `version` changes when the file does.

    `width` and `height` are None while they are not known, and for files that can't be opened.
    """

    file: str
    side: str
    width: int | None
    height: int | None
    version: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A target with its references, None for each that it lacks. `caption` is the whole text of its caption file."""

    key: str
    reference: tuple[Picture | None, ...]
    target: Picture
    caption: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """A data set. `revision` changes when a picture, a caption or a mark does.

    `looks_swapped`: captions lie beside the pictures before the edit, and none beside those after it.
    `suggestions_left` counts the pictures that are not compared yet; the next reading goes on with them.
    """

    name: str
    revision: str
    pairs: tuple[Pair, ...]
    unmatched: tuple[Picture, ...]
    suggestions: tuple[Suggestion, ...]
    suggestions_left: int
    looks_swapped: bool
    notes: tuple[str, ...]


def read_data_set(data_set: DataSet) -> Contents:
    """The contents of a data set. Opens pictures only to read their sizes, and those that it compares.

    Raises:
        DiskError: a name is too long, or the disk fails.
    """
    folders = {side: scan_folder(root) for side, root in data_set.sides.items()}
    pictures = _Pictures(folders)
    target = folders["target"]
    references = {side: folders[side] for side in REFERENCES if side in folders}
    held_out, held_out_notes = held_out_and_notes(data_set)
    both = target.pictures.keys() & set[str]().union(*(folder.pictures for folder in references.values()))
    paired = sorted(both)
    captions, caption_notes = _captions(paired, target)
    pairs = tuple(
        Pair(
            key,
            tuple(pictures.of(side, key) for side in references),
            pictures.at("target", target.pictures[key]),
            captions.get(key, ""),
            key in held_out,
        )
        for key in paired
    )
    alone = [
        (side, path)
        for side, folder in folders.items()
        for key, path in sorted(folder.pictures.items())
        if key not in (target.pictures if side != "target" else both)
    ]
    found = suggestions(alone, data_set)
    notes = _notes(data_set, folders, [*held_out_notes, *caption_notes], held_out - target.pictures.keys())
    return Contents(
        name=data_set.name,
        revision=revision(data_set),
        pairs=pairs,
        unmatched=tuple(pictures.at(side, path) for side, path in alone),
        suggestions=found.suggestions,
        suggestions_left=found.left,
        looks_swapped=captions_beside_references(target, folders["reference"]),
        notes=tuple(notes)[:_MOST_NOTES],
    )


def revision(data_set: DataSet) -> str:
    """A digest that changes when a picture, a text or a mark of the data set does. Opens no picture."""
    files = {side: [(printable(name), *state) for name, *state in file_states(data_set.folder(side))]
             for side in data_set.sides}  # fmt: skip
    held_out, notes = held_out_and_notes(data_set)
    return digest([{side: sorted(found) for side, found in files.items()}, sorted(held_out), notes])


def count_pairs(data_set: DataSet) -> int:
    """How many targets have a reference. Looks at names only."""
    keys = {side: set(scan_folder(root).pictures) for side, root in data_set.sides.items()}
    return len(keys["target"] & set().union(*(found for side, found in keys.items() if side != "target")))


def last_change(data_set: DataSet) -> int:
    """When a file was last added to or removed from the data set, in seconds since 1970."""
    times: list[float] = []
    for folder in (data_set.root, *data_set.sides.values()):
        try:
            times.append(folder.stat().st_mtime)
        except OSError:
            continue
    return int(max(times, default=0))


def held_out_and_notes(data_set: DataSet) -> tuple[frozenset[str], list[str]]:
    """As `read_held_out`, and a note if the list can't be read."""
    try:
        return read_held_out(data_set), []
    except DatasetError as error:
        return frozenset(), [str(error)]


def read_held_out(data_set: DataSet) -> frozenset[str]:
    """The keys that the data set's list of held-out pairs names. Empty without a list, or if it is a link.

    Raises:
        DatasetError: the list can't be read.
    """
    path = data_set.root / HELD_OUT
    if path.is_symlink() or not path.is_file():
        return frozenset()
    try:
        lines = read_text(path).split("\n")
    except DatasetError as error:
        raise DatasetError(
            f"The list of held-out pairs, {HELD_OUT}, can't be read. Save it as UTF-8 text with one name a line, or "
            "delete it and mark the pairs again."
        ) from error
    return frozenset(line.strip() for line in lines if line.strip())


def caption_of(path: Path) -> str:
    """The text of a caption file.

    Raises:
        DatasetError: it can't be read, or is too long.
    """
    text = read_text(path).strip()
    if len(text) > LONGEST_PROMPT:
        raise DatasetError(f"{path.name}: the caption is longer than {LONGEST_PROMPT:,} characters. Shorten it.")
    return text


class _Sizes:
    """The sizes of pictures by path and version, for as long as the server runs."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Size | None] = {}
        self._lock = threading.Lock()

    def get(self, path: Path, version: str, *, may_open: bool) -> tuple[Size | None, bool]:
        """The size, None if it is unknown, and whether the file was opened for it."""
        key = str(path), version
        with self._lock:
            if key in self._known or not may_open:
                return self._known.get(key), False
        try:
            size = picture_header(path).size
        except DatasetError:  # the check says what is wrong with it
            size = None
        with self._lock:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            self._known[key] = size
        return size, True


_SIZES = _Sizes()


class _Pictures:
    """Makes the `Picture` of each file, and limits how many files one reading opens."""

    def __init__(self, folders: Mapping[str, Folder]) -> None:
        self._folders = folders
        self._opened = 0

    def of(self, side: str, key: str) -> Picture | None:
        path = self._folders[side].pictures.get(key)
        return self.at(side, path) if path is not None else None

    def at(self, side: str, path: Path) -> Picture:
        version = version_of(path)
        size, opened = _SIZES.get(path, version, may_open=self._opened < _MOST_HEADERS)
        self._opened += opened
        name = path.relative_to(self._folders[side].root).as_posix()
        return Picture(name, side, size and size.width, size and size.height, version)


def version_of(path: Path) -> str:
    """Names the state of a file: its modification time and size."""
    try:
        state = path.stat()
    except OSError:
        return "0"
    return f"{state.st_mtime_ns:x}-{state.st_size:x}"


def _captions(keys: Iterable[str], target: Folder) -> tuple[dict[str, str], list[str]]:
    """The captions by key, and notes on those that can't be read."""
    found: dict[str, str] = {}
    notes: list[str] = []
    for key in keys:
        path = target.texts.get(key)
        if path is None:
            continue
        try:
            found[key] = caption_of(path)
        except DatasetError as error:
            notes.append(str(error))
    return found, notes


def _notes(
    data_set: DataSet, folders: Mapping[str, Folder], unread: Iterable[str], stale: Iterable[str]
) -> Iterator[str]:
    yield from data_set.notes
    for folder in folders.values():
        yield from folder.problems
        yield from folder.notes
    yield from unread
    if missing := sorted(stale):
        yield f"{HELD_OUT} names pictures that are not there: {some_of(missing)}."
