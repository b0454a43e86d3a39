"""Content-keyed entries on disk. Equal content has one name; anything else is simply not found."""

from __future__ import annotations

from pathlib import Path


def entry_path(cache_dir: Path, kind: str, key: str) -> Path:
    """Where an entry lies: spread over 256 folders, so that 100,000 entries stay quick to look up."""
    return cache_dir.joinpath(kind, key[:2], f"{key}.safetensors")
