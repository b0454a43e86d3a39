"""An encoded dataset: a manifest that lists cache entries. The manifest's file name is a digest of its content."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import FlavourName, Preprocessing, digest
from ..disk import disk_errors
from ..errors import ConfigError, DamagedFileError, DatasetError
from ..files import is_whole, read_tensors, set_aside, write_atomically
from ..json_text import read_json
from ..qwen_image.flavours import title_of
from .entry import EncodedEntry, entry_path, without_places
from .types import EncodedPair, ReferenceFile

FORMAT = 1
_DIGEST = re.compile("[0-9a-f]{32}")
_OWN_NAME = re.compile("[0-9a-f]{32}-[0-9a-f]{16}")  # not a copy that the user has given another name
_MAX_MANIFEST_BYTES = 1 << 30
_AGAIN = "Encode the dataset again with the same graph or command; only missing entries are encoded."
EncodeReference = Callable[[ReferenceFile], Tensor]  # returns normalised latents [C, H/8, W/8]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EncodedDataset:
    """The training pairs and held-out pairs in the cache.

    `left_out` are the keys of pairs that are too small. `changed` are the files that changed while encoding; they are
    reported, but not saved in the manifest.
    """

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
        """The cache folder with the entries."""
        return self.manifest.parent.parent

    def load(
        self,
        entry: EncodedEntry,
        caption: int = 0,
        reference_set: int = 0,
        *,
        preserves: bool = False,
        encode_reference: EncodeReference | None = None,
    ) -> EncodedPair:
        """The tensors of a pair with one of its captions or with EMPTY_CAPTION.

        With `preserves`, `caption` is the number of one of its preservation prompts. The target is then the first
        reference, as if nothing had been edited, or the target if their sizes differ, and it has no mask.

        Raises:
            ConfigError: its references are encoded on the fly, and `encode_reference` is None.
            DatasetError: an entry is missing, can't be read, or is damaged. A damaged one is renamed, so that it is
                encoded again.
        """
        entry = entry.seen(reference_set)
        references = self._references(entry, encode_reference)
        unedited = preserves and entry.reference_shapes[:1] == (entry.shape,)
        return EncodedPair(
            key=entry.key,
            target_latents=references[0] if unedited else self._tensor("latents", entry.target, entry),
            reference_latents=references,
            prompt_embeds=self._tensor(
                "prompt", entry.preservation[caption] if preserves else entry.prompt(caption), entry
            ),
            loss_weights=self._tensor("mask", entry.mask, entry) if entry.mask and not preserves else None,
            timestep_sampling_offset=entry.timestep_sampling_offset,
            difference=self._tensor("difference", entry.differences[0], entry) if entry.differences else None,
        )

    def load_prompt(self, entry: EncodedEntry, key: str) -> Any:
        """Embeddings [L, D] of one of the pair's prompts by cache key: a caption, validation or negative prompt.

        Raises:
            DatasetError: as `load`.
        """
        return self._tensor("prompt", key, entry)

    def prompt_tokens(self, key: str) -> int:
        """Length L of a prompt's embeddings by its cache key, from the file's header.

        Raises:
            DatasetError: the entry is missing, can't be read, or is damaged.
        """
        path = entry_path(self.cache_dir, "prompt", key)
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                return int(file.get_slice("prompt").get_shape()[0])
        except (OSError, SafetensorError, IndexError) as error:
            raise self._unusable("A prompt", path, error) from error

    def load_pictures(self, entry: EncodedEntry) -> tuple[Any, ...]:
        """The pictures of a validated pair [3, H, W], uint8, cropped and resized as encoded: target, then references.

        Raises:
            DatasetError: as `load`.
        """
        return tuple(self._tensor("picture", key, entry) for key in entry.pictures)

    def _references(self, entry: EncodedEntry, encode_reference: EncodeReference | None) -> tuple[Tensor, ...]:
        if not entry.reference_files:
            return tuple(self._tensor("latents", key, entry) for key in entry.references)
        if encode_reference is None:
            raise ConfigError(
                f"The reference latents of {entry.key!r} were not stored (reference_latents is on_the_fly), so "
                "only training can use them. Set reference_latents to cached and encode again."
            )
        return tuple(map(encode_reference, entry.reference_files))

    def _tensor(self, kind: str, key: str, entry: EncodedEntry) -> Any:
        path = entry_path(self.cache_dir, kind, key)
        if not is_whole(path):
            raise DatasetError(
                f"The encoded pair {entry.key!r} has no {kind} in the cache {self.cache_dir} ({path.name} is missing "
                f"or truncated). {_AGAIN}"
            )
        try:
            return read_tensors(path)[kind]
        except (OSError, DamagedFileError, KeyError) as error:
            raise self._unusable(f"The {kind} of the pair {entry.key!r}", path, error) from error

    def _unusable(self, what: str, path: Path, error: Exception) -> DatasetError:
        """The error to raise for an entry that can't be used. Renames the entry if its content is damaged."""
        place = f"{what} in the cache {self.cache_dir}"
        name = path.relative_to(self.cache_dir)
        if isinstance(error, OSError):  # says nothing about the content
            reason = error.strerror or "no such file, or no permission to read it"
            return DatasetError(
                f"{place} can't be read ({name}: {reason}). Check its permissions and the disk. {_AGAIN}"
            )
        aside = set_aside(path)
        done = f"It was renamed to {aside.name}." if aside else "It can't be renamed, so delete it."
        return DatasetError(f"{place} can't be used, because {name} is damaged. {done} {_AGAIN}")

    def trained_too(self, validated: EncodedDataset) -> int:
        """How many pairs that `validated` validates have a target that this dataset trains on, at the same size."""
        targets = {entry.target for entry in self.pairs if entry.probability > 0}
        return sum(entry.target in targets for entry in validated.validation_pairs)

    def missing(self) -> tuple[str, ...]:
        """Keys of the pairs that lack a cache entry or a reference file."""
        return tuple(entry.key for entry in (*self.pairs, *self.validation_pairs) if not self._is_complete(entry))

    def _is_complete(self, entry: EncodedEntry) -> bool:
        cached = (entry_path(self.cache_dir, kind, key) for kind, key in entry.cached())
        return all(map(is_whole, cached)) and all(Path(file.path).is_file() for file in entry.reference_files)


