"""Atomic writes, files whose damage is noticed, and the removal of what killed processes left."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.comfyui import REPO
from trainer_core import files
from trainer_core.errors import DamagedFileError, DiskError
from trainer_core.files import (
    DIGEST,
    clean_leftovers,
    is_leftover,
    is_whole,
    read_metadata,
    read_tensors,
    set_aside,
    temporary_beside,
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
    with pytest.raises(
        DiskError, match=r"The disk is full, so .*run\.json can't be written: 3 bytes are needed, .* free"
    ):
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


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_rename_waits_for_a_program_that_has_the_file_open(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where a virus scanner opens new files."""
    replace, refusals, path = Path.replace, [3], tmp_path / "step-000250"

    def refuse(self: Path, new: Path) -> Path:
        if refusals[0]:
            refusals[0] -= 1
            raise PermissionError(13, "Access is denied", str(self))
        return replace(self, new)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files, "_RENAME_SECONDS", 3600.0)
    with written_beside(path) as temporary:
        temporary.mkdir() if is_folder else temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000250"] and refusals == [0]
    refusals[0] = 1
    monkeypatch.setattr(files, "_RENAME_SECONDS", 0.0)
    with pytest.raises(DiskError, match="permission denied"), written_beside(tmp_path / "other") as temporary:
        temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000250"]


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


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    """In the length, the header, the digest or the data. What is accepted has the right tensors."""
    path, tensors = tmp_path / "entry.safetensors", {"latents": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int8)}
    write_tensors(path, tensors)
    whole = path.read_bytes()
    key = whole.index(DIGEST.encode())
    accepted = 0
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                found = read_tensors(path)
            except DamagedFileError:
                continue
            accepted += 1
            assert key <= place < key + len(DIGEST), "only the name of the digest may change: the file then has none"
            assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    assert accepted < 8 * len(DIGEST)


def test_the_digest_is_the_sha256_with_zeros_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    write_tensors(path, {"x": torch.ones(3)})
    data = path.read_bytes()
    place = data.index(DIGEST.encode()) + len(DIGEST) + 3
    digits = data[place : place + 64]
    assert hashlib.sha256(data.replace(digits, b"0" * 64)).hexdigest().encode() == digits


def test_files_without_a_digest_are_read(tmp_path: Path) -> None:
    """Those of older versions, and those with metadata: other programs change their tensors and keep the header."""
    path = tmp_path / "lora.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {"ss_steps": "3"})
    data = path.read_bytes()
    assert DIGEST.encode() not in data
    path.write_bytes(data[:-1] + b"\x40")
    assert read_tensors(path)["x"].tolist() == [1.0, 1.0, 4.0]


def test_what_is_damaged_is_renamed_and_not_lost(tmp_path: Path) -> None:
    for number, name in enumerate(("a.damaged", "a.damaged-2", "a.damaged-3")):
        (tmp_path / "a").write_text(str(number))
        assert set_aside(tmp_path / "a") == tmp_path / name
    assert [(tmp_path / name).read_text() for name in names_in(tmp_path)] == ["0", "1", "2"]
    assert set_aside(tmp_path / "missing") is None


ABANDON = """
import sys
from pathlib import Path
from trainer_core.files import temporary_beside
temporary_beside(Path(sys.argv[1], "entry.safetensors")).write_text("part")
folder = temporary_beside(Path(sys.argv[1], "step-000003"))
folder.mkdir()
(folder / "lora.safetensors").write_text("part")
print("written", flush=True)
input()
"""


def test_only_what_ended_processes_left_is_deleted(tmp_path: Path) -> None:
    deep = tmp_path / "latents" / "ab"
    deep.mkdir(parents=True)
    own = temporary_beside(deep / "entry.safetensors")
    own.write_text("being written by this process")
    elsewhere = deep / ".entry.0badcafe-99999.0badcafe.tmp.safetensors"
    elsewhere.write_text("of another machine")
    others = [deep / name for name in (".entry.tmp", ".hidden", "entry.1.ab.tmp", ".entry.x.0badcafe.tmp")]
    for each in others:
        each.write_text("of somebody else")
    command = [sys.executable, "-c", ABANDON, str(deep)]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        clean_leftovers(tmp_path)
        assert len(names_in(deep)) == 8, "those of a running process stay"
        process.kill()
    clean_leftovers(tmp_path)
    assert set(names_in(deep)) == {path.name for path in (own, elsewhere, *others)}
    week = time.time() - 8 * 86_400
    for each in (elsewhere, *others):
        os.utime(each, (week, week))
    clean_leftovers(tmp_path)
    assert set(names_in(deep)) == {path.name for path in (own, *others)}
    clean_leftovers(tmp_path, nobody_writes=True)
    assert set(names_in(deep)) == {path.name for path in others}


def test_the_number_of_an_ended_process_can_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leftover is older than the process that has its number now: pytest's parent, and it is not its writer."""
    for age, stays in ((0, True), (6 * 86_400, False)):
        with monkeypatch.context() as patch:
            patch.setattr(files.psutil.Process, "create_time", lambda _self: time.time() - 86_400)
            patch.setattr(files.os, "getpid", os.getppid)
            left = temporary_beside(tmp_path / "run.json")
        left.write_text("part")
        os.utime(left, (time.time() - age,) * 2)
        with monkeypatch.context() as patch:
            patch.setattr(files.psutil.Process, "create_time", lambda _self: time.time() - 86_400)
            clean_leftovers(tmp_path)
        assert left.exists() is stays
        left.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["run.json", "step-000250", "a.b c", "ü" * 100 + ".safetensors", "x" * 250, ".x"])
def test_every_temporary_name_is_recognised(name: str, tmp_path: Path) -> None:
    temporary = temporary_beside(tmp_path / name)
    assert is_leftover(temporary.name) and len(temporary.name.encode()) <= 255
    assert not is_leftover(name)


def test_tensors_that_were_read_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    write_tensors(path, {"x": torch.ones(10_000)})
    found = read_tensors(path)["x"]
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found, torch.ones(10_000))
