"""Small pictures for pages: made once, kept on disk by the file's state, and the oldest ones deleted."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from contextlib import suppress
from pathlib import Path

from ..data.images import open_reduced
from ..files import remove, write_atomically
from .reading import version_of

EDGES = (128, 256, 512, 1024)
_KEPT_BYTES = 300_000_000
_EVERY = 500  # new ones, after which the folder is tidied
_QUALITY = 85


class Thumbnails:
    """Small pictures in one folder, which holds nothing else."""

    def __init__(self, folder: Path, kept_bytes: int = _KEPT_BYTES) -> None:
        self._folder, self._kept_bytes = folder, kept_bytes
        self._new = 0
        self._lock = threading.Lock()

    def get(self, path: Path, edge: int) -> bytes:
        """The picture as JPEG, upright and in sRGB. Its longer side is `edge`, rounded up to one of EDGES, or shorter.

        Raises:
            DatasetError: the picture can't be read.
        """
        edge = next((each for each in EDGES if each >= edge), EDGES[-1])
        name = hashlib.sha256(f"{path}\n{version_of(path)}\n{edge}".encode("utf-8", "surrogatepass")).hexdigest()[:40]
        kept = self._folder / name[:2] / f"{name}.jpg"
        with suppress(OSError):
            data = kept.read_bytes()
            os.utime(kept)
            return data
        data = _small(path, edge)
        with suppress(OSError):  # a full disk only makes pages slower
            write_atomically(kept, data)
        self._tidy()
        return data

    def _tidy(self) -> None:
        """Delete those that were used least recently, if there are too many."""
        with self._lock:
            self._new += 1
            if self._new % _EVERY:
                return
        states: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*/*"):
            with suppress(OSError):
                state = path.stat()
                states.append((state.st_mtime, state.st_size, path))
        left = sum(size for _, size, _ in states)
        for _, size, path in sorted(states):
            if left <= self._kept_bytes:
                return
            remove(path)
            left -= size


def _small(path: Path, edge: int) -> bytes:
    picture = open_reduced(path, edge, convert=True)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=_QUALITY)
    return data.getvalue()
