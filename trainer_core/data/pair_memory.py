"""What was measured of each pair, kept on disk by the content of its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import PairCheckConfig, digest, to_json
from .duplicates import Bits
from .kept import kept_file, read_kept, write_kept
from .pairing import EditDataset, EditPair

_FORMAT = 3  # raise it when the measurements change


class Measured(NamedTuple):
    """A pair's findings (kind and text), the shift of each measured reference by its number, and its hashes."""

    findings: tuple[tuple[Any, str], ...]
    shifts: dict[int, tuple[float, float]]
    bits: Bits


def memory_file(checked_dir: Path, dataset: EditDataset) -> Path:
    """The file that keeps the measurements of the pairs in a dataset's folders."""
    return kept_file(checked_dir, (dataset.target_dir, *dataset.reference_dirs), "pairs-")


def memory_key(pair: EditPair, config: PairCheckConfig) -> str:
    """Changes with anything that a pair's measurement depends on: its pictures and the settings."""
    return digest([_FORMAT, pair.digests, pair.conditioning_types, to_json(config)])


def recall(file: Path | None, keys: Iterable[str]) -> dict[str, Measured]:
    """The stored measurements with these keys. A file that is missing or can't be read counts as empty."""
    return read_kept(file, lambda rows: {key: _from_json(rows[key]) for key in keys if key in rows})


def remember(file: Path, measured: Mapping[str, Measured]) -> None:
    """Store measurements by their keys. Only warns if the disk is full or read-only."""
    rows = {
        key: [each.findings, [[n, *shift] for n, shift in each.shifts.items()], np.packbits(each.bits).tobytes().hex()]
        for key, each in measured.items()
    }
    write_kept(file, rows)


def _from_json(row: Any) -> Measured:
    findings, shifts, bits = row
    return Measured(
        tuple((str(kind), str(text)) for kind, text in findings),
        {int(number): (float(right), float(down)) for number, right, down in shifts},
        np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8)).astype(bool),
    )
