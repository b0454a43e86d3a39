"""conditioning_multidataset_sampling random: each turn shows one of a pair's references, with its own prompt.

Such a pair is encoded as several pairs with one reference each. Their entries are then combined into one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from ..config import EncodingConfig
from ..data.pairing import EditPair
from ..rng import stream
from .entry import EncodedEntry


def split_by_reference(pairs: Sequence[EditPair], encoding: EncodingConfig, *, validated: bool) -> list[EditPair]:
    """The pairs to encode, split if a turn shows one reference. A validated pair keeps one, chosen by seed and key."""
    if encoding.conditioning_multidataset_sampling == "combined":
        return list(pairs)
    seen: list[EditPair] = []
    for pair in pairs:
        numbers = range(len(pair.references))
        if validated and numbers:
            generator = stream(encoding.seed, "validation reference", pair.key)
            numbers = (int(torch.randint(len(numbers), (), generator=generator)),)
        seen += [_with_one(pair, number) for number in numbers] or [pair]
    return seen


def _with_one(pair: EditPair, number: int) -> EditPair:
    """The pair with only this reference."""
    return dataclasses.replace(
        pair,
        references=(pair.references[number],),
        digests=(pair.digests[0], pair.digests[number + 1]),
        sizes=(pair.sizes[0], pair.sizes[number + 1]),
        conditioning_types=pair.conditioning_types[number : number + 1],
    )


def entries_of_pairs(entries: Sequence[EncodedEntry]) -> Iterator[EncodedEntry]:
    """Combine the entries of each pair into one. Entries of one pair must be adjacent."""
    for _, group in groupby(entries, key=lambda entry: entry.key):
        first, *others = group
        yield _together((first, *others)) if others else first


def _together(entries: tuple[EncodedEntry, ...]) -> EncodedEntry:
    return dataclasses.replace(
        entries[0],
        references=tuple(key for entry in entries for key in entry.references),
        reference_shapes=tuple(shape for entry in entries for shape in entry.reference_shapes),
        reference_files=tuple(file for entry in entries for file in entry.reference_files),
        differences=tuple(key for entry in entries for key in entry.differences),
        prompts=(),
        empty="",
        prompts_by_reference=tuple(entry.prompts for entry in entries),
        empty_by_reference=tuple(entry.empty for entry in entries if entry.empty),
        preservation=(),
        preservation_by_reference=tuple(entry.preservation for entry in entries if entry.preservation),
    )
