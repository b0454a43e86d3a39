"""The demo's pairs: disjoint parts of real photographs, and their negatives as targets."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import demo_pairs
from trainer_core.demo.pictures import CAPTION, PAIRS, copy_demo_pairs


def test_pairs_have_pictures_targets_and_captions(tmp_path: Path) -> None:
    copy_demo_pairs(tmp_path)
    references = sorted((tmp_path / "reference").iterdir())
    assert len(references) == demo_pairs.NUM_PAIRS
    for path in references:
        target = tmp_path / "target" / path.name
        with Image.open(path) as reference, Image.open(target) as edited:
            assert reference.size == edited.size == (demo_pairs.SIDE, demo_pairs.SIDE)
            assert not reference.info and not edited.info, "they are sRGB, and say nothing else"
            assert (np.array(reference).astype(int) + np.array(edited) == 255).all()
        assert target.with_suffix(".txt").read_text(encoding="utf-8").strip() == CAPTION


def test_the_pairs_that_ship_are_small_and_as_the_tool_makes_them(tmp_path: Path) -> None:
    demo_pairs.make_demo_pairs(tmp_path)
    names = sorted(path.relative_to(PAIRS) for path in PAIRS.glob("*/*"))
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*"))
    assert len(names) == 3 * demo_pairs.NUM_PAIRS
    for name in names:
        if name.suffix == ".png":
            with Image.open(PAIRS / name) as one, Image.open(tmp_path / name) as other:
                # Another version of Pillow may decode a JPEG photograph or round a resized one differently by a level.
                assert np.abs(np.array(one).astype(int) - np.array(other)).max() <= 3
        else:
            assert (PAIRS / name).read_bytes() == (tmp_path / name).read_bytes()
    assert sum(path.stat().st_size for path in PAIRS.rglob("*") if path.is_file()) <= 3_000_000


def test_every_photograph_is_in_the_list_of_licences_and_has_a_held_out_pair() -> None:
    rows = (PAIRS / "LICENCES.md").read_text(encoding="utf-8").splitlines()
    listed = {row.split("|")[1].strip() for row in rows if row.startswith("| ")} - {"Photograph", "---"}
    shipped = {path.stem.split("_", 1)[1] for path in (PAIRS / "reference").iterdir()}
    held_out = (PAIRS / "held_out.txt").read_text(encoding="utf-8").split()
    assert len(held_out) == len(shipped) == len({name.split("_", 1)[1] for name in held_out})
    assert all((PAIRS / "reference" / f"{name}.png").is_file() for name in held_out)
    assert listed == shipped == {name.split(".")[0] for name in demo_pairs.DEMO_PHOTOGRAPHS}


def test_tiles_are_parts_of_photographs_and_share_no_pixel() -> None:
    tiles = demo_pairs.demo_tiles(40)
    assert len({name for name, _ in tiles}) == len(demo_pairs.DEMO_PHOTOGRAPHS)
    assert len({tile.tobytes() for _, tile in tiles}) == 40
    sources = {name.split(".")[0]: np.array(demo_pairs.photograph(name)) for name in demo_pairs.DEMO_PHOTOGRAPHS}
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


def test_demo_photographs_are_not_those_of_the_pre_training() -> None:
    assert not set(demo_pairs.DEMO_PHOTOGRAPHS) & set(demo_pairs.PRETRAINING_PHOTOGRAPHS)
    assert demo_pairs.photograph("astronaut.png").size == (512, 512)


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 9999"):
        demo_pairs.demo_tiles(9999)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FileNotFoundError, match=r"chelsea\.png comes with skimage"):
        demo_pairs.photograph("chelsea.png")
