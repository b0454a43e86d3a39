"""conditioning_image_embeds: what Qwen2.5-VL's vision tower makes of references, kept for all captions.

A cache has a name and is a folder below `conditioning_image_embeds` of the cache. Its entries are keyed by content, so
that two datasets may share one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ..config import EncodingConfig, digest
from ..errors import ConfigError
from ..files import is_whole, read_tensors, write_tensors
from ..qwen_image.text_encoder import VisualTokens
from ..settings import is_plain_name
from .encoders import PromptEncoder
from .entry import entry_path
from .pictures import View

FOLDER = "conditioning_image_embeds"


@dataclass(frozen=True, slots=True)
class ImageEmbeds:
    """A named cache of visual tokens, for one text encoder; it finds and keeps nothing where that has no digest."""

    cache_dir: Path
    name: str
    visual_digest: str

    def key(self, content: str, view: View) -> str:
        """Of a picture by its file's SHA-256 and its view."""
        return digest(["visual tokens", self.visual_digest, content, view.as_json()]) if self.visual_digest else ""

    def find(self, key: str) -> VisualTokens | None:
        """The tokens of this key, if they are there and whole."""
        path = self._path(key)
        if not key or not is_whole(path):
            return None
        tensors = read_tensors(path)
        return VisualTokens(tensors["tokens"], tensors["grid"])

    def keep(self, key: str, seen: VisualTokens) -> None:
        """Onto the disk."""
        if key:
            write_tensors(self._path(key), {"tokens": seen.tokens, "grid": seen.grid})

    def _path(self, key: str) -> Path:
        return entry_path(self.cache_dir, f"{FOLDER}/{self.name}", key)


def open_image_embeds(
    encoding: EncodingConfig, cache_dir: Path, reference_dir: Path, encoder: PromptEncoder
) -> ImageEmbeds:
    """The cache that conditioning_image_embeds names, or the default one, named as the first folder of references.

    Raises:
        ConfigError: there is no cache of that name and create_image_embeds is off; names those that are there.
    """
    name, folder = encoding.conditioning_image_embeds, cache_dir / FOLDER
    if not name:
        own = reference_dir.resolve().name
        return ImageEmbeds(cache_dir, own if is_plain_name(own) else "references", encoder.visual_digest)
    if not encoder.visual_digest:
        raise ConfigError(
            f"conditioning_image_embeds is {name!r}, but ComfyUI's own CLIP is connected, which keeps none. "
            "Leave the name empty, or disconnect clip."
        )
    if encoding.create_image_embeds:
        (folder / name).mkdir(parents=True, exist_ok=True)
    elif not (folder / name).is_dir():
        raise ConfigError(f"conditioning_image_embeds is {name!r}; {_known(name, folder)}")
    return ImageEmbeds(cache_dir, name, encoder.visual_digest)


def _known(name: str, folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    there = f"caches that exist are {', '.join(names)}." if names else "no cache exists yet."
    near = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{there}{hint} Turn create_image_embeds on to make it, or leave the name empty for the default."
