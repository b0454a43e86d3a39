"""Watches the datasets that this process encoded, so that a queued graph encodes again what vanished from the cache.

ComfyUI reuses a node's output while the node's fingerprint stays the same, but the user can delete the cache files
behind that output. The fingerprint therefore includes a counter that grows whenever files are found missing.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ..trainer_core.conditioning.encoded import EncodedDataset

_MAX_DATASETS = 16  # the latest ones; a graph has only a few
_CHECK_EVERY_SECONDS = 1.0  # several nodes of one graph ask in a row, and checking 10,000 pairs takes about a second


class CacheWatch:
    """The latest encoded datasets, and a counter of losses."""

    def __init__(self) -> None:
        self._watched: dict[Path, EncodedDataset] = {}  # by manifest
        self._checked_at: dict[Path, float] = {}  # seconds of the monotonic clock
        self._losses = 0

    def watch(self, encoded: EncodedDataset) -> EncodedDataset:
        """Watch a dataset from now on. Returns the dataset."""
        self._forget(encoded.manifest)
        self._watched[encoded.manifest] = encoded
        for manifest in list(self._watched)[:-_MAX_DATASETS]:
            self._forget(manifest)
        return encoded

    def losses(self) -> str:
        """The counter as text. It grows when a watched dataset lost its manifest or an entry; that one is dropped."""
        lost = [encoded for encoded in self._watched.values() if not self._is_complete(encoded)]
        for encoded in lost:
            self._forget(encoded.manifest)
        self._losses += bool(lost)
        return str(self._losses)

    def _is_complete(self, encoded: EncodedDataset) -> bool:
        now, manifest = monotonic(), encoded.manifest
        if now - self._checked_at.get(manifest, float("-inf")) < _CHECK_EVERY_SECONDS:
            return True
        self._checked_at[manifest] = now
        return manifest.is_file() and not encoded.missing()

    def _forget(self, manifest: Path) -> None:
        self._watched.pop(manifest, None)
        self._checked_at.pop(manifest, None)


CACHE_WATCH = CacheWatch()
