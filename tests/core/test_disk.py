"""Errors of the disk: the right words for each, with the file, what was needed and what is free."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trainer_core.data.kept import write_kept
from trainer_core.disk import disk_errors, existing_folder, size_in_words
from trainer_core.errors import DatasetError, DiskError, MissingPackageError, TrainerError
from trainer_core.files import temporary_beside, write_atomically


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "The disk is full, so {} can't be written: 2.5 MB are needed, "),
        (errno.EDQUOT, "Your quota on the disk is used up, so {} can't be written: 2.5 MB are needed, "),
        (errno.EFBIG, "{} can't be written: its disk or this system's settings allow no file of this size."),
        (errno.EROFS, "{} can't be written, because its disk is read-only."),
        (errno.EACCES, "{} can't be used: permission denied. Change the permissions of the folder "),
        (errno.EPERM, "{} can't be used: this system doesn't permit it."),
        (errno.ENAMETOOLONG, "The file or folder name {} is too long."),
        (errno.EIO, "{} can't be read or written, because the disk reports an error."),
        (errno.ESTALE, "{} can't be read or written, because the disk reports an error."),
        (errno.ENOTDIR, "{} can't be used, because one of the folders in its path is a file."),
        (errno.EISDIR, "{} is a folder, but a file is needed there."),
        (errno.EEXIST, "{} is a file, but a folder is needed there."),
    ],
)
def test_words(number: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "not there yet" / "result.json"
    with pytest.raises(DiskError) as caught, disk_errors(path, 2_500_000):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(words.format(path)), caught.value
    assert (caught.value.errno, isinstance(caught.value, OSError)) == (number, True)


def test_the_error_names_its_own_file_but_no_temporary_one(tmp_path: Path) -> None:
    def said(filename: Path) -> str:
        with pytest.raises(DiskError) as caught, disk_errors(tmp_path / "wanted.json"):
            raise OSError(errno.EROFS, "Read-only file system", str(filename))
        return str(caught.value).split()[0]

    assert said(tmp_path / ".wanted.17.ab.tmp") == str(tmp_path / "wanted.json")
    assert said(tmp_path / "elsewhere" / "other.json") == str(tmp_path / "elsewhere" / "other.json")
    folder = temporary_beside(tmp_path / "run" / "step-000250")
    assert said(folder / "lora.safetensors") == str(tmp_path / "run" / "step-000250" / "lora.safetensors")
    assert (
        said(temporary_beside(tmp_path / "run" / "run-ema.safetensors"))
        == f"{tmp_path / 'run' / 'run-ema.safetensors'}"
    )


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "x"), MissingPackageError("a", "b"), DatasetError("c"), KeyError()]
)
def test_other_errors_pass_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_an_explained_error_is_not_explained_again(tmp_path: Path) -> None:
    with pytest.raises(TrainerError) as caught, disk_errors(tmp_path / "outer"), disk_errors(tmp_path / "inner.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "inner.json" in str(caught.value)
    assert "outer" not in str(caught.value)


def test_a_name_that_no_disk_takes_has_the_folder_above_it(tmp_path: Path) -> None:
    assert existing_folder(tmp_path / ("x" * 5000) / "y") == tmp_path
    assert existing_folder(tmp_path / "a\0b") == tmp_path


def test_a_file_in_the_place_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The message names the file, and the results of a check are only not kept."""
    (tmp_path / "file").touch()
    for folder, words in (("file", "is a file, but a folder is needed there"), ("file/below", "in its path is a file")):
        with pytest.raises(DiskError, match=words):
            write_atomically(tmp_path / folder / "results.json", b"{}")
        write_kept(tmp_path / folder / "results.json", {})
        assert words in caplog.text and str(tmp_path / "file") in caplog.text
    assert "[Errno" not in caplog.text


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"gone\.txt is missing\. It or its folder was"), disk_errors():
        (tmp_path / "gone.txt").read_bytes()


def test_sizes() -> None:
    assert [size_in_words(each) for each in (0, 999, 1000, 2.5e6, 1.25e9)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "2.5 MB", "1.2 GB"),
    ]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "The disk is full, so a file can't be written: free disk space and run again."),
        (errno.EROFS, "A file can't be written, because its disk is read-only. Choose a folder on another disk."),
    ],
)
def test_a_file_that_is_not_known(number: int, words: str) -> None:
    with pytest.raises(DiskError) as caught, disk_errors():
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == words
