"""Opens weights: one .safetensors file, a folder with one or several of them, or a .gguf file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelFileError
from ..json_text import read_json
from ..text import shown
from .gguf_source import GgufSource
from .safetensors_source import SafetensorsSource
from .stored import WeightSource
from .whole import check_whole

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")  # as diffusers and transformers name a model's parts
_MOST_PARTS = 1000


def open_weights(place: Path, prefixes: Sequence[str] = (), instead: str = "") -> WeightSource:
    """Read the header of a file, or of the files in a folder. No weight is read yet.

    `instead` is a sentence about what to choose, for messages about formats that can't be used.

    If more than a few names begin with one of `prefixes`, that prefix is cut off and all other names are left out: a
    single file may hold several networks.

    Raises:
        ModelFileError: the file is missing, damaged, or in an unsupported format or layout.
        MissingPackageError: a .gguf file, but the package gguf is not installed.
    """
    if place.suffix == ".gguf" and place.is_file():
        check_whole(place)
        return GgufSource(place, prefixes)
    files = _files(place)
    for path in files:
        check_whole(path)
    return SafetensorsSource(place, files, prefixes, instead)


def _files(place: Path) -> list[Path]:
    """The one .safetensors file at `place`, or the parts of a sharded model."""
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ModelFileError(
                f"{place.name} is not a .safetensors or .gguf file. Choose one of these: other formats can run code "
                "when they are loaded."
            )
        if part := _PART.fullmatch(place.name):
            raise ModelFileError(
                f"{place.name} is part {int(part[2])} of {int(part[3])} of a model. Choose the folder with all parts."
            )
        return [place]
    if not place.is_dir():
        raise ModelFileError(f"There is no file or folder {place}. Check the path.")
    for name in ("diffusion_pytorch_model", "model"):
        index = place / f"{name}.safetensors.index.json"
        if index.is_file():
            return _parts(place, index)
        if (place / f"{name}.safetensors").is_file():
            return [place / f"{name}.safetensors"]
    if parts := _parts_without_index(place):
        return parts
    raise ModelFileError(
        f"{place} has no diffusion_pytorch_model.safetensors or model.safetensors, in one file or in parts. Choose "
        "a model folder in diffusers' layout."
    )


def _parts_without_index(folder: Path) -> list[Path]:
    """The parts of a model whose index is missing, which only lists them; empty if there are none."""
    found = {path: _PART.fullmatch(path.name) for path in sorted(folder.glob("*.safetensors"))}
    parts = {path: match for path, match in found.items() if match}
    if not parts:
        return []
    (name, count), *others = {(match[1], int(match[3])) for match in parts.values()}
    missing = sorted(set(range(1, min(count, _MOST_PARTS) + 1)) - {int(match[2]) for match in parts.values()})
    if others or missing:
        which = f"part {missing[0]} of {count}" if missing else f"parts of one model: it has those of {name} and others"
        raise ModelFileError(f"{folder} lacks {which}. Download it.")
    return list(parts)


def _parts(folder: Path, index: Path) -> list[Path]:
    found = read_json(index, finite=False, error=lambda why: ModelFileError(f"{why} Download it again."))
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelFileError(f"{shown(index)} is not a valid index of a model's parts. Download it again.")
    names = sorted(set(files.values()))
    # A name with a path in it is refused too: an index must not point outside its folder.
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{folder} lacks {len(missing)} of {len(names)} parts of the model, such as {missing[0]}. Download them."
        )
    return [folder / name for name in names]
