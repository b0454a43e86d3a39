"""Writes folders of small pictures and captions, valid and invalid, for tests of pairing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer_core.config import DatasetConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError


def picture(path: Path, *, size: tuple[int, int] = (16, 12), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (seed % 256, 90, 120)).save(path)
    return path


def text(path: Path, content: str | bytes = "Make it blue.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pair(
    root: Path, key: str, *, suffix: str = ".png", seed: int = 0, references: tuple[str, ...] = ("before",)
) -> None:
    picture(root / "after" / f"{key}{suffix}", seed=seed)
    text(root / "after" / f"{key}.txt")
    for number, name in enumerate(references):
        picture(root / name / f"{key}.png", size=(20, 10), seed=seed + number + 1)


def config(root: Path, *references: str, **settings: str) -> DatasetConfig:
    dirs = tuple(str(root / name) for name in references or ("before",))
    return DatasetConfig(target_dir=str(root / "after"), reference_dirs=dirs, **settings)


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def problems_of(settings: DatasetConfig) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        pair_folders(settings)
    listed, _, notes = str(caught.value).partition("\nNotes:")
    assert listed.count("\n") == len(caught.value.problems), "each problem must be one line"
    assert notes.count("\n") == len(caught.value.notes), "each note must be one line"
    return list(caught.value.problems)
