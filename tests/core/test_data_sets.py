"""Data sets below a folder: found, read, compared, checked and used for training. Thumbnails of their pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.data_sets import made
from tests.support.pair_files import contents, picture, text
from trainer_core.data_sets import changes
from trainer_core.data_sets.folders import (
    DataSet,
    NameTakenError,
    NotFoundError,
    create_data_set,
    find_data_sets,
    open_data_set,
)
from trainer_core.data_sets.reading import count_pairs, read_data_set, revision
from trainer_core.data_sets.thumbnails import Thumbnails
from trainer_core.data_sets.use import check_data_set, demo_data_set, pairs_of, state_of
from trainer_core.errors import DatasetError


def scene(seed: int, *, edited: bool = False) -> Image.Image:
    """A picture of coloured blobs; `edited` changes a quarter of it and its brightness."""
    blobs = np.random.default_rng(seed).integers(0, 200, (6, 8, 3), dtype=np.uint8)
    found = np.asarray(Image.fromarray(blobs).resize((96, 72), Image.Resampling.BICUBIC)).copy()
    if edited:
        found[:36, :48] = (250, 30, 30)
        found = found + np.uint8(20)
    return Image.fromarray(found)


def test_found_whatever_the_folders_are_called(tmp_path: Path):
    for name, before, after in (("a", "reference", "target"), ("b", "Before", "After"), ("c", "control", "outputs")):
        made(tmp_path, "x", name=name, before=before, after=after)
    for name in ("pictures", "half", ".hidden", "file"):
        (tmp_path / name).mkdir()
    picture(tmp_path / "pictures" / "x.png")
    (tmp_path / "half" / "target").mkdir()
    (tmp_path / ".hidden" / "target").mkdir()
    (tmp_path / ".hidden" / "reference").mkdir()
    assert find_data_sets(tmp_path) == ["a", "b", "c"]
    assert find_data_sets(tmp_path / "missing") == []
    assert {side: path.name for side, path in open_data_set(tmp_path, "b").sides.items()} == {
        "reference": "Before",
        "target": "After",
    }
    assert count_pairs(open_data_set(tmp_path, "c")) == 1


def test_a_new_folder_is_found_at_once(tmp_path: Path):
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "reference").mkdir()
    assert find_data_sets(tmp_path) == []
    (tmp_path / "late" / "target").mkdir()
    assert find_data_sets(tmp_path) == ["late"]


def test_several_references_and_folders_that_are_not_used(tmp_path: Path):
    made(tmp_path, "x")
    for folder in ("reference_2", "source", "masks", "control-3"):
        picture(tmp_path / "mine" / folder / "x.png")
    found = open_data_set(tmp_path, "mine")
    assert {side: path.name for side, path in found.sides.items()} == {
        "reference": "reference",
        "reference_2": "reference_2",
        "reference_3": "control-3",
        "target": "target",
    }
    assert [note.split(" ")[2] for note in found.notes] == ["source", "masks"]


def test_create(tmp_path: Path):
    create_data_set(tmp_path, "mine")
    assert find_data_sets(tmp_path) == ["mine"]
    for taken in ("mine", "MINE"):
        with pytest.raises(NameTakenError, match="already has"):
            create_data_set(tmp_path, taken)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "C:x", "nul", "COM1.txt", "x.", "x ", ".x", "-x", "a\0b", "x" * 101, 5, None,
     "a\nb", "é" * 101, "\ud800", ["x"], "lost+found"],
)  # fmt: skip
def test_names_that_are_refused(name: object, tmp_path: Path):
    with pytest.raises(DatasetError, match="name can't be"):
        create_data_set(tmp_path / "in", name)
    assert list(tmp_path.rglob("*")) == []
    if isinstance(name, str):
        with pytest.raises(NotFoundError, match="no data set named"):
            open_data_set(tmp_path, name)


def test_read(tmp_path: Path):
    mine = made(tmp_path, "cat", "dog", "street/01")
    text(tmp_path / "mine" / "target" / "cat.txt", "turn it blue\n")
    text(tmp_path / "mine" / "target" / "dog.png.txt", "turn it red")
    text(tmp_path / "mine" / "held_out.txt", "dog\ngone\n")
    picture(tmp_path / "mine" / "target" / "alone.png")
    before = contents(tmp_path)
    found = read_data_set(mine)
    assert [(pair.key, pair.caption, pair.held_out) for pair in found.pairs] == [
        ("cat", "turn it blue", False),
        ("dog", "turn it red", True),
        ("street/01", "", False),
    ]
    cat = found.pairs[0]
    assert (cat.target.file, cat.target.width, cat.target.height) == ("cat.png", 16, 12)
    assert [(each and (each.file, each.side, each.width, each.height)) for each in cat.reference] == [
        ("cat.jpg", "reference", 20, 10)
    ]
    assert [(each.side, each.file) for each in found.unmatched] == [("target", "alone.png")]
    assert found.notes == ("held_out.txt names pictures that are not there: gone.",)
    assert contents(tmp_path) == before
    assert read_data_set(mine) == found


def test_upright_sizes_and_files_that_are_no_pictures(tmp_path: Path):
    mine = made(tmp_path, "a")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "mine" / "reference" / "a.jpg", exif=exif)
    text(tmp_path / "mine" / "target" / "a.png", "<svg/>")
    (pair,) = read_data_set(mine).pairs
    assert pair.reference[0] is not None
    assert (pair.reference[0].width, pair.reference[0].height) == (10, 30)
    assert (pair.target.width, pair.target.height) == (None, None)


def test_a_revision_changes_with_everything_that_is_shown(tmp_path: Path):
    mine = made(tmp_path, "a")
    seen = [revision(mine)]
    text(tmp_path / "mine" / "target" / "a.txt", "make it blue")
    seen.append(revision(mine))
    changes.hold_out(mine, ["a"], held_out=True)
    seen.append(revision(mine))
    picture(tmp_path / "mine" / "reference" / "b.png")
    seen.append(revision(mine))
    assert len(set(seen)) == 4
    assert revision(mine) == seen[-1]


def test_ten_thousand_files(tmp_path: Path):
    mine = made(tmp_path)
    for number in range(5_000):
        (tmp_path / "mine" / "target" / f"{number:05d}.png").touch()
        (tmp_path / "mine" / "reference" / f"{number:05d}.png").touch()
    found = read_data_set(mine)
    assert len(found.pairs) == 5_000
    assert found.pairs[0].target.width is None
    assert find_data_sets(tmp_path) == ["mine"]


# Likeness


def test_suggestions_by_likeness(tmp_path: Path):
    """Real photos, and their colour negatives under names in another order."""
    mine, shipped = made(tmp_path), demo_data_set()
    before, after = (sorted(shipped.folder(side).glob("*.png"))[:12] for side in ("reference", "target"))
    order = [7, 3, 0, 9, 4, 11, 1, 10, 8, 2, 6, 5]
    for number in range(12):
        shutil.copy(before[number], mine.folder("reference") / f"IMG_{number + 20}.png")
        shutil.copy(after[order[number]], mine.folder("target") / f"new {number}.png")
    Image.new("RGB", (96, 72), (9, 9, 9)).save(mine.folder("reference") / "plain.png")
    found = read_data_set(mine)
    expected = {f"IMG_{order[number] + 20}.png": f"new {number}.png" for number in range(12)}
    assert {each.reference: each.target for each in found.suggestions} == expected
    assert all(0.9 <= each.likeness <= 1.001 for each in found.suggestions)
    assert found.suggestions_left == 0
    changes.match(mine, [("reference", each.reference, each.target) for each in found.suggestions])
    after = read_data_set(mine)
    assert {pair.key for pair in after.pairs} == {f"new {number}" for number in range(12)}
    for pair in after.pairs:
        wanted = before[order[int(pair.key.split()[1])]]
        assert (mine.folder("reference") / f"{pair.key}.png").read_bytes() == wanted.read_bytes()


def test_a_local_edit_is_suggested(tmp_path: Path):
    mine = made(tmp_path)
    for number in range(5):
        scene(number).save(mine.folder("reference") / f"a{number}.png")
        scene(number, edited=True).save(mine.folder("target") / f"b{number}.png")
    found = {each.reference[1:]: each.target[1:] for each in read_data_set(mine).suggestions}
    assert found == {f"{number}.png": f"{number}.png" for number in range(5)}


def test_unlike_pictures_are_not_suggested(tmp_path: Path):
    mine, shipped = made(tmp_path), demo_data_set()
    before, after = (sorted(shipped.folder(side).glob("*.png")) for side in ("reference", "target"))
    for number in range(12):
        shutil.copy(before[number], mine.folder("reference") / f"a{number}.png")
        shutil.copy(after[12 + number], mine.folder("target") / f"b{number}.png")
    assert read_data_set(mine).suggestions == ()


def test_names_that_differ_in_their_endings_are_suggested_first(tmp_path: Path):
    mine = made(tmp_path)
    scene(1).save(mine.folder("reference") / "a_before.png")
    scene(2).save(mine.folder("reference") / "b_start.png")
    scene(2, edited=True).save(mine.folder("target") / "a_after.png")
    scene(1, edited=True).save(mine.folder("target") / "b_end.png")
    found = {each.reference: each.target for each in read_data_set(mine).suggestions}
    assert found == {"a_before.png": "a_after.png", "b_start.png": "b_end.png"}


def test_many_pictures_are_compared_in_several_readings(tmp_path: Path):
    mine = made(tmp_path)
    for number in range(40):
        scene(number).save(mine.folder("reference") / f"a{number}.png")
        scene(number, edited=True).save(mine.folder("target") / f"b{number}.png")
    first, second = read_data_set(mine), read_data_set(mine)
    assert (first.suggestions_left, second.suggestions_left) == (20, 0)
    assert {(each.reference[1:], each.target[1:]) for each in second.suggestions} == {
        (f"{number}.png", f"{number}.png") for number in range(40)
    }


# Use


def test_pairs_for_training(tmp_path: Path):
    mine = made(tmp_path, "a", "b", "c")
    changes.write_captions(mine, {key: f"words of {key}" for key in "abc"})
    changes.hold_out(mine, ["b"], held_out=True)
    dataset = pairs_of(mine, "")
    assert [(pair.key, pair.captions) for pair in dataset.pairs] == [(key, (f"words of {key}",)) for key in "abc"]
    assert dataset.held_out == ("b",)
    assert {pair.captions for pair in pairs_of(mine, "turn it blue").pairs} == {("turn it blue",)}


def test_a_state_changes_with_pictures_captions_marks_and_the_instruction(tmp_path: Path):
    mine = made(tmp_path, "a", "b")
    seen = [state_of(mine, ""), state_of(mine, "x")]
    changes.write_captions(mine, {"a": "words"})
    seen.append(state_of(mine, ""))
    changes.hold_out(mine, ["b"], held_out=True)
    seen.append(state_of(mine, ""))
    picture(mine.folder("target") / "a.png", seed=9, size=(17, 17))
    seen.append(state_of(mine, ""))
    assert len(set(seen)) == 5


def refused(data_set: DataSet, instruction: str = "") -> str:
    with pytest.raises(DatasetError) as caught:
        pairs_of(data_set, instruction)
    return str(caught.value)


def test_refusals_say_what_to_do(tmp_path: Path):
    assert "has no pictures yet. In the side panel Edit pairs, choose the data set and drop" in refused(
        made(tmp_path, name="empty")
    )
    apart = made(tmp_path, name="apart")
    picture(apart.folder("reference") / "x.png")
    assert "has 1 picture before the edit, but none after it. In the side panel" in refused(apart)
    text(apart.folder("target") / "x.heic", "no picture")
    assert "target have formats that are not supported (x.heic). Convert them to PNG or JPEG." in refused(apart)
    picture(apart.folder("target") / "y.png")
    assert "no pair: 1 picture before the edit and 1 picture after it" in refused(apart)
    turned = made(tmp_path, "a", "b", name="turned")
    for key in "ab":
        text(turned.folder("reference") / f"{key}.txt", "words")
    said = refused(turned)
    assert (
        "Before and after look swapped: the instructions are beside the pictures before the edit (a, b). If so" in said
    )
    assert "Notes" not in said
    assert read_data_set(turned).looks_swapped
    came = changes.swap_sides(turned, None)  # as it says
    assert not read_data_set(turned).looks_swapped
    assert [pair.captions for pair in pairs_of(turned, "").pairs] == [("words",), ("words",)]
    changes.swap_sides(turned, None)
    assert sorted(path.name for path in turned.folder("target").glob("*.txt")) == ["a.txt", "b.txt"]
    changes.swap_sides(turned, None)
    changes.swap_sides(turned, None, came)  # undone
    assert sorted(path.name for path in turned.folder("reference").glob("*.txt")) == ["a.txt", "b.txt"]
    assert read_data_set(turned).looks_swapped
    turned = made(tmp_path, "a", "b", name="unlike")
    text(turned.folder("target") / "a.txt", "words")
    assert "1 pair without an instruction (b)" in refused(turned)
    mine = made(tmp_path, "a", "b")
    changes.write_captions(mine, {"a": "words"})
    text(mine.folder("target") / "b.png", "no picture")
    said = refused(mine)
    assert "2 problems" in said
    assert "1 pair without an instruction (b). In the side panel Edit pairs, write what the edit does" in said
    assert "b.png: this file is damaged or not a supported picture" in said
    assert "caption_strategy" not in said


def test_check(tmp_path: Path):
    mine = made(tmp_path)
    for number, key in enumerate(("good", "same", "torn")):
        scene(number).save(mine.folder("reference") / f"{key}.png")
        scene(number, edited=key != "same").save(mine.folder("target") / f"{key}.png")
    text(mine.folder("target") / "torn.png", (mine.folder("target") / "torn.png").read_bytes()[:300])
    for key in ("good", "same", "torn"):
        text(mine.folder("reference") / f"{key}.txt", "words")
    found = check_data_set(mine)
    assert "hardly differ" in found.findings["same"][0]
    assert "damaged or cut short" in found.findings["torn"][0]
    assert str(tmp_path) not in str(found.findings)
    assert found.notes[0].startswith(
        "Captions lie beside the references (good, same, torn). Are the two folders swapped?"
    )
    assert check_data_set(made(tmp_path, name="empty")).findings == {}


def test_the_demo_ships(tmp_path: Path):
    dataset = pairs_of(demo_data_set(), "", checked_dir=tmp_path)
    assert len(dataset.pairs) >= 12
    assert all(pair.captions for pair in dataset.pairs)
    check = check_data_set(demo_data_set(), checked_dir=tmp_path)
    assert check.findings == {} and [note[:17] for note in check.notes] == ["In 24 of 24 pairs"]


# Thumbnails


def test_thumbnails_are_made_once_and_follow_the_file(tmp_path: Path):
    path = picture(tmp_path / "a.png", size=(400, 100), seed=200)
    small = Thumbnails(tmp_path / "small")
    first = small.get(path, 100)
    (kept,) = (tmp_path / "small").rglob("*.jpg")
    assert Image.open(kept).size == (128, 32)
    kept.write_bytes(b"kept")
    assert small.get(path, 128) == b"kept"
    picture(path, size=(100, 400), seed=3)
    assert small.get(path, 128) not in (first, b"kept")
    with pytest.raises(DatasetError):
        small.get(text(tmp_path / "b.png", "<svg/>"), 128)


def test_thumbnails_that_were_not_used_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer_core.data_sets.thumbnails._EVERY", 4)
    small = Thumbnails(tmp_path / "small", kept_bytes=1)
    for number in range(4):
        small.get(picture(tmp_path / f"{number}.png"), 128)
    assert len(list((tmp_path / "small").rglob("*.jpg"))) == 0


def test_a_full_disk_only_makes_thumbnails_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer_core.data_sets.thumbnails.write_atomically", full)
    assert Thumbnails(tmp_path / "small").get(picture(tmp_path / "a.png"), 128)[:2] == b"\xff\xd8"


def test_listing_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path, "a")
    monkeypatch.setattr(Path, "open", None)
    assert find_data_sets(tmp_path) == ["mine"]
