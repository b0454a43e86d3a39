"""Combine several encoded datasets into one, each with its repeats, probability and noise levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.dataset import check_part
from ..errors import ConfigError, DatasetError
from .encoded import EncodedDataset, check_alike, name_dataset, save_manifest
from .entry import EncodedEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class MixPart:
    """One dataset of a mix. `repeats` is the number of extra turns of every pair per epoch.

    `probability` is the chance of each pair to be drawn in an epoch. With 0 none of them is trained on, but the
    held-out pairs are still used. Pairs with `is_regularisation` are trained towards the base model's own prediction.
    Their held-out pairs are not validated, because they show none of the edits.
    `timestep_sampling_offset` shifts the noise levels of all pairs.
    """

    encoded: EncodedDataset
    repeats: int = 0
    probability: float = 1.0
    is_regularisation: bool = False
    timestep_sampling_offset: float = 0.0

    def __post_init__(self) -> None:
        check_part(self.repeats, self.probability, self.timestep_sampling_offset)


def mix_encoded(parts: Sequence[MixPart], cache_dir: Path, *, validation_only: bool = False) -> EncodedDataset:
    """`plan_mix`, whose manifest is then written.

    Raises:
        ConfigError, DatasetError: as `plan_mix`.
        DiskError: the manifest can't be written.
    """
    mixed = plan_mix(parts, cache_dir, validation_only=validation_only)
    save_manifest(mixed)
    return mixed


def plan_mix(parts: Sequence[MixPart], cache_dir: Path, *, validation_only: bool = False) -> EncodedDataset:
    """A dataset with all training pairs and held-out pairs of the parts. Writes nothing.

    Prefixes the keys of pairs with the part's number, counted from 1. A part may itself be a mix. With
    `validation_only` the mix may have held-out pairs only.

    Raises:
        ConfigError: there is no part, the parts were encoded differently, or a part is in another cache.
        DatasetError: no pair is left to train on.
    """
    _check_alike(parts, cache_dir)
    pairs = tuple(
        _entry(entry, number, part)
        for number, part in enumerate(parts, 1)
        for entry in part.encoded.pairs
        if part.probability > 0
    )
    if not pairs and not validation_only:
        raise DatasetError(
            "The mix has no pair to train on: in every part all pairs are held out or probability is 0. Lower "
            "num_eval_images or raise probability."
        )
    first = parts[0].encoded
    return name_dataset(
        cache_dir,
        flavour=first.flavour,
        preprocessing=first.preprocessing,
        prompt_width=first.prompt_width,
        pairs=pairs,
        validation_pairs=tuple(
            dataclasses.replace(entry, key=_key(number, entry.key))
            for number, part in enumerate(parts, 1)
            if validation_only or not part.is_regularisation
            for entry in part.encoded.validation_pairs
        ),
        left_out=tuple(_key(number, key) for number, part in enumerate(parts, 1) for key in part.encoded.left_out),
    )


def _entry(entry: EncodedEntry, number: int, part: MixPart) -> EncodedEntry:
    """The entry as part of the mix. Multiplies its repeats and probability with those of an inner mix, adds offsets."""
    return dataclasses.replace(
        entry,
        key=_key(number, entry.key),
        repeats=(1 + entry.repeats) * (1 + part.repeats) - 1,
        probability=entry.probability * part.probability,
        is_regularisation=entry.is_regularisation or part.is_regularisation,
        timestep_sampling_offset=entry.timestep_sampling_offset + part.timestep_sampling_offset,
    )


def _key(number: int, key: str) -> str:
    return f"{number}/{key}"


def _check_alike(parts: Sequence[MixPart], cache_dir: Path) -> None:
    if not parts:
        raise ConfigError("There is nothing to mix. Give at least one encoded dataset.")
    first = parts[0].encoded
    for number, part in enumerate(parts, 1):
        check_alike(first, part.encoded, ("Encoded dataset 1", f"number {number}"))
        if part.encoded.cache_dir.resolve() != cache_dir.resolve():
            raise ConfigError(
                f"Encoded dataset {number} is in the cache {str(part.encoded.cache_dir)!r}, but the mix uses "
                f"{str(cache_dir)!r}. Encode it into that cache."
            )
