"""Results of picture checks are cached for as long as the file is unchanged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support.pair_files import config, pair, picture, problems_of, text
from trainer_core.data import checking
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.errors import DatasetError


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the picture files opened so far. Also lets checks of just-written files be cached."""
    names: list[str] = []
    opened = checking.open_picture_file
    monkeypatch.setattr(checking, "open_picture_file", lambda path: names.append(path.name) or opened(path))
    monkeypatch.setattr(checking, "_SETTLED_NS", 0)
    return names


def paired(root: Path) -> EditDataset:
    """The paired dataset. Check results are cached in `checked`."""
    return pair_folders(config(root), checked_dir=root / "checked")


def test_the_second_time_no_picture_is_opened(tmp_path: Path, decoded: list[str]) -> None:
    for key in "abc":
        pair(tmp_path, key)
    first = paired(tmp_path)
    assert len(decoded) == 6
    assert paired(tmp_path) == first == pair_folders(config(tmp_path))
    assert len(decoded) == 12, "only the call without a cache may open them again"


def test_a_picture_that_changed_in_any_way_is_opened_again(tmp_path: Path, decoded: list[str]) -> None:
    for key in "abcd":
        pair(tmp_path, key)
    first = paired(tmp_path)
    decoded.clear()
    picture(tmp_path / "before/b.png", seed=200)
    os.utime(tmp_path / "after/c.png")
    replacement = picture(tmp_path / "elsewhere.png", seed=250)
    os.utime(replacement, ns=(0, (tmp_path / "after/d.png").stat().st_mtime_ns))
    replacement.replace(tmp_path / "after/d.png")
    second = paired(tmp_path)
    assert sorted(decoded) == ["b.png", "c.png", "d.png"]
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == pair_folders(config(tmp_path)).fingerprint


@pytest.mark.skipif(os.name == "nt", reason="Windows does not record when a file's metadata changed")
def test_a_picture_that_kept_its_size_and_time_is_opened_again(tmp_path: Path, decoded: list[str]) -> None:
    pair(tmp_path, "a")
    paired(tmp_path)
    decoded.clear()
    same_size = tmp_path / "after/a.png"
    before = same_size.stat()
    same_size.write_bytes(same_size.read_bytes())
    os.utime(same_size, ns=(before.st_atime_ns, before.st_mtime_ns))
    paired(tmp_path)
    assert decoded == ["a.png"]


def test_a_file_written_a_moment_ago_is_not_remembered(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path, "a")
    monkeypatch.setattr(checking, "_SETTLED_NS", 3600 * 10**9)
    paired(tmp_path)
    paired(tmp_path)
    assert len(decoded) == 4
    later = time.time_ns() + 3601 * 10**9
    monkeypatch.setattr(checking.time, "time_ns", lambda: later)
    for _ in range(2):
        paired(tmp_path)
    assert len(decoded) == 6


def test_problems_are_looked_at_again(tmp_path: Path, decoded: list[str]) -> None:
    pair(tmp_path, "a")
    text(tmp_path / "after/a.png", b"no picture")
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"a\.png: this file is damaged or not a supp"):
            paired(tmp_path)
    assert decoded.count("a.png") == 3, "the intact reference must be opened once, the damaged target twice"
    assert len(problems_of(config(tmp_path))) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"format": 1, "pictures": [1]}', b"\xff\x00", b'{"format": 0}']
)
def test_a_memory_that_can_not_be_read_is_none(tmp_path: Path, decoded: list[str], content: bytes) -> None:
    pair(tmp_path, "a")
    first = paired(tmp_path)
    memory = next((tmp_path / "checked").iterdir())
    memory.write_bytes(content)
    assert paired(tmp_path) == first
    assert len(decoded) == 4
    paired(tmp_path)
    assert len(decoded) == 4, "the cache must be rewritten"


def test_a_mask_is_remembered_with_its_brightness(tmp_path: Path, decoded: list[str]) -> None:
    pair(tmp_path, "a")
    (tmp_path / "mask").mkdir()
    Image.new("L", (16, 12), 9).save(tmp_path / "mask/a.png")
    settings = config(tmp_path, mask_dir=str(tmp_path / "mask"))
    first = pair_folders(settings, checked_dir=tmp_path / "checked")
    assert pair_folders(settings, checked_dir=tmp_path / "checked") == first
    assert len(decoded) == 3
    Image.new("L", (16, 12), 0).save(tmp_path / "mask/a.png")
    with pytest.raises(DatasetError, match="the mask is all black"):
        pair_folders(settings, checked_dir=tmp_path / "checked")
