"""Validation pictures in a run folder, one file each, and their index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer_core.pictures.grid import GridRow
from trainer_core.pictures.sample_pictures import INDEX, read_sample_index, save_sample_pictures


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


ROWS = [
    GridRow((plain(1), plain(2)), plain(3), plain(4), plain(5), "Make it blue."),
    GridRow((), plain(6), plain(7), plain(8), "Größer <b>", label="8 x 8"),
]


def test_every_picture_is_found_by_pair_and_column(tmp_path: Path):
    save_sample_pictures(ROWS, tmp_path / "step")
    first, second = read_sample_index(tmp_path / "step")
    assert list(first["pictures"]) == ["reference-1", "reference-2", "base", "lora", "target"]
    assert (first["caption"], second["caption"]) == ("Make it blue.", "Größer <b>")
    assert (first["label"], second["label"]) == ("", "8 x 8")
    names = [*first["pictures"].values(), *second["pictures"].values()]
    levels = [int(np.asarray(Image.open(tmp_path / "step" / name))[0, 0, 0]) for name in names]
    assert levels == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {path.name for path in (tmp_path / "step").iterdir()} == {*names, INDEX}


def test_without_its_index_a_folder_is_not_whole(tmp_path: Path):
    assert read_sample_index(tmp_path) == []
    save_sample_pictures(ROWS, tmp_path)
    (tmp_path / INDEX).unlink()
    assert read_sample_index(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pairs": 3}', '{"pairs": [{"caption": 1}]}', '{"pairs": [[]]}'])
def test_a_damaged_index_is_none(text: str, tmp_path: Path):
    (tmp_path / INDEX).write_text(text)
    assert read_sample_index(tmp_path) == []


@pytest.mark.parametrize("name", ["../secret.png", "/etc/x.png", "a/b.png", "run.json", "..", ""])
def test_an_index_names_only_pictures_beside_it(name: str, tmp_path: Path):
    (tmp_path / INDEX).write_text(json.dumps({"pairs": [{"caption": "", "label": "", "pictures": {"lora": name}}]}))
    assert read_sample_index(tmp_path) == [{"caption": "", "label": "", "pictures": {}}]
