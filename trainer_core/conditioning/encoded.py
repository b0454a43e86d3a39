"""An encoded dataset: a manifest that names cache entries. The manifest's own name is its content."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Preprocessing, digest
from ..errors import ConfigError, DatasetError
from ..files import is_whole, read_tensors, write_atomically
from ..qwen_image.flavours import FlavourName
from .cache import entry_path
from .types import EncodedPair, ReferenceFile

FORMAT = 1
EncodeReference = Callable[[ReferenceFile], Tensor]  # to normalised latents [C, H/8, W/8]
EMPTY_CAPTION = -1  # in the place of a caption's number: the pair seen without words


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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EncodedDataset:
    """Pairs to train on and pairs held out, as they lie in the cache. `left_out`: keys of pairs that are too small;
    `changed`: files that changed while encoding, which is told and not kept."""

    manifest: Path
    flavour: FlavourName
    preprocessing: Preprocessing
    prompt_width: int
    pairs: tuple[EncodedEntry, ...]
    validation_pairs: tuple[EncodedEntry, ...]
    left_out: tuple[str, ...] = ()
    changed: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __repr__(self) -> str:
        return (
            f"EncodedDataset({self.manifest.stem}, {self.flavour}, {len(self.pairs)} pairs, "
            f"{len(self.validation_pairs)} held out)"
        )

    @property
    def cache_dir(self) -> Path:
        """The cache that the keys belong to."""
        return self.manifest.parent.parent

    def load(
        self,
        entry: EncodedEntry,
        caption: int = 0,
        reference_set: int = 0,
        *,
        encode_reference: EncodeReference | None = None,
    ) -> EncodedPair:
        """The tensors of a pair under one of its captions, or under EMPTY_CAPTION.

        Raises:
            ConfigError: its references are encoded on the fly, and there is no `encode_reference`.
        """
        entry = entry.seen(reference_set)
        return EncodedPair(
            key=entry.key,
            target_latents=self._tensor("latents", entry.target, entry),
            reference_latents=self._references(entry, encode_reference),
            prompt_embeds=self._tensor("prompt", entry.prompt(caption), entry),
            loss_weights=self._tensor("mask", entry.mask, entry) if entry.mask else None,
        )

    def load_prompt(self, entry: EncodedEntry, key: str) -> Any:
        """Embeddings [L, D] of one of the pair's prompts by its key: a caption, a validation prompt, the negative."""
        return self._tensor("prompt", key, entry)

    def load_pictures(self, entry: EncodedEntry) -> tuple[Any, ...]:
        """The pair's pictures [3, H, W] uint8 as encoded: target, then references."""
        return tuple(self._tensor("picture", key, entry) for key in entry.pictures)

    def _references(self, entry: EncodedEntry, encode_reference: EncodeReference | None) -> tuple[Tensor, ...]:
        if not entry.reference_files:
            return tuple(self._tensor("latents", key, entry) for key in entry.references)
        if encode_reference is None:
            raise ConfigError(
                f"The references of {entry.key!r} are encoded on the fly, which only a training does. Encode the "
                "dataset with reference_latents cached to see them here."
            )
        return tuple(map(encode_reference, entry.reference_files))

    def _tensor(self, kind: str, key: str, entry: EncodedEntry) -> Any:
        path = entry_path(self.cache_dir, kind, key)
        if not is_whole(path):
            raise DatasetError(
                f"The encoded pair {entry.key!r} is missing its {kind} in the cache {self.cache_dir} "
                f"({path.name} is not there or cut short). Encode the dataset again: only what is missing is made."
            )
        return read_tensors(path)[kind]

    def missing(self) -> tuple[str, ...]:
        """Keys of pairs with an entry that is not in the cache."""
        return tuple(entry.key for entry in (*self.pairs, *self.validation_pairs) if not self._is_complete(entry))

    def _is_complete(self, entry: EncodedEntry) -> bool:
        latents = [entry.target] if entry.reference_files else [entry.target, *entry.references]
        prompts = [*entry.prompts, *entry.validation_prompts, entry.negative, entry.empty, *entry.alone_empty]
        prompts += [key for alone in entry.alone for key in alone]
        wanted = [("latents", key) for key in latents] + [("prompt", key) for key in prompts if key]
        wanted += [("picture", key) for key in entry.pictures]
        wanted += [("mask", entry.mask)] if entry.mask else []
        whole = all(is_whole(entry_path(self.cache_dir, kind, key)) for kind, key in wanted)
        return whole and all(Path(file.path).is_file() for file in entry.reference_files)


def save_manifest(cache_dir: Path, **fields: Any) -> EncodedDataset:
    """Write a manifest below `cache_dir` and return the dataset it describes.

    Its name has two parts: the content that is trained on, and what is validated on. A run goes on as long as the
    first is the same. Where files lie is in neither.
    """
    values = {name: _plain(value) for name, value in fields.items() if _is_written(name, value)}
    values["format"] = FORMAT
    validated = values.get("validation_pairs", [])
    trained = {name: value for name, value in values.items() if name != "validation_pairs"}
    trained["pairs"] = [_without_places(row) for row in trained["pairs"]]
    path = cache_dir / "datasets" / f"{digest(trained)}-{digest(validated)[:16]}.json"
    write_atomically(path, _lines(values).encode())
    return EncodedDataset(manifest=path, **fields)


def _lines(values: dict[str, Any]) -> str:
    """JSON with a line for each pair: to be read by people, and quickly written."""

    def shown(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value, ensure_ascii=False)
        return "[\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n]"

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {shown(value)}" for name, value in values.items()) + "\n}\n"


def _plain(value: Any) -> Any:
    return [each if isinstance(each, str) else _row(each) for each in value] if isinstance(value, tuple) else value


def _row(entry: EncodedEntry) -> dict[str, Any]:
    """Its fields but for those a later version added and this entry does not use, so that old names stay."""
    return {name: item for name in EncodedEntry.__slots__ if _is_written(name, item := getattr(entry, name))}


def _without_places(row: dict[str, Any]) -> dict[str, Any]:
    files = row.get("reference_files", ())
    return {**row, "reference_files": [each[1:] for each in files]} if files else row


_ADDED: dict[str, object] = {"empty": "", "mask": "", "left_out": (), "repeats": 0, "probability": 1.0}
_ADDED |= {"validation_captions": (), "validation_prompts": ()}
_ADDED |= {"alone": (), "alone_empty": (), "reference_files": ()}


def _is_written(name: str, value: object) -> bool:
    return name not in _ADDED or value != _ADDED[name]


def load_encoded(manifest: Path) -> EncodedDataset:
    """Read a manifest.

    Raises:
        DatasetError: it is missing, damaged, or of another version.
    """
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"Can't read the encoded dataset {manifest}: {error}. Encode the dataset again.") from error
    if values.pop("format", None) != FORMAT:
        raise DatasetError(f"The encoded dataset {manifest} is of another version. Encode the dataset again.")
    for name in ("pairs", "validation_pairs"):
        values[name] = tuple(map(_entry, values[name]))
    return EncodedDataset(manifest=manifest, **{**values, "left_out": tuple(values.get("left_out", ()))})


def _entry(row: dict[str, Any]) -> EncodedEntry:
    values = {name: _tuples(item) for name, item in row.items()}
    files = tuple(ReferenceFile(*each) for each in values.get("reference_files", ()))
    return EncodedEntry(**{**values, "reference_files": files})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
