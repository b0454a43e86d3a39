"""Validation pictures side by side, and files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data.picture_rows import Look, PictureRow, draw_rows


@dataclass(frozen=True, slots=True)
class GridRow:
    """One held-out pair: its references, what the base model and the LoRA make of them, and the target."""

    references: tuple[Image.Image, ...]
    base: Image.Image
    lora: Image.Image
    target: Image.Image
    caption: str
    label: str = ""  # a small line below the caption, such as the pair's name and its dB


def validation_grid(rows: Sequence[GridRow], *, title: str = "", cell: int = 256) -> Image.Image:
    """Columns reference(s) | base | LoRA | target, a row per pair, each picture `cell` pixels high."""
    num_references = max((len(row.references) for row in rows), default=1)
    names = ["reference"] if num_references == 1 else [f"reference {index + 1}" for index in range(num_references)]
    drawn = [
        PictureRow(
            (*row.references, *[None] * (num_references - len(row.references)), row.base, row.lora, row.target),
            row.caption,
            row.label,
        )
        for row in rows
    ]
    look = Look(cell=cell, caption_lines=6, title=title, footer="" if rows else "There is no held-out pair to show.")
    return draw_rows([*names, "base", "LoRA", "target"], drawn, look)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG or JPEG, by the name's extension, so that nobody ever sees half a file. Makes the folder.

    Raises:
        OSError: the disk is full or the folder can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=92)
            file.flush()
            os.fsync(file.fileno())
        unfinished.chmod(0o644)  # mkstemp's files are private
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
