"""The contact sheet and the text report of a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer_core.config import DatasetConfig
from trainer_core.data.pairing import EditDataset, scan_folders
from trainer_core.geometry import Size
from trainer_core.pictures.contact_sheet import aspect_name, contact_sheet, report
from trainer_core.pictures.rows import Look, PictureRow, draw_rows, font_for, wrapped

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def make(root: Path, count: int, *, captions: str = "Make it blue.", size: tuple[int, int] = (40, 30)) -> EditDataset:
    for name, colour in (("one", RED), ("two", GREEN), ("after", BLUE)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, colour).save(root / name / f"p{index:02d}.png")
            if name == "after":
                (root / name / f"p{index:02d}.txt").write_text(captions)
    dirs = (str(root / "one"), str(root / "two"))
    return scan_folders(DatasetConfig(target_dir=str(root / "after"), reference_dirs=dirs)).dataset


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


def test_each_pair_shows_its_references_then_its_target(tmp_path):
    sheet = contact_sheet(make(tmp_path, 3))
    for colour in (RED, GREEN, BLUE):
        assert area(sheet, colour) == 3 * 192 * 256
    columns = [int(np.argmax((np.asarray(sheet) == colour).all(-1).any(0))) for colour in (RED, GREEN, BLUE)]
    assert columns == sorted(columns)


def test_many_pairs_are_sampled_from_all_of_the_dataset(tmp_path, monkeypatch):
    dataset = make(tmp_path, 30)
    rows: list[PictureRow] = []
    monkeypatch.setattr(
        "trainer_core.pictures.contact_sheet.draw_rows",
        lambda headings, drawn, look: rows.extend(drawn) or draw_rows(headings, drawn, look),
    )
    contact_sheet(dataset, max_pairs=5)
    assert [row.label.split()[0] for row in rows] == ["p00", "p06", "p12", "p18", "p24"]


def test_no_pair_is_a_sheet_too(tmp_path):
    sheet = contact_sheet(make(tmp_path, 0))
    assert sheet.mode == "RGB"
    assert sheet.width > 100


def test_a_caption_changes_the_sheet(tmp_path):
    one = contact_sheet(make(tmp_path / "a", 1))
    other = contact_sheet(make(tmp_path / "b", 1, captions="Make it red."))
    more = contact_sheet(make(tmp_path / "c", 1, captions="Make it blue.\nAnother."))
    assert one.size == other.size
    assert len({one.tobytes(), other.tobytes(), more.tobytes()}) == 3


def test_report_counts_and_measures(tmp_path):
    dataset = make(tmp_path, 3, captions="one\ntwo")
    Image.new("RGB", (90, 90)).save(tmp_path / "two/p01.png")
    config = DatasetConfig(target_dir=str(dataset.target_dir), reference_dirs=tuple(map(str, dataset.reference_dirs)))
    lines = report(dataclasses.replace(scan_folders(config).dataset, notes=("a note",))).splitlines()
    assert lines == [
        "3 pairs with 2 references each.",
        "Targets: 40 x 30, all 4:3.",
        "References 1: 40 x 30, all 4:3.",
        "References 2: 40 x 30 to 90 x 90, mostly 4:3 (2 of 3).",
        "Captions: 2 per pair, 6 in total, 2 different.",
        "Aspect ratios of reference and target differ in 1 pair (p01). These references are not cropped "
        "like their targets: they are used whole, or with match_target_res cropped to the target's aspect ratio.",
        "",
        "Notes:",
        "  - a note",
    ]


@pytest.mark.parametrize(
    ("size", "name"), [((100, 100), "1:1"), ((1920, 1080), "16:9"), ((1080, 1920), "9:16"), ((1000, 667), "3:2")]
)
def test_aspect_names(size, name):
    assert aspect_name(Size(*size)) == name


@pytest.mark.parametrize("text", ["many words " * 30, "x" * 400, "变成蓝色" * 60, "short", "two words", ""])
@pytest.mark.parametrize("lines", [1, 3])
def test_wrapped_lines_fit_and_nothing_is_lost_unless_marked(text, lines):
    font = font_for(text, 14)
    done = wrapped(text, font, 200, lines)
    assert len(done) <= lines
    assert all(font.getlength(line) <= 200 for line in done)
    complete = "".join(done).replace(" ", "") == text.replace(" ", "")
    assert complete or done[-1].endswith("...")


def test_letters_beyond_ascii_are_drawn():
    font = font_for("Tür – größer", 20)
    drawn = [bytes(font.getmask(letter, "1")) for letter in "üß–\U0010ffff"]
    assert len(set(drawn)) == 4


def test_rows_of_unequal_shapes_share_a_height():
    tall, wide = Image.new("RGB", (10, 400), RED), Image.new("RGB", (4000, 10), BLUE)
    sheet = draw_rows(["a", "b"], [PictureRow((tall, wide), "x"), PictureRow((None, tall), "y")], Look(cell=100))
    rows = (np.asarray(sheet) == RED).all(-1)
    assert rows.any(1).sum() == 200, "each tall picture must be as high as a cell"
    assert (np.asarray(sheet) == BLUE).all(-1).any(0).sum() == 200, "a very wide picture must be two cells wide"
