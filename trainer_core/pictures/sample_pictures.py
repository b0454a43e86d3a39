"""The single pictures of a validation grid, so that the page can overlay them.

samples/step-000250/0-reference-1.png  0-base.png  0-lora.png  0-target.png  1-reference-1.png  ...
samples/step-000250/index.json  which pictures belong together; written last, so without it the folder is incomplete
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .grid import GridRow, save_picture

INDEX = "index.json"


def save_sample_pictures(rows: Sequence[GridRow], folder: Path) -> None:
    """Write every picture of every row, then the index."""
    pairs = []
    for number, row in enumerate(rows):
        files = {column: f"{number}-{column}.png" for column in row.columns()}
        for column, picture in row.columns().items():
            save_picture(picture, folder / files[column])
        pairs.append({"caption": row.caption, "label": row.label, "pictures": files})
    write_atomically(folder / INDEX, json.dumps({"pairs": pairs}, indent=1, ensure_ascii=False).encode())


def read_sample_index(folder: Path) -> list[dict[str, Any]]:
    """The rows in a step's folder: `caption`, `label`, and `pictures` (file names) by column. Empty if incomplete."""
    try:
        pairs = json.loads((folder / INDEX).read_text(encoding="utf-8"))["pairs"]
        return [
            {"caption": str(pair["caption"]), "label": str(pair["label"]), "pictures": _plain_names(pair["pictures"])}
            for pair in pairs
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _plain_names(pictures: Mapping[str, str]) -> dict[str, str]:
    """Keep only plain file names, because an untrusted run folder could point to other places."""
    return {column: name for column, name in pictures.items() if Path(name).name == name and name.endswith(".png")}
