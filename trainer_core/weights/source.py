"""Where weights come from: one .safetensors file, a folder with one or several, or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelFileError
from .gguf_source import GgufSource
from .safetensors_source import SafetensorsSource
from .stored import WeightSource


def open_weights(place: Path, prefixes: Sequence[str] = ()) -> WeightSource:
    """Look into a file or folder; no weight is read yet.

    `prefixes` are those a file may have before all names; names without it are then left out.

    Raises:
        ModelFileError: missing, damaged, of another format, or in a layout that is not known.
        MissingPackageError: a .gguf file, without the package that reads it.
    """
    if place.suffix == ".gguf":
        return GgufSource(place, prefixes)
    return SafetensorsSource(place, _files(place), prefixes)


def _files(place: Path) -> list[Path]:
    """The .safetensors files of a place, whole ones and parts."""
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ModelFileError(
                f"{place.name} is a {place.suffix or 'nameless'} file. Allowed are .safetensors and .gguf files: other "
                "formats can hold code."
            )
        return [place]
    if not place.is_dir():
        raise ModelFileError(f"There is no file or folder {place}.")
    for name in ("diffusion_pytorch_model", "model"):
        index = place / f"{name}.safetensors.index.json"
        if index.is_file():
            return _parts(place, index)
        if (place / f"{name}.safetensors").is_file():
            return [place / f"{name}.safetensors"]
    raise ModelFileError(
        f"{place} holds no diffusion_pytorch_model.safetensors or model.safetensors, whole or in parts."
    )


def _parts(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{index} is not a list of a model's parts ({error}). Download it again.") from error
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{folder} lacks {len(missing)} of {len(names)} parts, among them {missing[0]}. Download them."
        )
    return [folder / name for name in names]
