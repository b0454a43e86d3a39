"""One pair of an encoded dataset: the keys of its cache entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .types import ReferenceFile

EMPTY_CAPTION = -1  # used instead of a caption's number: the pair without a caption
_ALWAYS_WRITTEN = ("negative", "pictures")
_ROW_NAMES = {"prompts_by_reference": "alone", "empty_by_reference": "alone_empty"}  # where JSON uses another name
_FIELD_NAMES = {row: field for field, row in _ROW_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedEntry:
    """Cache keys and shapes of one pair.

    `target`, `references`, `prompts` (one per caption), `negative`, `empty` (the empty prompt), `mask` and `pictures`
    (target first, then references) are cache keys; an empty string means that there is no entry. `shape` is the shape
    of the target's latents [C, H, W], `reference_shapes` are those of the references.

    Only held-out pairs have `negative`, `pictures`, and `validation_captions` with their `validation_prompts`, which
    are sampled in addition to the captions. Only trained pairs have `preservation`, the prompts of other edits that
    training keeps. A mix sets `repeats` (extra turns per epoch), `probability` (of being drawn in an epoch),
    `is_regularisation` (the pair is trained towards the base model's own prediction) and `timestep_sampling_offset` (of
    its noise levels). A pair that shows one reference at a time has `prompts_by_reference`, `empty_by_reference` and
    `preservation_by_reference` instead of `prompts`, `empty` and `preservation`. A pair whose references are encoded on
    the fly has `reference_files`; its `references` are then not in the cache. `differences` (pixels of target and
    reference) are of the first reference, or of each one if the pair shows one at a time.
    """

    key: str
    captions: tuple[str, ...]
    target: str
    references: tuple[str, ...]
    prompts: tuple[str, ...]
    shape: tuple[int, ...]
    reference_shapes: tuple[tuple[int, ...], ...]
    negative: str = ""
    pictures: tuple[str, ...] = ()
    empty: str = ""
    mask: str = ""
    repeats: int = 0
    probability: float = 1.0
    validation_captions: tuple[str, ...] = ()
    validation_prompts: tuple[str, ...] = ()
    prompts_by_reference: tuple[tuple[str, ...], ...] = ()
    empty_by_reference: tuple[str, ...] = ()
    reference_files: tuple[ReferenceFile, ...] = ()
    preservation: tuple[str, ...] = ()
    preservation_by_reference: tuple[tuple[str, ...], ...] = ()
    is_regularisation: bool = False
    timestep_sampling_offset: float = 0.0
    differences: tuple[str, ...] = ()

    def seen(self, reference_set: int) -> EncodedEntry:
        """The pair as one turn sees it: unchanged, or with only reference number `reference_set` and its prompts."""
        if not self.prompts_by_reference:
            return self
        one = slice(reference_set, reference_set + 1)
        return dataclasses.replace(
            self,
            references=self.references[one],
            reference_shapes=self.reference_shapes[one],
            reference_files=self.reference_files[one],
            differences=self.differences[one],
            prompts=self.prompts_by_reference[reference_set],
            empty=self.empty_by_reference[reference_set] if self.empty_by_reference else "",
            preservation=self.preservation_by_reference[reference_set] if self.preservation_by_reference else (),
            prompts_by_reference=(),
            empty_by_reference=(),
            preservation_by_reference=(),
        )

    @property
    def has_empty(self) -> bool:
        """Whether the empty prompt was encoded."""
        return bool(self.empty or self.empty_by_reference)

    @property
    def num_preservation(self) -> int:
        """Number of prompts that training can keep with this pair's references."""
        return len(self.preservation_by_reference[0] if self.preservation_by_reference else self.preservation)

    def prompt(self, caption: int) -> str:
        """Cache key of the prompt of caption number `caption`, or of EMPTY_CAPTION."""
        return self.empty if caption == EMPTY_CAPTION else self.prompts[caption]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all latents: the target's, then the references'."""
        return (self.shape, *self.reference_shapes)

    def cached(self) -> Iterator[tuple[str, str]]:
        """Kind and key of every entry that must be in the cache."""
        latents = (self.target,) if self.reference_files else (self.target, *self.references)
        by_reference = (key for prompts in self.prompts_by_reference for key in prompts)
        prompts = (*self.prompts, *self.validation_prompts, *by_reference, self.negative)
        prompts += (self.empty, *self.empty_by_reference, *self.preservation)
        prompts += tuple(key for keys in self.preservation_by_reference for key in keys)
        kinds = {"latents": latents, "prompt": prompts, "picture": self.pictures, "mask": (self.mask,)}
        kinds["difference"] = self.differences
        return ((kind, key) for kind, keys in kinds.items() for key in keys if key)

    def as_row(self) -> dict[str, Any]:
        """The entry for JSON. Omits unused fields that later versions added, so that datasets keep their names."""
        return {
            _ROW_NAMES.get(name, name): item
            for name in EncodedEntry.__slots__
            if _is_written(name, item := getattr(self, name))
        }

    @staticmethod
    def from_row(row: dict[str, Any]) -> EncodedEntry:
        """The entry that `as_row` wrote."""
        values = {_FIELD_NAMES.get(name, name): _tuples(item) for name, item in row.items()}
        values["reference_files"] = tuple(ReferenceFile(*each) for each in values.get("reference_files", ()))
        return EncodedEntry(**values)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EncodedEntry)}


def without_places(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an entry without the paths of its reference files."""
    files = row.get("reference_files")
    return {**row, "reference_files": [file[1:] for file in files]} if files else dict(row)


def _is_written(name: str, value: object) -> bool:
    return name in _ALWAYS_WRITTEN or value != _DEFAULTS[name]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def entry_path(cache_dir: Path, kind: str, key: str) -> Path:
    """Path of an entry. Entries are spread over 256 folders to keep each folder small."""
    return cache_dir.joinpath(kind, key[:2], f"{key}.safetensors")
