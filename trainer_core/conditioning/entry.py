"""One pair of an encoded dataset: the names of all that the cache has of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .types import ReferenceFile

EMPTY_CAPTION = -1  # in the place of a caption's number: the pair seen without words
_ALWAYS_WRITTEN = ("negative", "pictures")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedEntry:
    """Cache keys of one pair. `shape` is the target's latents [C, H, W], `reference_shapes` the references'.
    `negative` and `pictures` (target first, then references) are there for held-out pairs only, `empty` (the prompt
    without words) and `mask` (the loss's weights) where they were asked for. `repeats` (extra turns an epoch) and
    `probability` (that an epoch draws the pair) are a mix's. `validation_captions` and their `validation_prompts` are
    drawn of a held-out pair besides its own. Where a turn sees one reference alone, `alone` has the prompts by
    reference and `alone_empty` the empty ones, instead of `prompts` and `empty`. `reference_files` are there where
    references are encoded on the fly: then their keys are not in the cache."""

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
    alone: tuple[tuple[str, ...], ...] = ()
    alone_empty: tuple[str, ...] = ()
    reference_files: tuple[ReferenceFile, ...] = ()

    def seen(self, reference_set: int) -> EncodedEntry:
        """The pair in a turn: as it is, or with the one reference of this number and the prompts encoded with it."""
        if not self.alone:
            return self
        one = slice(reference_set, reference_set + 1)
        return dataclasses.replace(
            self,
            references=self.references[one],
            reference_shapes=self.reference_shapes[one],
            reference_files=self.reference_files[one],
            prompts=self.alone[reference_set],
            empty=self.alone_empty[reference_set] if self.alone_empty else "",
            alone=(),
            alone_empty=(),
        )

    @property
    def has_empty(self) -> bool:
        """Whether the prompt without words was encoded."""
        return bool(self.empty or self.alone_empty)

    def prompt(self, caption: int) -> str:
        """Key of the prompt of caption number `caption`, or of EMPTY_CAPTION."""
        return self.empty if caption == EMPTY_CAPTION else self.prompts[caption]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What must be equal for pairs to share a batch."""
        return (self.shape, *self.reference_shapes)

    def cached(self) -> Iterator[tuple[str, str]]:
        """Kind and key of everything that the cache has to hold."""
        latents = (self.target,) if self.reference_files else (self.target, *self.references)
        alone = (key for prompts in self.alone for key in prompts)
        prompts = (*self.prompts, *self.validation_prompts, *alone, self.negative, self.empty, *self.alone_empty)
        kinds = {"latents": latents, "prompt": prompts, "picture": self.pictures, "mask": (self.mask,)}
        return ((kind, key) for kind, keys in kinds.items() for key in keys if key)

    def as_row(self, *, with_places: bool = True) -> dict[str, Any]:
        """For JSON: its fields but for those a later version added and this pair does not use, so that names of old
        datasets stay; without places, where the files of references lie is left out."""
        row = {name: item for name in EncodedEntry.__slots__ if _is_written(name, item := getattr(self, name))}
        if not with_places and self.reference_files:
            row["reference_files"] = [file[1:] for file in self.reference_files]
        return row

    @staticmethod
    def from_row(row: dict[str, Any]) -> EncodedEntry:
        """What `as_row` wrote, places and all."""
        values = {name: _tuples(item) for name, item in row.items()}
        files = tuple(ReferenceFile(*each) for each in values.get("reference_files", ()))
        return EncodedEntry(**{**values, "reference_files": files})


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EncodedEntry)}


def _is_written(name: str, value: object) -> bool:
    return name in _ALWAYS_WRITTEN or value != _DEFAULTS[name]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def entry_path(cache_dir: Path, kind: str, key: str) -> Path:
    """Where an entry lies: spread over 256 folders, so that 100,000 entries stay quick to look up."""
    return cache_dir.joinpath(kind, key[:2], f"{key}.safetensors")
