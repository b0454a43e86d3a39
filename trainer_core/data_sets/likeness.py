"""Suggests which of the pictures without a partner belong together, by name and by how alike they look.

Likeness is the absolute correlation of the brightness differences between neighbouring pixels of small grey pictures.
Unlike that of the brightness itself, it is low for unrelated photos with a bright sky, and high for a colour negative.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..data.images import open_reduced
from ..data.layouts import ending_of
from ..errors import DatasetError
from .folders import DataSet
from .names import same_stem

LEAST_LIKENESS = 0.35  # of two pictures that are suggested; that of unrelated photos rarely exceeds 0.2
_SIDE = 48  # pixels of the small grey pictures that are compared
_MOST_DECODED = 60  # by one reading
_MOST_COMPARED = 1_000  # on each side
_MOST_KEPT = 4_000
_FLAT = 1e-2  # brightness difference of neighbours, on average, in a picture that shows nothing

Grey: TypeAlias = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A reference and a target that may belong together. `likeness` is at most 1."""

    reference: str
    target: str
    likeness: float


class Found(NamedTuple):
    """Suggestions, and how many pictures are not compared yet."""

    suggestions: tuple[Suggestion, ...]
    left: int


def suggestions(alone: Sequence[tuple[str, Path]], data_set: DataSet) -> Found:
    """For pictures without a partner (side, path): which belong together. Each picture occurs at most once."""
    references = [path for side, path in alone if side == "reference"][:_MOST_COMPARED]
    targets = [path for side, path in alone if side == "target"][:_MOST_COMPARED]
    if not references or not targets:
        return Found((), 0)
    left = _read_small([*references, *targets])
    likeness = _likeness(references, targets)
    named = _by_name(references, targets)
    chosen = [*named, *_best(likeness, {row for row, _ in named}, {column for _, column in named})]
    roots = data_set.folder("reference"), data_set.folder("target")
    return Found(
        tuple(
            Suggestion(
                references[row].relative_to(roots[0]).as_posix(),
                targets[column].relative_to(roots[1]).as_posix(),
                round(float(likeness[row, column]), 3),
            )
            for row, column in chosen
        ),
        left,
    )


def _by_name(references: Sequence[Path], targets: Sequence[Path]) -> list[tuple[int, int]]:
    """References and targets whose names differ only in their endings, such as 000_before and 000_after."""
    by_name: dict[str, list[int]] = {}
    for number, path in enumerate(targets):
        by_name.setdefault(_bare(path), []).append(number)
    once = {name: found[0] for name, found in by_name.items() if len(found) == 1}
    taken: set[int] = set()
    found: list[tuple[int, int]] = []
    for number, path in enumerate(references):
        target = once.get(_bare(path))
        if target is not None and target not in taken:
            taken.add(target)
            found.append((number, target))
    return found


def _bare(path: Path) -> str:
    ending = ending_of(path.stem)
    return same_stem(ending.bare if ending is not None else path.stem)


def _best(likeness: Grey, rows: set[int], columns: set[int]) -> list[tuple[int, int]]:
    """The most alike first. A picture that is suggested once is not suggested again."""
    found: list[tuple[int, int]] = []
    rows, columns = set(rows), set(columns)
    for place in np.argsort(-likeness, axis=None, kind="stable"):
        row, column = divmod(int(place), likeness.shape[1])
        if likeness[row, column] < LEAST_LIKENESS:
            break
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            found.append((row, column))
    return found


def _likeness(references: Sequence[Path], targets: Sequence[Path]) -> Grey:
    """The likeness of each reference (row) and each target (column); 0 where one of them isn't known."""
    rows, columns = (
        np.stack([_SMALL.known(path) for path in paths]).astype(np.float32) for paths in (references, targets)
    )
    return np.abs(np.asarray(rows @ columns.T, dtype=np.float32))


_NOTHING: Grey = np.zeros(2 * _SIDE * (_SIDE - 1), np.float16)


class _Small:
    """The differences in small pictures by path and state, for as long as the server runs. Their length is 1 or 0."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, int], Grey] = {}
        self._lock = threading.Lock()

    def has(self, path: Path) -> bool:
        with self._lock:
            return _state(path) in self._found

    def known(self, path: Path) -> Grey:
        with self._lock:
            return self._found.get(_state(path), _NOTHING)

    def read(self, path: Path) -> None:
        state, small = _state(path), _small(path)
        with self._lock:
            if len(self._found) >= _MOST_KEPT:
                self._found.clear()
            self._found[state] = small


_SMALL = _Small()


def _read_small(paths: Iterable[Path]) -> int:
    """Read the pictures that are not known yet, up to a limit. Returns how many are left."""
    new = [path for path in paths if not _SMALL.has(path)]
    for path in new[:_MOST_DECODED]:
        _SMALL.read(path)
    return max(0, len(new) - _MOST_DECODED)


def _state(path: Path) -> tuple[str, int, int]:
    try:
        state = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), state.st_size, state.st_mtime_ns


def _small(path: Path) -> Grey:
    try:
        reduced: Any = open_reduced(path, 2 * _SIDE, convert=False).convert("L").resize((_SIDE, _SIDE))
    except DatasetError:  # the check says what is wrong with it
        return _NOTHING
    values = np.asarray(reduced, dtype=np.float32) / 255
    steps = np.concatenate([np.diff(values, axis=axis).reshape(-1) for axis in (0, 1)])
    length = float(np.linalg.norm(steps))
    return (steps / length).astype(np.float16) if length > _FLAT * _SIDE else _NOTHING
