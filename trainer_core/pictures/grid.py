"""Validation pictures side by side, and files that are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files import write_atomically
from .rows import Look, PictureRow, draw_rows


@dataclass(frozen=True, slots=True)
class GridRow:
    """One held-out pair under one instruction: its references, what base model, LoRA and its running average (EMA) make
    of them, and the target. None where it is not drawn or, for the target, not asked for."""

    references: tuple[Image.Image, ...]
    base: Image.Image
    lora: Image.Image | None
    target: Image.Image | None
    caption: str
    label: str = ""  # a small line below the caption, such as the picture's size and its dB
    ema: Image.Image | None = None

    def columns(self) -> dict[str, Image.Image]:
        """What there is to see, by name, from left to right."""
        references = {f"reference-{number + 1}": picture for number, picture in enumerate(self.references)}
        others = {"base": self.base, "lora": self.lora, "ema": self.ema, "target": self.target}
        return {**references, **{name: picture for name, picture in others.items() if picture is not None}}


_HEADINGS = {"base": "base", "lora": "LoRA", "ema": "EMA", "target": "target"}


def validation_grid(rows: Sequence[GridRow], *, title: str = "", cell: int = 256) -> Image.Image:
    """Columns reference(s) | base | LoRA | EMA | target, a row per picture, each `cell` pixels high.

    A column that no row has is left out. From five rows on they also stand side by side, for a page-like shape.
    """
    num_references = max((len(row.references) for row in rows), default=1)
    headings = {f"reference-{number + 1}": f"reference {number + 1}" for number in range(num_references)}
    if num_references == 1:
        headings = {"reference-1": "reference"}
    shown = [row.columns() for row in rows]
    headings |= {name: words for name, words in _HEADINGS.items() if not rows or any(name in row for row in shown)}
    drawn = [
        PictureRow(tuple(pictures.get(name) for name in headings), row.caption, row.label)
        for row, pictures in zip(rows, shown, strict=True)
    ]
    footer = "" if rows else "There is no held-out pair to show."
    look = Look(cell=cell, columns=1 if len(rows) < 5 else 0, caption_lines=6, title=title, footer=footer)
    return draw_rows(list(headings.values()), drawn, look)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG or JPEG, by the name's extension, so that nobody ever sees half a file. Makes the folder.

    Raises:
        OSError: the disk is full or the folder can't be written.
    """
    data = io.BytesIO()
    picture.save(data, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=92)
    write_atomically(path, data.getvalue())
    return path
