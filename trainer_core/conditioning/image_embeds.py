"""conditioning_image_embeds: cached visual tokens of references, from Qwen2.5-VL's vision tower, for all captions.

Each named cache is a folder below `conditioning_image_embeds` in the cache folder. Entries are keyed by content, so
several datasets can share one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import EncodingConfig, digest
from ..disk import disk_errors
from ..errors import ConfigError, DamagedFileError
from ..files import is_whole, read_tensors
from ..qwen_image.text_encoder import VisualTokens
from ..settings import did_you_mean, is_plain_name
from .encoders import PromptEncoder
from .entry import entry_path
from .pictures import View

_LOG = logging.getLogger(__name__)
FOLDER = "conditioning_image_embeds"


@dataclass(frozen=True, slots=True)
class ImageEmbeds:
    """A named cache of visual tokens for one text encoder. It stores nothing if the encoder has no `visual_digest`."""

    cache_dir: Path
    name: str
    visual_digest: str

    def key(self, content: str, view: View) -> str:
        """Cache key of a picture, from its file's SHA-256 and its view; empty if tokens can't be cached."""
        return digest(["visual tokens", self.visual_digest, content, view.as_json()]) if self.visual_digest else ""

    def find(self, key: str) -> VisualTokens | None:
        """The cached tokens of this key; None if they are missing or damaged."""
        if not self.has(key):
            return None
        try:
            tensors = read_tensors(self.path(key))
            return VisualTokens(tensors["tokens"], tensors["grid"])
        except (OSError, DamagedFileError, KeyError):
            _LOG.warning("The visual tokens in %s are damaged. They are encoded again.", self.path(key))
            return None

    def has(self, key: str) -> bool:
        """Whether the tokens of this key are cached."""
        return bool(key) and is_whole(self.path(key))

    def create(self) -> None:
        """Make the folder, so that its name is known from now on.

        Raises:
            DiskError: the folder can't be made.
        """
        folder = self.cache_dir / FOLDER / self.name
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """The file of this key."""
        return entry_path(self.cache_dir, f"{FOLDER}/{self.name}", key)


def open_image_embeds(
    encoding: EncodingConfig, cache_dir: Path, reference_dirs: Sequence[Path], encoder: PromptEncoder
) -> ImageEmbeds:
    """The cache named in conditioning_image_embeds, or else a default named after the first reference folder.

    Raises:
        ConfigError: the cache does not exist and create_image_embeds is off, or the encoder's tokens can't be cached.
    """
    name, folder = encoding.conditioning_image_embeds, cache_dir / FOLDER
    if not name:
        own = reference_dirs[0].resolve().name if reference_dirs else ""
        return ImageEmbeds(cache_dir, own if is_plain_name(own) else "references", encoder.visual_digest)
    if not encoder.visual_digest:
        raise ConfigError(
            f"conditioning_image_embeds is {name!r}, but a ComfyUI CLIP is connected, whose visual tokens can't be "
            "cached. Leave the name empty or disconnect clip."
        )
    if not encoding.create_image_embeds and not (folder / name).is_dir():
        raise ConfigError(f"conditioning_image_embeds is {name!r}, but {_known(name, folder)}")
    return ImageEmbeds(cache_dir, name, encoder.visual_digest)


def _known(name: str, folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    there = f"the only existing caches are {', '.join(names)}." if names else "no cache exists yet."
    hint = did_you_mean(name, names)
    return f"{there}{hint} Turn create_image_embeds on to create it or leave the name empty for the default."
