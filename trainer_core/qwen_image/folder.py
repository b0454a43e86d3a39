"""Where a base model's parts lie: a folder in diffusers' layout, or the embedded demo model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..config import DEMO_MODEL, ModelConfig
from ..errors import ModelFileError

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The folders of a base model's parts."""

    root: Path
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    processor: Path
    scheduler: Path


def model_folder(config: ModelConfig) -> ModelFolder:
    """Find the parts, without reading weights.

    Raises:
        ModelFileError: not a folder in diffusers' layout; the message lists what is missing.
    """
    root = DEMO_FOLDER if config.base == DEMO_MODEL else Path(config.base).expanduser()
    if not root.is_dir():
        raise ModelFileError(
            f"The base model folder {config.base!r} does not exist. Allowed is a folder in diffusers' layout "
            f"(with transformer, vae and text_encoder in it), or `{DEMO_MODEL}`."
        )
    missing = [part for part in ("transformer", "vae", "text_encoder") if not (root / part / "config.json").is_file()]
    if missing:
        raise ModelFileError(
            f"The base model folder {config.base!r} has no {', '.join(f'{part}/config.json' for part in missing)}. "
            "It should be a whole Qwen-Image-Edit download in diffusers' layout."
        )
    tokenizer = Path(config.tokenizer) if config.tokenizer else root / "tokenizer"
    if config.base == DEMO_MODEL and not config.tokenizer:
        raise ModelFileError(
            "The demo model has no tokenizer of its own. Set `tokenizer` to the folder "
            "comfy/text_encoders/qwen25_tokenizer of a ComfyUI installation."
        )
    parts = {part: root / part for part in ("transformer", "vae", "text_encoder", "processor", "scheduler")}
    return ModelFolder(root=root, tokenizer=tokenizer, **parts)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ModelFileError: missing, or not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ModelFileError(f"Can't read {path}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"{path} is not a JSON object ({error}). Download it again.") from error


def weights_digest(folder: Path) -> str:
    """A short name for the network in `folder`: equal for equal files, whatever their place or time.

    Reads names, sizes, JSON files whole, and 64 samples of 4 KiB of each weight file, so it takes milliseconds on
    16 GB; two different downloads of one size differ in the samples.
    """
    hasher = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".safetensors") or not path.is_file():
            continue
        size = path.stat().st_size
        hasher.update(f"{path.name}\x00{size}\x00".encode())
        with path.open("rb") as file:
            if path.suffix == ".json" or size <= _SAMPLES * _SAMPLE_BYTES:
                hasher.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.hexdigest()[:16]
