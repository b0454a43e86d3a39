"""Pairs made from pictures in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer_core.data.graph_pairs import pair_pictures
from trainer_core.data.images import open_picture
from trainer_core.errors import DatasetError


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)) for n in range(count)]


def test_pictures_come_back_as_they_were_and_in_order(tmp_path: Path) -> None:
    targets, first, second = pictures(3), pictures(3, 1), pictures(3, 2)
    dataset = pair_pictures(targets, [first, second], ["one\ntwo", "größer", "three"], tmp_path)
    assert [pair.captions for pair in dataset.pairs] == [("one\ntwo",), ("größer",), ("three",)]
    for number, pair in enumerate(dataset.pairs):
        for path, picture in zip((pair.target, *pair.references), (targets, first, second), strict=True):
            assert open_picture(path).tobytes() == picture[number].tobytes()


def test_equal_content_is_written_once_and_other_content_elsewhere(tmp_path: Path) -> None:
    def make(seed: int, caption: str) -> str:
        return str(pair_pictures(pictures(2, seed), [pictures(2, 9)], [caption], tmp_path).target_dir)

    first = make(0, "a")
    written = {path: path.stat().st_mtime_ns for path in Path(first).iterdir()}
    assert make(0, "a") == first
    assert written == {path: path.stat().st_mtime_ns for path in Path(first).iterdir()}
    assert len({first, make(1, "a"), make(0, "b")}) == 3
    assert len(list(tmp_path.iterdir())) == 3  # no temporary folder is left


def test_numbers_that_disagree_are_all_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        pair_pictures(pictures(3), [pictures(2), pictures(3)], ["a", " "], tmp_path)
    assert len(caught.value.problems) == 3
    for words in ("reference_1 has 2 pictures, but target has 3", "2 captions for 3 targets", "empty: 1"):
        assert any(words in problem for problem in caught.value.problems)
    with pytest.raises(DatasetError, match="target has no pictures"):
        pair_pictures([], [[]], [], tmp_path)
    assert not list(tmp_path.iterdir())
