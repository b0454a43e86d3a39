"""Atomic writes: a failed write leaves only the old file. Truncated files are detected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer_core.files import (
    is_whole,
    read_metadata,
    read_tensors,
    write_atomically,
    write_tensors,
    written_beside,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_makes_its_folder_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(path.parent) == ["run.json"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[fails], full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["run.json"]


def test_the_old_file_is_seen_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    with written_beside(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".png"
    assert path.read_bytes() == b"new"


def test_a_folder_that_could_not_be_finished_is_removed(tmp_path: Path) -> None:
    def write_a_part() -> None:
        with written_beside(tmp_path / "step-000003") as temporary:
            temporary.mkdir()
            (temporary / "lora.safetensors").write_bytes(b"part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_a_part()
    assert names_in(tmp_path) == []


def test_the_longest_name_that_a_file_system_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 243 + ".safetensors")
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    written = {"transposed": matrix.T, "trained": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    write_tensors(path, written, {"step": "3"})
    found = read_tensors(path)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) and found[name].dtype == written[name].dtype for name in found)
    assert read_metadata(path) == {"step": "3"}
    write_tensors(path, written)
    assert read_metadata(path) == {}


@pytest.mark.parametrize("num_tensors", [0, 1, 40])
def test_a_file_is_whole_only_at_its_full_length(num_tensors: int, tmp_path: Path) -> None:
    """With 40 tensors the header is longer than the first read."""
    path = tmp_path / "entry.safetensors"
    write_tensors(path, {f"{'layer' * 10}.{number}": torch.ones(3) for number in range(num_tensors)})
    data = path.read_bytes()
    assert is_whole(path)
    for length in {0, 1, 7, 8, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:length])
        assert not is_whole(path), length
    path.write_bytes(data + b"x")
    assert not is_whole(path)


def test_what_is_no_safetensors_file_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    (tmp_path / "huge").write_bytes(b"\xff" * 16)
    assert not any(is_whole(tmp_path / name) for name in ("missing", ".", "text", "huge"))
