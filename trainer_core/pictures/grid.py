"""Draw validation pictures side by side and save pictures atomically."""

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
    """One held-out pair with one caption: its references, the samples of the base model, the LoRA and its EMA, and the
    target. None for samples that are not made and for a target that doesn't fit the caption or the size."""

    references: tuple[Image.Image, ...]
    base: Image.Image | None
    lora: Image.Image | None
    target: Image.Image | None
    caption: str
    label: str = ""  # small text below the caption, such as the picture's size and its PSNR in dB
    ema: Image.Image | None = None

    def columns(self) -> dict[str, Image.Image]:
        """The pictures by column name, from left to right."""
        references = {f"reference-{number + 1}": picture for number, picture in enumerate(self.references)}
        others = {"base": self.base, "lora": self.lora, "ema": self.ema, "target": self.target}
        return {**references, **{name: picture for name, picture in others.items() if picture is not None}}


_CELL = 256  # height of each picture in pixels
_HEADINGS = {"base": "base", "lora": "LoRA", "ema": "EMA", "target": "target"}


def validation_grid(rows: Sequence[GridRow]) -> Image.Image:
    """A grid with the columns reference(s), base, LoRA, EMA and target, and one row per pair and caption.

    Omits columns that no row uses. Five or more rows are also laid out side by side, for a page-like shape.
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
    footer = "" if rows else "There are no held-out pairs to show."
    look = Look(cell=_CELL, columns=1 if len(rows) < 5 else 0, caption_lines=6, footer=footer)
    return draw_rows(list(headings.values()), drawn, look)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a JPEG if the extension says so, else a PNG, atomically. Creates the folder.

    Raises:
        OSError: the disk is full or the folder can't be written.
    """
    data = io.BytesIO()
    picture.save(data, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=92)
    write_atomically(path, data.getvalue())
    return path
