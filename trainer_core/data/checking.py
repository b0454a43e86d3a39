"""Every picture is decoded once to be sure of it; what was found is remembered as long as its file stays the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import DatasetError
from ..events import Observer, raise_if_stopped
from ..files import write_atomically
from ..geometry import Size
from .images import accepts_cut_pictures, decode_picture, is_animated, open_picture_file, stream_digest

_DECODERS = 4
_FORMAT = 1  # of the file; a newer way of checking gets a newer number
_SETTLED_NS = 2 * 10**9  # a younger file could change again within the clock's step, unseen

State = tuple[int, int, int, int]  # bytes, times of change of content and of the entry (ns), number of the file


class Checked(NamedTuple):
    """What was found. `brightest` is the largest grey value of a mask, -1 for other pictures."""

    digest: str
    size: Size
    animated: bool
    brightest: int = -1


Found = dict[Path, Checked | DatasetError]


def check_pictures(
    paths: Iterable[Path], observer: Observer, *, masks: Collection[Path] = (), memory: Path | None = None
) -> Found:
    """What is known of every picture, or what is wrong with it. Several are decoded at a time, pixels are forgotten.

    `memory` is a file that remembers what was found; pictures whose file is as it was are not opened again.

    Raises:
        Interrupted: the observer wants to stop; what was found so far is remembered.
    """
    Image.init()  # registers the formats; several threads asking for their first picture would race
    paths = list(dict.fromkeys(paths))
    states = {path: state for path in paths if memory is not None and (state := _state(path)) is not None}
    known = _recall(memory, states, masks)
    results: Found = {}
    try:
        new = [path for path in paths if path not in known]
        for done, (path, result) in enumerate(_checked(new, masks, observer)):
            results[path] = result
            observer.on_progress("Checking pictures", done + 1, len(new))
    finally:
        found = {**known, **{path: each for path, each in results.items() if isinstance(each, Checked)}}
        if memory is not None and found.keys() != known.keys() and not accepts_cut_pictures():
            _remember(memory, found, states)
    return {path: known[path] if path in known else results[path] for path in paths}


def _checked(
    paths: list[Path], masks: Collection[Path], observer: Observer
) -> Iterator[tuple[Path, Checked | DatasetError]]:
    decoders = ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1), thread_name_prefix="check-pictures")
    try:
        waiting: list[tuple[Path, Future[Checked | DatasetError]]] = [
            (path, decoders.submit(_check, path, is_mask=path in masks)) for path in paths
        ]
        for path, future in waiting:
            raise_if_stopped(observer)
            yield path, future.result()
    finally:
        decoders.shutdown(wait=True, cancel_futures=True)


def _check(path: Path, *, is_mask: bool) -> Checked | DatasetError:
    try:
        with open_picture_file(path) as file:
            content = stream_digest(file)
            picture = decode_picture(file, path)
            brightest = int(picture.convert("L").getextrema()[1]) if is_mask else -1  # type: ignore[arg-type]
            return Checked(content, Size(*picture.size), is_animated(file, path), brightest)
    except DatasetError as error:
        return error


def _state(path: Path) -> State | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _recall(memory: Path | None, states: dict[Path, State], masks: Collection[Path]) -> dict[Path, Checked]:
    """What the memory holds of pictures in their present state. A memory that can't be read is none."""
    if memory is None or accepts_cut_pictures():
        return {}
    known = {}
    try:
        stored = json.loads(memory.read_text(encoding="utf-8"))
        rows = stored["pictures"] if stored["format"] == _FORMAT else {}
        for path, state in states.items():
            row = rows.get(str(path))
            if row is not None and tuple(row[0]) == state and (path not in masks or row[4] >= 0):
                known[path] = Checked(row[1], Size(*row[2]), row[3], row[4])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}
    return known


def _remember(memory: Path, found: dict[Path, Checked], states: dict[Path, State]) -> None:
    """Only what had come to rest: a file written a moment ago may be written again without a sign of it."""
    now = time.time_ns()
    rows = {
        str(path): [states[path], each.digest, each.size, each.animated, each.brightest]
        for path, each in found.items()
        if path in states and now - max(states[path][1:3]) > _SETTLED_NS and _state(path) == states[path]
    }
    write_atomically(memory, json.dumps({"format": _FORMAT, "pictures": rows}).encode())
