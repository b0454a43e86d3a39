"""Fingerprint, folder state and repr of a dataset; progress and interruption of pairing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from tests.support.pair_files import config, pair, picture, text
from trainer_core.data import images
from trainer_core.data.pairing import folder_state, pair_folders
from trainer_core.errors import Interrupted
from trainer_core.events import SilentObserver, Stop


def test_the_fingerprint_follows_names_pixels_and_captions_and_nothing_else(tmp_path):
    def fingerprint() -> str:
        return pair_folders(config(tmp_path)).fingerprint

    pair(tmp_path, "a", seed=1)
    pair(tmp_path, "b", seed=2)
    first = fingerprint()
    os.utime(tmp_path / "after/a.png", (1, 1))
    text(tmp_path / "after/read.md")
    picture(tmp_path / "before/extra.png")
    assert fingerprint() == first
    seen = {first}
    for change in (
        lambda: picture(tmp_path / "before/a.png", seed=77),
        lambda: picture(tmp_path / "after/a.png", seed=78),
        lambda: text(tmp_path / "after/a.txt", "Make it red."),
        lambda: [path.rename(path.with_stem("a2")) for path in tmp_path.glob("*/a.*")],
        lambda: pair(tmp_path, "c", seed=9),
    ):
        change()
        seen.add(fingerprint())
    assert len(seen) == 6


def test_moving_the_folders_leaves_the_fingerprint(tmp_path):
    pair(tmp_path / "x", "a")
    first = pair_folders(config(tmp_path / "x")).fingerprint
    (tmp_path / "x").rename(tmp_path / "y")
    assert pair_folders(config(tmp_path / "y")).fingerprint == first


def test_folder_state_follows_every_change_without_opening_a_file(tmp_path, monkeypatch):
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("opened a file")

    states = []
    changes = (
        lambda: pair(tmp_path, "a"),
        lambda: picture(tmp_path / "before/deep/er/b.png"),
        lambda: text(tmp_path / "after/a.txt", "x"),
        lambda: os.utime(tmp_path / "after/a.png", (5, 5)),
        lambda: (picture(tmp_path / "after/a.png", size=(64, 64)), os.utime(tmp_path / "after/a.png", (5, 5))),
        lambda: (tmp_path / "before/a.png").rename(tmp_path / "before/c.png"),
        lambda: (tmp_path / "before/c.png").unlink(),
        lambda: (tmp_path / "after/broken.png").symlink_to(tmp_path / "nowhere"),
    )
    for change in changes:
        change()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", forbidden)
            patch.setattr(Image, "open", forbidden)
            states.append(folder_state(config(tmp_path)))
            assert folder_state(config(tmp_path)) == states[-1]
    assert len(set(states)) == len(changes)
    assert folder_state(config(tmp_path, caption_strategy="filename")) != states[-1]
    assert folder_state(config(tmp_path, "gone"))


def test_the_description_of_a_dataset_is_short(tmp_path):
    for key in "abcdefgh":
        pair(tmp_path, key)
    dataset = pair_folders(config(tmp_path))
    assert repr(dataset) == f"EditDataset(8 pairs, 1 reference folder, {dataset.fingerprint})"
    with pytest.raises(AttributeError):
        dataset.fingerprint = "other"


class Watcher(SilentObserver):
    def __init__(self, stop_after: int = 1000) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.stop_after = stop_after

    def on_progress(self, phase: str, done: int, total: int) -> None:
        self.seen.append((phase, done, total))

    def should_stop(self) -> Stop:
        return Stop.PAUSE if len(self.seen) >= self.stop_after else Stop.NO


def test_progress_counts_every_picture(tmp_path):
    for key in "abc":
        pair(tmp_path, key)
    watcher = Watcher()
    pair_folders(config(tmp_path), watcher)
    assert watcher.seen == [("Checking pictures", done, 6) for done in range(1, 7)]


def test_a_stop_is_heard_at_the_next_picture(tmp_path, monkeypatch):
    for number in range(300):
        pair(tmp_path, f"p{number}")
    watcher, decoded = Watcher(stop_after=2), []
    decode = images.open_picture_file
    monkeypatch.setattr(
        "trainer_core.data.checking.open_picture_file", lambda path: decoded.append(path) or decode(path)
    )
    with pytest.raises(Interrupted):
        pair_folders(config(tmp_path), watcher)
    assert len(watcher.seen) == 2
    assert len(decoded) < 600


def test_grey_filling_by_others_is_noted(tmp_path, monkeypatch):
    pair(tmp_path, "a")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "LOAD_TRUNCATED_IMAGES" in pair_folders(config(tmp_path)).notes[0]
