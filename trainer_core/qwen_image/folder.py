"""Finds a base model's parts: in a folder in diffusers' layout, in single files, or in the embedded demo model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import json_text
from ..config import DEMO_MODEL, ModelConfig
from ..errors import ModelFileError, TrainerError
from ..text import reason_of, shown
from ..written_path import written_path

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Paths of a base model's parts. The three networks are folders in diffusers' layout or single files."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    processor: Path
    scheduler: Path


def model_folder(config: ModelConfig) -> ModelFolder:
    """Find the parts. Reads no weights.

    Raises:
        ModelFileError: a file or folder is missing.
    """
    files = {part: written_path(file, Path()) for part, file in part_files(config).items() if file}
    for part, file in files.items():
        if not file.exists():
            raise ModelFileError(f"{part}_file is {str(file)!r}, which does not exist. Choose an existing file.")
    # With three single files there is no folder: paths below the transformer's file don't exist, so defaults are used.
    whole = len(files) == len(_PARTS)
    root = files["transformer"] if whole else _root(config, [part for part in _PARTS if part not in files])
    tokenizer = Path(config.tokenizer) if config.tokenizer else root / "tokenizer"
    if not config.tokenizer and (config.base == DEMO_MODEL or whole):
        raise ModelFileError(
            f"{'Single files come' if files else 'The demo model comes'} without a tokenizer. Set `tokenizer` to the "
            "folder comfy/text_encoders/qwen25_tokenizer of a ComfyUI installation."
        )
    parts = {part: files.get(part, root / part) for part in _PARTS}
    return ModelFolder(tokenizer=tokenizer, processor=root / "processor", scheduler=root / "scheduler", **parts)


def part_files(config: ModelConfig) -> dict[str, str]:
    """The setting `<part>_file` of each part; empty if the part comes from the base folder."""
    return {part: getattr(config, f"{part}_file") for part in _PARTS}


def _root(config: ModelConfig, parts: list[str]) -> Path:
    """The base folder, after checking that it has `parts`."""
    is_demo = config.base == DEMO_MODEL
    if is_demo and len(parts) < len(_PARTS):
        settings = " and ".join(f"{part}_file" for part in parts)
        lacks = f"{settings} are empty. Set them" if len(parts) > 1 else f"{settings} is empty. Set it"
        raise ModelFileError(
            f"The base model is given by single files, but {lacks} too, or set `base` to a folder in diffusers' layout "
            "that has the other parts."
        )
    root = DEMO_FOLDER if is_demo else written_path(config.base, Path())
    if not root.is_dir():
        raise ModelFileError(
            f"The base model folder {config.base!r} does not exist. Choose a folder in diffusers' layout (with "
            f"transformer, vae and text_encoder in it) or `{DEMO_MODEL}`."
        )
    missing = [part for part in parts if not (root / part / "config.json").is_file()]
    if missing:
        raise ModelFileError(
            f"The base model folder {config.base!r} has no {', '.join(f'{part}/config.json' for part in missing)}. "
            "Choose a complete Qwen-Image-Edit download in diffusers' layout."
        )
    return root


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ModelFileError: the file can't be read, or is not a JSON object.
    """
    values = json_text.read_json(path, finite=False, error=lambda why: ModelFileError(f"{why} Download it again."))
    if not isinstance(values, dict):
        raise ModelFileError(f"{shown(path)} is not a JSON object. Download it again.")
    return values


@contextmanager
def config_errors(path: Path) -> Iterator[None]:
    """Turns errors of a library's network that is made from the configuration in `path` into our own.

    The libraries check no values, so a wrong one raises any kind of error somewhere in a constructor.

    Raises:
        ModelFileError: the network can't be made.
    """
    try:
        yield
    except (TrainerError, ImportError):  # a package that is missing or too old is explained elsewhere
        raise
    except Exception as error:
        raise ModelFileError(f"{shown(path)} has wrong values ({reason_of(error)}). Download it again.") from error


def weights_digest(place: Path) -> str:
    """A digest of the network in a folder or single file. It depends on the content, not on the path or the dates.

    Hashes names, sizes, whole JSON files, and 64 samples of 4 KiB from each weight file, which takes milliseconds for
    16 GB. The samples are enough to tell two downloads of the same size apart.
    """
    hasher = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.glob("*")):
        if path.suffix not in (".json", ".safetensors", ".gguf") or not path.is_file():
            continue
        size = path.stat().st_size
        hasher.update(f"{path.name if path != place else path.suffix}\x00{size}\x00".encode())
        with path.open("rb") as file:
            if path.suffix == ".json" or size <= _SAMPLES * _SAMPLE_BYTES:
                hasher.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.hexdigest()[:16]
