"""Changes to data sets: partners, captions, sides, marks, removal; killed half-way, and through links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.data_sets import files, made
from tests.support.pair_files import picture, text
from trainer_core.data_sets import changes, folders, moves
from trainer_core.data_sets.folders import NotFoundError, find_data_sets, open_data_set
from trainer_core.data_sets.moves import UNFINISHED, changing, finish
from trainer_core.data_sets.reading import read_data_set, revision
from trainer_core.data_sets.trash import empty_trash, read_trash
from trainer_core.data_sets.use import pairs_of, state_of
from trainer_core.errors import DatasetError


def test_match_makes_room(tmp_path: Path):
    mine = made(tmp_path, "a", "b")
    bytes_of = {key: (mine.folder("reference") / f"{key}.jpg").read_bytes() for key in "ab"}
    changes.match(mine, [("reference", "b.jpg", "a.png")])
    assert (mine.folder("reference") / "a.jpg").read_bytes() == bytes_of["b"]
    assert (mine.folder("reference") / "a-2.jpg").read_bytes() == bytes_of["a"]
    changes.match(mine, [("reference", "a.jpg", "b.png"), ("reference", "a-2.jpg", "a.png")])
    assert {key: (mine.folder("reference") / f"{key}.jpg").read_bytes() for key in "ab"} == bytes_of
    assert sorted(path.name for path in mine.folder("reference").iterdir()) == ["a.jpg", "b.jpg"]
    assert list((mine.root / folders.TRASH).iterdir()) == []


def test_match_refuses_what_it_cannot_do(tmp_path: Path):
    mine = made(tmp_path, "a", "b")
    before = files(tmp_path)
    for pairs in (
        [("reference", "a.jpg", "a.png"), ("reference", "b.jpg", "a.png")],
        [("reference", "a.jpg", "gone.png")],
        [("reference", "../target/a.png", "a.png")],
        [("target", "a.png", "b.png")],
        [("reference_2", "a.jpg", "a.png")],
    ):
        with pytest.raises(DatasetError):
            changes.match(mine, pairs)
    assert files(tmp_path) == before


def test_captions(tmp_path: Path):
    mine = made(tmp_path, "a", "b", "c/d")
    text(mine.folder("target") / "b.png.txt", "old")
    changes.write_captions(mine, {"a": " turn it <b>blue</b> ", "b": "new", "c/d": "第一"})
    assert {pair.key: pair.caption for pair in read_data_set(mine).pairs} == {
        "a": "turn it <b>blue</b>",
        "b": "new",
        "c/d": "第一",
    }
    assert (mine.folder("target") / "b.png.txt").read_bytes() == b"new\n"
    changes.write_captions(mine, {"a": " \n"})
    assert not (mine.folder("target") / "a.txt").exists()


def test_one_caption_for_all_can_be_undone(tmp_path: Path):
    mine = made(tmp_path, "a", "b")
    changes.write_captions(mine, {"a": "my own words"})
    token = changes.write_caption_of_all(mine, "the same")
    assert [pair.caption for pair in read_data_set(mine).pairs] == ["the same", "the same"]
    assert changes.restore(mine, token) == 1
    assert [pair.caption for pair in read_data_set(mine).pairs] == ["my own words", "the same"]
    assert changes.write_caption_of_all(mine, "the same") != ""
    assert changes.write_caption_of_all(mine, "the same") == ""


def test_the_caption_of_all_is_changed_in_place(tmp_path: Path):
    """Otherwise each change of it would put as many files into the trash as there are pairs."""
    mine = made(tmp_path, "a", "b")
    for words in ("turn it red", "turn it blue"):
        assert changes.write_caption_of_all(mine, words) == ""
        assert [pair.caption for pair in read_data_set(mine).pairs] == [words, words]
    assert not (mine.root / folders.TRASH).exists()
    token = changes.write_caption_of_all(mine, " ")
    assert changes.restore(mine, token) == 2
    assert [pair.caption for pair in read_data_set(mine).pairs] == ["turn it blue", "turn it blue"]


@pytest.mark.parametrize(
    "captions", [{"gone": "x"}, {"../a": "x"}, {"a": 5}, {"a": "x" * 20_001}, {"a": "\0"}, {5: "x"}]
)
def test_captions_that_are_refused(captions: dict[object, object], tmp_path: Path):
    mine = made(tmp_path, "a")
    before = files(tmp_path)
    with pytest.raises(DatasetError):
        changes.write_captions(mine, {"a": "good", **captions})
    assert files(tmp_path) == before


def test_a_caption_that_is_no_text_is_kept_in_the_trash(tmp_path: Path):
    mine = made(tmp_path, "a")
    text(mine.folder("target") / "a.txt", b"\xff\xfeh\x00i\x00")
    assert "UTF-16" in read_data_set(mine).notes[0]
    changes.write_captions(mine, {"a": "hi"})
    assert [pair.caption for pair in read_data_set(mine).pairs] == ["hi"]
    (kept,) = (mine.root / folders.TRASH).rglob("a.txt")
    assert kept.read_bytes() == b"\xff\xfeh\x00i\x00"


def test_swap(tmp_path: Path):
    mine = made(tmp_path, "a", "b", "s/c")
    picture(mine.folder("target") / "alone.png")
    text(mine.folder("target") / "a.png.txt", "words")
    before = files(mine.root)
    changes.swap_sides(mine, ["a"])
    after = files(mine.root)
    assert after["target/a.jpg"] == before["reference/a.jpg"]
    assert after["reference/a.png"] == before["target/a.png"]
    assert read_data_set(mine).pairs[0].caption == "words"
    assert sorted(after.values()) == sorted(before.values())
    changes.swap_sides(mine, None)
    assert files(mine.root)["target/s/c.jpg"] == before["reference/s/c.jpg"]
    with pytest.raises(NotFoundError, match="alone"):
        changes.swap_sides(mine, ["a", "alone"])


class _Died(BaseException):
    """The process was killed."""


@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("dies_after", range(9))
def test_a_swap_that_is_killed_is_finished_later(
    dies_after: int, extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = made(tmp_path, "a", "b", "c")
    for key in "abc":  # with equal extensions, each name is taken until the other picture has gone
        (mine.folder("reference") / f"{key}.jpg").rename(mine.folder("reference") / f"{key}.{extension}")
    before = files(mine.root)
    real, done = moves.rename, []

    def rename(old: Path, new: Path) -> Path:
        if len(done) == dies_after:
            raise _Died
        done.append(new)
        return real(old, new)

    monkeypatch.setattr(moves, "rename", rename)
    with pytest.raises(_Died), changing(mine):
        changes.swap_sides(mine, None)
    assert sorted(data for name, data in files(mine.root).items() if name != UNFINISHED) == sorted(before.values())
    monkeypatch.setattr(moves, "rename", real)
    finish(mine)
    after = files(mine.root)
    assert after == {
        **{f"target/{key}.{extension}": before[f"reference/{key}.{extension}"] for key in "abc"},
        **{f"reference/{key}.png": before[f"target/{key}.png"] for key in "abc"},
    }


def test_a_swap_that_was_killed_before_its_list_is_deleted_changes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = made(tmp_path, "a")
    before = files(mine.root)
    monkeypatch.setattr(moves, "_remove_list", lambda _: None)
    changes.swap_sides(mine, None)
    monkeypatch.undo()
    finish(mine)
    after = files(mine.root)
    assert after == {"target/a.jpg": before["reference/a.jpg"], "reference/a.png": before["target/a.png"]}


def test_a_swap_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = made(tmp_path, "a", "b")
    before, real, calls = files(mine.root), moves.rename, []

    def rename(old: Path, new: Path) -> Path:
        calls.append(new)
        if len(calls) == 4:
            raise PermissionError(13, "Permission denied", str(old))
        return real(old, new)

    monkeypatch.setattr(moves, "rename", rename)
    with pytest.raises(OSError, match="permission denied"):
        changes.swap_sides(mine, None)
    assert files(mine.root) == before


@pytest.mark.parametrize(
    "listed",
    [
        "{",
        "[]",
        '{"phase": 0, "phases": [[["target/a.png", "../../out.png"]]]}',
        '{"phase": 0, "phases": [[["target/a.png", "/tmp/out.png"]]]}',
        '{"phase": 0, "phases": [[["target/a.png", "C:\\\\out.png"]]]}',
        '{"phase": -1, "phases": []}',
        '{"phase": 0, "phases": [["target/a.png"]]}',
    ],
)
def test_a_list_of_renames_from_a_stranger(listed: str, tmp_path: Path):
    mine = made(tmp_path, "a")
    text(mine.root / UNFINISHED, listed)
    before = files(tmp_path)
    with pytest.raises(DatasetError, match="can't be used"), changing(mine):
        pass
    assert files(tmp_path) == before


def test_hold_out(tmp_path: Path):
    mine = made(tmp_path, "a", "b", "s/c")
    text(mine.root / "held_out.txt", "mine\n")
    changes.hold_out(mine, ["b", "s/c"], held_out=True)
    assert (mine.root / "held_out.txt").read_text() == "b\nmine\ns/c\n"
    changes.hold_out(mine, ["b"], held_out=False)
    assert [pair.key for pair in read_data_set(mine).pairs if pair.held_out] == ["s/c"]
    with pytest.raises(NotFoundError, match="gone"):
        changes.hold_out(mine, ["gone"], held_out=True)
    assert (mine.root / "held_out.txt").read_text() == "mine\ns/c\n"


def test_a_list_of_held_out_pairs_that_cannot_be_read_is_kept_and_told(tmp_path: Path):
    mine = made(tmp_path, "a", "b")
    states = {state_of(mine, ""), revision(mine)}
    text(mine.root / "held_out.txt", "b\n".encode("utf-16"))
    assert not states & {state_of(mine, ""), revision(mine)}
    before = files(mine.root)
    with pytest.raises(DatasetError, match=r"The list of held-out pairs, held_out\.txt, can't be read"):
        changes.hold_out(mine, ["a"], held_out=True)
    assert files(mine.root) == before
    found = read_data_set(mine)
    assert not any(pair.held_out for pair in found.pairs) and "can't be read" in found.notes[0]
    with pytest.raises(DatasetError, match=r"held_out\.txt, can't be read"):
        pairs_of(mine, "turn it blue")


def test_delete_and_restore(tmp_path: Path):
    mine = made(tmp_path, "a", "s/b")
    changes.write_captions(mine, {"a": "words of a", "s/b": "words of b"})
    before = files(mine.root)
    token = changes.delete(mine, [("target", "a.png"), ("reference", "a.jpg"), ("target", "s/b.png")])
    assert sorted(name for name in files(mine.root) if not name.startswith(".")) == ["reference/s/b.jpg"]
    assert changes.restore(mine, token) == 5
    assert files(mine.root) == before
    with pytest.raises(NotFoundError):
        changes.restore(mine, token)


def test_restore_replaces_nothing(tmp_path: Path):
    mine = made(tmp_path, "a")
    changes.write_captions(mine, {"a": "old words"})
    old = (mine.folder("target") / "a.png").read_bytes()
    token = changes.delete(mine, [("target", "a.png")])
    picture(mine.folder("target") / "a.png", seed=77)
    changes.write_captions(mine, {"a": "new words"})
    changes.restore(mine, token)
    after = files(mine.root)
    assert after["target/a-2.png"] == old
    assert (after["target/a.txt"], after["target/a-2.txt"]) == (b"new words\n", b"old words\n")


@pytest.mark.parametrize("token", ["", "..", "../..", "x", "0" * 16, None, 5, "0" * 15 + "/"])
def test_restore_of_what_was_not_deleted(token: object, tmp_path: Path):
    with pytest.raises(NotFoundError):
        changes.restore(made(tmp_path, "a"), token)


@pytest.mark.parametrize(
    "file", ["gone.png", "../reference/a.jpg", "/etc/passwd", "", ".", "a.png/", "A.PNG\0", "..\\a"]
)
def test_delete_of_what_is_not_there(file: str, tmp_path: Path):
    mine = made(tmp_path, "a")
    before = files(tmp_path)
    for side in ("target", "nowhere", "../mine/target"):
        with pytest.raises(NotFoundError):
            changes.delete(mine, [(side, file)])
    assert files(tmp_path) == before


# Links


def test_a_link_to_another_picture_is_deleted_without_it(tmp_path: Path):
    mine = made(tmp_path, "a")
    (mine.folder("target") / "b.png").symlink_to("a.png")
    before = files(mine.root)
    token = changes.delete(mine, [("target", "b.png")])
    assert sorted(path.name for path in mine.folder("target").iterdir()) == ["a.png"]
    changes.restore(mine, token)
    assert files(mine.root) == before


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    picture(folder / "target" / "a.png")
    picture(folder / "reference" / "a.png")
    return folder


def test_a_data_set_that_is_a_link_out(outside: Path, tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "linked").symlink_to(outside)
    assert find_data_sets(root) == []
    with pytest.raises(NotFoundError, match="is a link"):
        open_data_set(root, "linked")


def test_a_side_that_is_a_link_out(outside: Path, tmp_path: Path):
    made(tmp_path / "in", "a")
    (tmp_path / "in" / "mine" / "reference_2").symlink_to(outside / "reference")
    with pytest.raises(NotFoundError, match="reference_2 in it is a link"):
        open_data_set(tmp_path / "in", "mine")


def test_a_trash_that_is_a_link_out(outside: Path, tmp_path: Path):
    mine = made(tmp_path / "in", "a")
    (mine.root / ".trash").symlink_to(outside)
    before = files(tmp_path)
    for change in (
        lambda: changes.delete(mine, [("target", "a.png")]),
        lambda: changes.swap_sides(mine, None),
        lambda: changes.restore(mine, "0" * 16),
        lambda: empty_trash(mine, read_trash(mine).state),
    ):
        with pytest.raises(DatasetError):
            change()
    assert files(tmp_path) == before


def test_only_what_was_shown_of_the_trash_is_deleted(outside: Path, tmp_path: Path):
    mine = made(tmp_path / "in", "a", "b")
    first = changes.delete(mine, [("target", "a.png")])
    trash = mine.root / folders.TRASH
    last = changes.delete(mine, [("target", "b.png"), ("reference", "b.jpg")])
    (trash / first / "link").symlink_to(outside)
    os.utime(trash / first, (1, 1))
    (trash / ("0" * 16)).symlink_to(outside)
    text(trash / "own.txt", "not from a removal")
    shown = read_trash(mine)
    assert (shown.files, shown.newest) == (4, last)  # the link counts as a file
    assert sorted(shown.newest_files) == ["reference/b.jpg", "target/b.png"]
    before = files(tmp_path)
    changes.restore(mine, last)
    again = changes.delete(mine, [("target", "b.png"), ("reference", "b.jpg")])
    now = read_trash(mine)
    assert (now.files, now.bytes) == (shown.files, shown.bytes)  # but they are those of another removal
    for state in (shown.state, "", None, True):
        with pytest.raises(DatasetError, match="has changed, so nothing was deleted"):
            empty_trash(mine, state)
    assert sorted(files(tmp_path).values()) == sorted(before.values())
    changes.restore(mine, again)
    assert read_trash(mine).newest == first
    kept = files(outside)
    empty_trash(mine, read_trash(mine).state)
    assert sorted(path.name for path in trash.iterdir()) == ["0" * 16, "own.txt"]
    assert files(outside) == kept
    assert read_trash(mine).newest == "" and (mine.folder("target") / "b.png").exists()
    with pytest.raises(NotFoundError):
        changes.restore(mine, first)


def test_captions_and_marks_that_are_links_out(outside: Path, tmp_path: Path):
    mine = made(tmp_path / "in", "a")
    text(outside / "secret.txt", "a secret")
    (mine.folder("target") / "a.txt").symlink_to(outside / "secret.txt")
    (mine.root / "held_out.txt").symlink_to(outside / "secret.txt")
    found = read_data_set(mine)
    assert [(pair.caption, pair.held_out) for pair in found.pairs] == [("", False)]
    for change in (
        lambda: changes.write_captions(mine, {"a": "x"}),
        lambda: changes.hold_out(mine, ["a"], held_out=True),
    ):
        with pytest.raises(DatasetError, match="is a link"):
            change()
    assert (outside / "secret.txt").read_text() == "a secret"
