"""Hashes of what pictures show, and the pairs whose hashes are nearly equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_HASH_SIDE = 8
_FLAT = 4.0  # a thumbnail with a smaller standard deviation is too plain to compare
_LEAST_PART = 10  # bits: shorter parts of a hash are equal too often to find anything with
_ROWS = 1024  # hashes compared at a time

Bits: TypeAlias = NDArray[np.bool_]


def shape_bits(picture: Image.Image) -> Bits:
    """Difference hash of 64 bits: whether each cell of a 9 x 8 thumbnail is brighter than the one to its left.

    All False for a plain picture.
    """
    spots = np.asarray(picture.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    if spots.std() < _FLAT:
        return np.zeros(_HASH_SIDE**2, bool)
    return (spots[:, 1:] > spots[:, :-1]).ravel()


def near_duplicates(hashes: Sequence[Bits], most_bits: int) -> dict[int, int]:
    """For each hash that differs in at most `most_bits` from an earlier one, the number of the nearest earlier one.

    Hashes without any bit, of plain pictures, are left out.
    """
    if not hashes:
        return {}
    bits = np.stack(hashes)
    numbers = np.flatnonzero(bits.any(axis=1))
    signs = bits.astype(np.float32) * 2 - 1
    distance = np.full(len(bits), np.inf)
    nearest = np.zeros(len(bits), np.int64)
    for group in _candidates(bits[numbers], most_bits + 1):
        members = numbers[group]
        for start in range(0, len(members), _ROWS):
            rows, earlier = members[start : start + _ROWS], members[: start + _ROWS]
            apart = (bits.shape[1] - signs[rows] @ signs[earlier].T) / 2
            apart[earlier[None] >= rows[:, None]] = np.inf
            best = apart.argmin(axis=1)
            found, which = apart[np.arange(len(rows)), best], earlier[best]
            better = (found < distance[rows]) | ((found == distance[rows]) & (which < nearest[rows]))
            distance[rows[better]], nearest[rows[better]] = found[better], which[better]
    return {int(number): int(nearest[number]) for number in np.flatnonzero(distance <= most_bits)}


def _candidates(bits: Bits, parts: int) -> Iterator[NDArray[np.int64]]:
    """Groups of hashes, in order, that together hold every two hashes which differ in fewer than `parts` bits.

    If two such hashes are cut into `parts` parts, at least one part is equal. So only hashes with an equal part are
    compared.
    """
    if bits.shape[1] // parts < _LEAST_PART:
        yield np.arange(len(bits))
        return
    for part in np.array_split(bits, parts, axis=1):
        _, kinds = np.unique(np.packbits(part, axis=1), axis=0, return_inverse=True)
        order = np.argsort(kinds.ravel(), kind="stable")
        ends = np.flatnonzero(np.diff(kinds.ravel()[order])) + 1
        yield from (group for group in np.split(order, ends) if len(group) > 1)
