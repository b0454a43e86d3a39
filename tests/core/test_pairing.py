"""Folders become pairs, or one report names all their problems."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from tests.support.pair_files import config, contents, pair, picture, problems_of, text
from trainer_core.config import CaptionConfig
from trainer_core.data.captions import read_caption_file
from trainer_core.data.pairing import folder_state, pair_folders, scan_folders
from trainer_core.errors import DatasetError


def test_pairs_are_matched_by_relative_path_without_extension(tmp_path):
    pair(tmp_path, "b", suffix=".JPG")
    pair(tmp_path, "a/b", suffix=".webp")
    pair(tmp_path, "a/c.d", suffix=".tif")
    dataset = pair_folders(config(tmp_path))
    assert [p.key for p in dataset.pairs] == ["a/b", "a/c.d", "b"]
    first = dataset.pairs[0]
    assert first.target == tmp_path / "after/a/b.webp"
    assert first.references == (tmp_path / "before/a/b.png",)
    assert first.captions == ("Make it blue.",)
    assert first.sizes == ((16, 12), (20, 10))
    assert first.digests == tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in (first.target, *first.references))


def test_references_keep_the_order_of_their_folders(tmp_path):
    pair(tmp_path, "a", references=("one", "two", "three"))
    for order in (("one", "two", "three"), ("three", "one", "two")):
        dataset = pair_folders(config(tmp_path, *order))
        assert [path.parent.name for path in dataset.pairs[0].references] == list(order)
        assert [path.name for path in dataset.reference_dirs] == list(order)


def test_names_match_in_either_unicode_spelling(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Bäume/größe 木 é") for form in ("NFC", "NFD"))
    picture(tmp_path / "after" / f"{nfd}.png")
    text(tmp_path / "after" / f"{nfc}.txt")
    picture(tmp_path / "before" / f"{nfc}.png")
    dataset = pair_folders(config(tmp_path))
    assert [p.key for p in dataset.pairs] == [nfc]
    assert pair_folders(config(tmp_path, caption_strategy="filename")).pairs[0].captions == (Path(nfc).name,)


def test_hidden_and_other_files_are_passed_over(tmp_path):
    pair(tmp_path, "a")
    picture(tmp_path / "after/._a.png")
    picture(tmp_path / "after/.hidden/b.png")
    text(tmp_path / "after/Thumbs.db", b"\0")
    text(tmp_path / "after/read.md")
    scan = scan_folders(config(tmp_path))
    assert (len(scan.dataset.pairs), scan.problems) == (1, ())
    assert scan.notes == (
        f"{tmp_path / 'after'}: 1 .md file not used (read.md), because this is not the extension of a picture.",
        f"{tmp_path / 'after'}: hidden and system files and folders not used: 3 (._a.png, .hidden, Thumbs.db).",
    )


SYSTEM = ["@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".thumbnails"]


@pytest.mark.parametrize("name", SYSTEM)
def test_what_a_system_puts_into_folders_is_never_trained(tmp_path, name):
    pair(tmp_path, "a")
    for folder in ("after", "before"):
        picture(tmp_path / folder / name / "a.png/thumb.jpg")
    picture(tmp_path / "after" / name / "thumb.jpg")
    scan = scan_folders(config(tmp_path, references_optional=True))
    assert [each.key for each in scan.dataset.pairs] == ["a"]
    assert not scan.problems
    assert [f"not used: 1 ({name})" in note for note in scan.notes] == [True, True]


@pytest.mark.parametrize("ending", ["-masklabel", "_masklabel", "-mask", "_mask", "_MASK"])
@pytest.mark.parametrize("references_optional", [True, False])
def test_a_mask_beside_its_target_is_no_target(tmp_path, ending, references_optional):
    pair(tmp_path, "000")
    pair(tmp_path, "cat_mask")  # a pair of its own: nothing is called cat
    pair(tmp_path, f"own/001{ending}")
    pair(tmp_path, "own/001")  # 001 and 001_mask both have a reference and a caption
    picture(tmp_path / "after" / f"000{ending}.png")
    settings = config(
        tmp_path, references_optional=references_optional, caption_strategy="instanceprompt", instance_prompt="Go."
    )
    scan = scan_folders(settings)
    assert [each.key for each in scan.dataset.pairs] == ["000", "cat_mask", "own/001", f"own/001{ending}"]
    assert scan.problems == (
        f"{tmp_path / 'after'}: pictures that look like masks of targets: 1 (000{ending}.png). Move them to a folder "
        "of their own, name them like their targets, and set mask_dir to it; or remove them.",
    )


def test_a_folder_of_masks_below_the_targets_is_no_target(tmp_path):
    pair(tmp_path, "mask")  # a target may have this name
    pair(tmp_path, "sub/000")
    picture(tmp_path / "after/masks/sub/000.png")
    picture(tmp_path / "after/sub/Mask/000.png")
    settings = config(tmp_path, references_optional=True, caption_strategy="instanceprompt", instance_prompt="Go.")
    scan = scan_folders(settings)
    assert [each.key for each in scan.dataset.pairs] == ["mask", "sub/000"]
    assert "look like masks of targets: 2 (masks/sub/000.png, sub/Mask/000.png)" in scan.problems[0]


def test_two_spellings_of_one_name_are_told_apart(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    pair(tmp_path, nfc)
    pair(tmp_path, nfd)
    problems = problems_of(config(tmp_path))
    assert len(problems) == 3  # two targets, two texts, two references
    assert all("the same name in another spelling of its accented letters (Unicode NFC and NFD)" in p for p in problems)


def test_the_table_of_captions_may_lie_beside_the_targets(tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "after/a.txt").unlink()
    text(tmp_path / "after/table.csv", "filename,caption\na.png,Make it blue.\n")
    text(tmp_path / "after/other.csv", "x")
    captions = CaptionConfig(caption_file="table.csv")
    notes = pair_folders(config(tmp_path, caption_strategy="csv", captions=captions)).notes
    assert notes == (
        f"{tmp_path / 'after'}: 1 .csv file not used (other.csv), because this is not the extension of a picture.",
    )


def test_what_is_left_out_is_noted(tmp_path):
    pair(tmp_path, "a")
    picture(tmp_path / "before/extra.png")
    text(tmp_path / "after/orphan.txt")
    text(tmp_path / "after/old.HEIC", b"x")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "before/a.png", save_all=True, append_images=frames[1:])
    dataset = pair_folders(config(tmp_path))
    assert len(dataset.notes) == 4
    assert sum("1 .heic file not used (old.HEIC)" in note for note in dataset.notes) == 1
    assert f"{tmp_path / 'before'}: 1 picture not used (extra.png), because no target has this name." in dataset.notes
    assert f"{tmp_path / 'after'}: 1 text not used (orphan.txt), because no target has this name." in dataset.notes
    assert dataset.notes[-1] == "Pictures with several frames: 1 (before/a.png). Only the first frame is used."


def test_one_report_names_every_problem_and_no_file_is_touched(tmp_path):
    for key in ("good", "also_good"):
        pair(tmp_path, key)
    for key in ("zero", "cut_target", "cut_reference", "fake", "blank", "none", "latin1", "lonely", "Case", "heic"):
        pair(tmp_path, key)
    after, before = tmp_path / "after", tmp_path / "before"
    text(after / "zero.png", b"")
    Image.effect_noise((64, 64), 90).save(after / "cut_target.png")
    text(after / "cut_target.png", (after / "cut_target.png").read_bytes()[:900])
    (before / "cut_reference.png").unlink()
    Image.effect_noise((64, 64), 90).save(before / "cut_reference.jpg")
    text(before / "cut_reference.jpg", (before / "cut_reference.jpg").read_bytes()[:-500])
    text(before / "fake.png", "I am no picture")
    text(after / "blank.txt", "\n  \r\n\t\n")
    (after / "none.txt").unlink()
    text(after / "latin1.txt", "Mach es größer".encode("latin-1"))
    (before / "lonely.png").unlink()
    (before / "Case.png").rename(before / "case.png")
    (before / "heic.png").rename(before / "heic.heic")
    picture(after / "good.jpg")
    untouched = contents(tmp_path)

    problems = problems_of(config(tmp_path))

    expected = {
        "after/zero.png": "empty",
        "after/cut_target.png": "damaged",
        "before/cut_reference.jpg": "damaged",
        "before/fake.png": "damaged or not a supported picture",
        "after/blank.txt": "caption file is empty",
        "after/none.png": "no caption; looked for none.txt",
        "after/latin1.txt": "not UTF-8",
        "after/lonely.png": f"there is no reference (picture before the edit) for it in {before}",
        "after/Case.png": "Rename case.png or the target",
        "after/heic.png": "Convert heic.heic to PNG or JPEG",
        "after/good.png": "same name",
    }
    for name, sentence in expected.items():
        assert sum(line.startswith(f"{tmp_path / name}: ") and sentence in line for line in problems) == 1, name
    assert len(problems) == len(expected)
    assert contents(tmp_path) == untouched
    scan = scan_folders(config(tmp_path))
    assert list(scan.problems) == problems
    assert [p.key for p in scan.dataset.pairs] == ["also_good", "good"]


def test_a_pair_with_several_problems_has_them_all_named(tmp_path):
    pair(tmp_path, "a", references=("one", "two"))
    text(tmp_path / "after/a.png", b"")
    text(tmp_path / "after/a.txt", b"")
    (tmp_path / "one/a.png").unlink()
    text(tmp_path / "two/a.png", b"x")
    assert len(problems_of(config(tmp_path, "one", "two"))) == 4


def test_missing_folders_are_named_all_at_once(tmp_path):
    text(tmp_path / "after", "a file")
    problems = problems_of(config(tmp_path, "none"))
    assert problems == [
        f"{tmp_path / 'after'}: this is a file, not a folder.",
        f"{tmp_path / 'none'}: the folder does not exist.",
    ]


def test_targets_that_all_lack_a_caption_get_one_line(tmp_path):
    for key in "abc":
        pair(tmp_path, key)
        (tmp_path / "after" / f"{key}.txt").unlink()
    (problem,) = problems_of(config(tmp_path))
    assert problem.startswith(f"{tmp_path / 'after'}: none of the 3 targets has a caption. One text for all: ")
    assert "such as a.txt" in problem
    text(tmp_path / "after/b.txt", b"draw it")
    assert len(problems_of(config(tmp_path))) == 2


def test_a_misspelt_folder_has_a_suggestion_and_no_other_notes(tmp_path):
    pair(tmp_path, "a")
    dataset = dataclasses.replace(config(tmp_path), target_dir=str(tmp_path / "aftr"))
    with pytest.raises(DatasetError) as caught:
        pair_folders(dataset)
    assert caught.value.problems == (f"{tmp_path / 'aftr'}: the folder does not exist. Did you mean 'after'?",)
    assert "not used" not in str(caught.value)


def test_a_missing_reference_folder_does_not_flood_the_report(tmp_path):
    for key in "abc":
        pair(tmp_path, key)
    assert problems_of(config(tmp_path, "before", "gone")) == [f"{tmp_path / 'gone'}: the folder does not exist."]


def test_a_folder_without_pictures_is_an_error(tmp_path):
    picture(tmp_path / "before/a.png")
    (tmp_path / "after").mkdir()
    assert "no pictures" in problems_of(config(tmp_path))[0]


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        (("after",), r"target folder .* and reference folder 1 .* are the same folder"),
        (("before", "before"), r"reference folder 1 .* and reference folder 2 .* are the same folder"),
        (("before", "before/../before"), "are the same folder"),
        (("link",), "are the same folder"),
        (("after/sub",), "are nested"),
        ((".",), "are nested"),
    ],
)
def test_one_folder_can_not_play_two_parts(tmp_path, references, sentence):
    pair(tmp_path, "a")
    pair(tmp_path, "sub/b")
    (tmp_path / "link").symlink_to(tmp_path / "after")
    with pytest.raises(DatasetError, match=sentence):
        pair_folders(config(tmp_path, *references))


def test_links_may_not_leave_the_folder(tmp_path):
    for key in ("a", "b", "c", "d"):
        pair(tmp_path, key)
    secret = picture(tmp_path / "elsewhere/secret.png")
    note = text(tmp_path / "elsewhere/secret.txt", "the password")
    after = tmp_path / "after"
    for name, goal in (("a.png", secret), ("b.txt", note), ("c.png", after / "nowhere.png")):
        (after / name).unlink()
        (after / name).symlink_to(goal)
    (after / "more").symlink_to(tmp_path / "elsewhere")
    (after / "round.png").symlink_to(after / "round.png")
    scan = scan_folders(config(tmp_path))
    for name, sentence in {
        "a.png": "points outside the dataset's folder",
        "b.txt": "points outside the dataset's folder",
        "c.png": "can't be reached",
        "more": "links to folders aren't followed",
        "round.png": "can't be reached",
    }.items():
        assert sum(f"{after / name}: " in line and sentence in line for line in scan.problems) == 1, name
    assert [p.key for p in scan.dataset.pairs] == ["d"]
    assert "password" not in "".join(scan.problems)


@pytest.mark.skipif(os.name == "nt", reason="Windows folders can't contain named pipes")
def test_a_pipe_is_not_opened(tmp_path):
    pair(tmp_path, "a")
    os.mkfifo(tmp_path / "after/pipe.png")
    assert ["not a regular file" in line for line in problems_of(config(tmp_path))] == [True]


def test_links_within_the_folder_are_followed(tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "after/b.png").symlink_to(tmp_path / "after/a.png")
    (tmp_path / "before/b.png").symlink_to("a.png")
    text(tmp_path / "after/b.txt")
    assert [p.key for p in pair_folders(config(tmp_path)).pairs] == ["a", "b"]


@pytest.mark.skipif(os.name == "nt", reason="Windows file names can't contain line breaks")
def test_names_that_break_lines_or_unicode_do_not_break_the_report(tmp_path):
    picture(tmp_path / "after/two\nlines.png")
    bad = os.fsencode(tmp_path / "after") + b"/br\xf8ken.png"
    try:
        Path(os.fsdecode(bad)).write_bytes(b"")
    except OSError:
        bad = b""  # this file system accepts only Unicode
    problems = problems_of(config(tmp_path, "before"))
    assert any(r"two\nlines.png" in line for line in problems)
    if bad:
        assert any("valid Unicode" in line for line in problems)
    "\n".join(problems).encode()
    folder_state(config(tmp_path))


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b"one", ("one",)),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", ("one", "two")),
        (b"  one  \n\n\n two\rthree\n", ("one", "two", "three")),
        ("变成蓝色\nsmørbrød".encode(), ("变成蓝色", "smørbrød")),
        ("one\u2028still one".encode(), ("one\u2028still one",)),
    ],
)
def test_each_line_that_is_not_blank_is_a_caption(tmp_path, content, captions):
    assert read_caption_file(text(tmp_path / "a.txt", content)) == captions


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n", "is empty"),
        (b"caf\xe9", "not UTF-8"),
        ("blue".encode("utf-16"), "looks like UTF-16"),
        ("blue".encode("utf-16-le"), "looks like UTF-16"),
        (b"x" * 1_000_001, "larger than 1 MB"),
    ],
)
def test_captions_that_can_not_be_read_name_their_file(tmp_path, content, sentence):
    with pytest.raises(DatasetError, match=rf"a\.txt: .*{sentence}"):
        read_caption_file(text(tmp_path / "a.txt", content))


def test_caption_strategies(tmp_path):
    pair(tmp_path, "sub/make_it_blue-ish")
    (tmp_path / "after/sub/make_it_blue-ish.txt").rename(tmp_path / "after/sub/make_it_blue-ish.TXT")
    found = {
        strategy: pair_folders(config(tmp_path, caption_strategy=strategy, instance_prompt=" All of them "))
        .pairs[0]
        .captions
        for strategy in ("textfile", "filename", "instanceprompt")
    }
    assert found == {
        "textfile": ("Make it blue.",),
        "filename": ("make it blue-ish",),
        "instanceprompt": ("All of them",),
    }


def test_a_name_without_words_is_no_caption(tmp_path):
    pair(tmp_path, "___")
    assert "contains no words" in problems_of(config(tmp_path, caption_strategy="filename"))[0]
