"""The grid of validation pictures, and saving it atomically."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from trainer_core.pictures.grid import GridRow, save_picture, validation_grid

COLOURS = {
    "reference": (255, 0, 0),
    "second": (255, 255, 0),
    "base": (0, 255, 0),
    "lora": (0, 0, 255),
    "target": (255, 0, 255),
}


def plain(name: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[name])


def row(*references: str, caption: str = "Make it blue.", label: str = "") -> GridRow:
    return GridRow(tuple(map(plain, references)), plain("base"), plain("lora"), plain("target"), caption, label)


def span(grid: Image.Image, name: str) -> tuple[int, int, int]:
    """(first column, number of columns, number of rows) that contain this colour, in pixels."""
    found = (np.asarray(grid) == COLOURS[name]).all(-1)
    columns = np.flatnonzero(found.any(0))
    return int(columns[0]), len(columns), int(found.any(1).sum())


def test_columns_stand_in_their_order_and_small_pictures_are_enlarged():
    grid = validation_grid([row("reference"), row("reference")])
    spans = [span(grid, name) for name in ("reference", "base", "lora", "target")]
    assert [first for first, _, _ in spans] == sorted(first for first, _, _ in spans)
    assert all((width, height) == (256, 512) for _, width, height in spans)


def test_rows_may_have_different_numbers_of_references():
    grid = validation_grid([row("reference", "second"), row("reference")])
    assert span(grid, "second")[2] == 256
    assert span(grid, "base")[1:] == (256, 512)
    assert span(grid, "second")[0] < span(grid, "base")[0]


def test_a_row_without_a_target_and_a_third_drawn_picture():
    first = dataclasses.replace(row("reference"), ema=plain("second"))
    grid = validation_grid([first, dataclasses.replace(first, target=None)])
    order = [span(grid, name)[0] for name in ("reference", "base", "lora", "second", "target")]
    assert order == sorted(order)
    assert span(grid, "second")[2] == 512 and span(grid, "target")[2] == 256
    without = validation_grid([dataclasses.replace(first, lora=None)])
    assert without.width < grid.width and span(without, "second")[2] == 256


def test_many_rows_stand_side_by_side():
    assert validation_grid([row("reference")] * 12).height < 12 * 256
    assert validation_grid([row("reference")] * 4).height > 4 * 256


def test_captions_and_labels_are_drawn_and_long_ones_make_room():
    first = validation_grid([row("reference", caption="a")])
    assert validation_grid([row("reference", caption="b")]).tobytes() != first.tobytes()
    assert validation_grid([row("reference", caption="a long one " * 40)]).height > first.height + 30
    assert validation_grid([row("reference", caption="a", label="12 dB")]).height > first.height


def test_no_row_is_a_picture_too():
    assert validation_grid([]).mode == "RGB"


def test_saved_pictures_are_whole_and_leave_nothing_beside_them(tmp_path):
    path = save_picture(plain("base"), tmp_path / "new" / "a.png")
    assert Image.open(path).getpixel((3, 3)) == COLOURS["base"]
    save_picture(plain("lora"), path)
    assert Image.open(path).getpixel((3, 3)) == COLOURS["lora"]
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert Image.open(save_picture(plain("base"), tmp_path / "b.jpg")).format == "JPEG"


def test_a_failed_save_keeps_the_former_file(tmp_path, monkeypatch):
    path = save_picture(plain("base"), tmp_path / "a.png")

    def full(*args, **kwargs):
        args[1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save_picture(plain("lora"), path)
    assert Image.open(path).getpixel((3, 3)) == COLOURS["base"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
