"""Datasets that were encoded in this process, so that a queued graph encodes again what has vanished since.

ComfyUI keeps what a node gave as long as its fingerprint stays, and the entries behind it lie on disk, where anybody
may remove them. The fingerprint is a count of losses, which never takes an old value again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ..trainer_core.conditioning.encoded import EncodedDataset

_MOST = 16  # datasets that are looked after, the latest ones: a graph has a few
_LOOK_EVERY_SECONDS = 1.0  # the nodes of one queued graph ask one after the other, and 10,000 pairs take about a second


class EncodedHere:
    """The latest datasets, and how often one was found to have lost something."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[Path, EncodedDataset] = {}
        self._whole_at: dict[Path, float] = {}  # seconds of the clock
        self._losses = 0

    def note(self, encoded: EncodedDataset) -> EncodedDataset:
        """Look after a dataset from now on; it is given back."""
        self._forget(encoded.manifest)
        self._kept[encoded.manifest] = encoded
        for manifest in list(self._kept)[:-_MOST]:
            self._forget(manifest)
        return encoded

    def losses(self) -> str:
        """Another text than all before once a dataset has lost its manifest or an entry; that one is forgotten."""
        lost = [encoded for encoded in self._kept.values() if not self._is_whole(encoded)]
        for encoded in lost:
            self._forget(encoded.manifest)
        self._losses += bool(lost)
        return str(self._losses)

    def _is_whole(self, encoded: EncodedDataset) -> bool:
        now, manifest = self._clock(), encoded.manifest
        if now - self._whole_at.get(manifest, float("-inf")) < _LOOK_EVERY_SECONDS:
            return True
        self._whole_at[manifest] = now
        return manifest.is_file() and not encoded.missing()

    def _forget(self, manifest: Path) -> None:
        self._kept.pop(manifest, None)
        self._whole_at.pop(manifest, None)


ENCODED_HERE = EncodedHere()