def check_alike(first: EncodedDataset, other: EncodedDataset, names: tuple[str, str]) -> None:
    """Check that two datasets can be used in one run. `names` are their names in the message.

    Raises:
        ConfigError: the flavour, preprocessing or prompt width differs.
    """
    for name in ("flavour", "preprocessing", "prompt_width"):
        wanted, found = getattr(first, name), getattr(other, name)
        if wanted != found:
            raise ConfigError(
                f"{names[0]} has {name} {title_of(str(wanted))}, but {names[1]} has {title_of(str(found))}. "
                "Encode both with the same model and preprocessing."
            )


def name_dataset(cache_dir: Path, **fields: Any) -> EncodedDataset:
    """The dataset with these fields and the path of its manifest below `cache_dir`. Writes nothing.

    The file name has two digests: of the training pairs and of the held-out pairs. A run can resume as long as the
    first stays equal, so it must not depend on where files are stored.
    """
    encoded = EncodedDataset(manifest=cache_dir / "datasets" / "unnamed", **fields)
    name = f"{_name_of(_as_json(encoded))}.json"
    return dataclasses.replace(encoded, manifest=encoded.manifest.with_name(name))


def save_manifest(encoded: EncodedDataset) -> None:
    """Write the manifest, unless the file has this content already, so that a complete cache may be read-only.

    Raises:
        DiskError: the file can't be written.
    """
    content = _lines(_as_json(encoded)).encode()
    with disk_errors(encoded.manifest):
        if encoded.manifest.is_file() and encoded.manifest.read_bytes() == content:
            return
    write_atomically(encoded.manifest, content)


def _as_json(encoded: EncodedDataset) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: getattr(encoded, name) for name in ("flavour", "preprocessing", "prompt_width", "left_out")
    }
    if not encoded.left_out:
        del values["left_out"]  # datasets encoded before this field existed keep their names
    values |= {"format": FORMAT, "pairs": [entry.as_row() for entry in encoded.pairs]}
    return {**values, "validation_pairs": [entry.as_row() for entry in encoded.validation_pairs]}


def trained_values(encoded: EncodedDataset) -> dict[str, Any]:
    """All that training sees of a dataset, as JSON values without paths."""
    names = ("flavour", "preprocessing", "prompt_width", "left_out")
    pairs = [without_places(entry.as_row()) for entry in encoded.pairs]
    return json.loads(json.dumps({**{name: getattr(encoded, name) for name in names}, "pairs": pairs}))


def find_manifest(cache_dir: Path, trained: str) -> Path | None:
    """A manifest whose training pairs have this digest; None if the cache has none."""
    return next((cache_dir / "datasets").glob(f"{trained}-*.json"), None) if _DIGEST.fullmatch(trained) else None


def _name_of(values: dict[str, Any]) -> str:
    """The name of a manifest with these values."""
    values = dict(values)
    held_out = values.pop("validation_pairs")
    pairs = [without_places(row) for row in values.pop("pairs")]
    return f"{digest({**values, 'pairs': pairs})}-{digest(held_out)[:16]}"


def _lines(values: dict[str, Any]) -> str:
    """JSON with one line per pair, which is readable and fast to write."""

    def shown(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value, ensure_ascii=False)
        return "[\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n]"

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {shown(value)}" for name, value in values.items()) + "\n}\n"


def load_encoded(manifest: Path) -> EncodedDataset:
    """Read a manifest.

    Raises:
        DatasetError: the manifest is missing or damaged, or has another format version.
    """
    again = "Encode the dataset again."

    def unreadable(problem: str) -> DatasetError:
        return DatasetError(f"The encoded dataset can't be used. {problem} {again}")

    values = read_json(manifest, finite=False, max_bytes=_MAX_MANIFEST_BYTES, error=unreadable)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DatasetError(f"The encoded dataset {manifest} has a different format version. {again}")
    try:
        if _OWN_NAME.fullmatch(manifest.stem) and manifest.stem != _name_of(values):
            raise DatasetError(f"The encoded dataset {manifest} was changed after it was written. {again}")
        return _from_values(manifest, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"The encoded dataset {manifest} is damaged: {error}. {again}") from error


def _from_values(manifest: Path, values: dict[str, Any]) -> EncodedDataset:
    rows = {name: tuple(map(EncodedEntry.from_row, values[name])) for name in ("pairs", "validation_pairs")}
    left_out = tuple(values.get("left_out", ()))
    others = {name: value for name, value in values.items() if name not in ("format", "left_out", *rows)}
    return EncodedDataset(manifest=manifest, left_out=left_out, **rows, **others)
