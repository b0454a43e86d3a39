"""The demo's pairs: disjoint parts of real photographs, and their negatives as targets."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from trainer_core.demo import pictures
from trainer_core.errors import MissingPackageError


def test_pairs_have_pictures_targets_and_captions(tmp_path):
    pictures.make_demo_pairs(tmp_path)
    references = sorted((tmp_path / "reference").glob("*.png"))
    assert len(references) == pictures.NUM_PAIRS
    for path in references:
        target = tmp_path / "target" / path.name
        with Image.open(path) as reference, Image.open(target) as edited:
            assert reference.size == edited.size == (pictures.SIDE, pictures.SIDE)
            assert (np.array(reference).astype(int) + np.array(edited) == 255).all()
        assert target.with_suffix(".txt").read_text(encoding="utf-8").strip() == pictures.CAPTION


def test_pairs_are_the_same_every_time(tmp_path):
    for part in ("a", "b"):
        pictures.make_demo_pairs(tmp_path / part)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(names) == 3 * pictures.NUM_PAIRS
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_tiles_are_parts_of_photographs_and_share_no_pixel():
    tiles = pictures.demo_tiles(40)
    assert len({name for name, _ in tiles}) == len(pictures.DEMO_PHOTOGRAPHS)
    assert len({tile.tobytes() for _, tile in tiles}) == 40
    sources = {name.split(".")[0]: np.array(pictures.photograph(name)) for name in pictures.DEMO_PHOTOGRAPHS}
    taken = {name: np.zeros(source.shape[:2], int) for name, source in sources.items()}
    for name, tile in tiles:
        top, left = _find(np.array(tile), sources[name])
        taken[name][top : top + tile.height, left : left + tile.width] += 1
    assert all(counts.max() == 1 for counts in taken.values())


def _find(tile: np.ndarray, source: np.ndarray) -> tuple[int, int]:
    candidates = np.argwhere((source[: -tile.shape[0] + 1, : -tile.shape[1] + 1] == tile[0, 0]).all(-1))
    for top, left in candidates:
        if (source[top : top + tile.shape[0], left : left + tile.shape[1]] == tile).all():
            return int(top), int(left)
    raise AssertionError("no such part")


def test_demo_photographs_are_not_those_of_the_pre_training():
    assert not set(pictures.DEMO_PHOTOGRAPHS) & set(pictures.PRETRAINING_PHOTOGRAPHS)
    assert pictures.photograph("astronaut.png").size == (512, 512)


def test_too_many_pairs_are_refused():
    with pytest.raises(ValueError, match="fewer than 9999"):
        pictures.demo_tiles(9999)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingPackageError, match="pip install scikit-image"):
        pictures.photograph("chelsea.png")
