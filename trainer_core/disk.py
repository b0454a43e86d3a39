"""Errors of the disk in words, and the space that is free on it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskError, TrainerError
from .text import shown

MAX_NAME_BYTES = 255  # of a file or folder, on nearly all file systems
# A name made by `temporary_beside` in files.py. Older versions wrote no machine.
TEMPORARY = re.compile(
    r"\.(?P<stem>.+)\.(?:(?P<machine>[0-9a-f]{8})-)?(?P<pid>[0-9]{1,9})\.[0-9a-f]{2,8}\.tmp(?P<suffix>\.[^.]+)?"
)
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_WORDS = {
    errno.ENOSPC: "The disk is full, so {place} can't be written:",
    errno.EDQUOT: "Your quota on the disk is used up, so {place} can't be written:",
    errno.EFBIG: "{place} can't be written: its disk or this system's settings allow no file of this size. Choose a "
    "folder on another disk.",
    errno.EROFS: "{place} can't be written, because its disk is read-only. Choose a folder on another disk.",
    errno.EACCES: "{place} can't be used: permission denied. Change the permissions of the folder {folder}, or choose "
    "another folder." + (" If another program has it open, close that program." if os.name == "nt" else ""),
    errno.EPERM: "{place} can't be used: this system doesn't permit it. Change the permissions of the folder {folder}, "
    "or choose another folder.",
    errno.ENAMETOOLONG: "The file or folder name {place} is too long. Choose a shorter name; most disks allow "
    f"{MAX_NAME_BYTES} bytes, and letters outside English take 2 to 4 each.",
    **dict.fromkeys(
        (errno.EIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),  # all but the first: it was removed
        "{place} can't be read or written, because the disk reports an error. Check the disk and its connection, and "
        "copy what matters to another disk.",
    ),
    errno.ENOENT: "{place} is missing. It or its folder was moved or deleted while it was in use. Put it back, then "
    "run again. What was finished before is kept.",
    errno.ENOTDIR: "{place} can't be used, because one of the folders in its path is a file. Move that file away, or "
    "choose another folder.",
    errno.EISDIR: "{place} is a folder, but a file is needed there. Move it away.",
    errno.EEXIST: "{place} is a file, but a folder is needed there. Move it away, or choose another folder.",
}


@contextmanager
def disk_errors(place: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Explain errors of the disk that the block raises. Other errors pass unchanged.

    The message names the file of the error, or `place` if the error names none or a temporary file beside `place`.
    `needed` is the size of `place` in bytes, if it is known.

    Raises:
        DiskError: the disk is full, read-only or failing, access is denied, a file is missing, or a name is too long.
    """
    try:
        yield
    except OSError as error:
        is_unnamed = error.errno == errno.ENOENT and error.filename is None  # any file may be missing, not only `place`
        if isinstance(error, TrainerError) or error.errno not in _IN_WORDS or is_unnamed:
            raise
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place
        if place is None or (named is not None and named.parent != place.parent):
            place = named
        raise DiskError(_explained(error.errno, place, needed), error.errno) from error


def _explained(number: int, place: Path | None, needed: int) -> str:
    if place is None:
        text = _IN_WORDS[number].format(place="a file", folder="it is in")
        text = f"{text[0].upper()}{text[1:]}"
        return f"{text} free disk space and run again." if number in _FULL else text
    there = existing_folder(place)
    text = _IN_WORDS[number].format(place=shown(_without_temporary(place)), folder=shown(_without_temporary(there)))
    if number not in _FULL:
        return text
    size = f" {size_in_words(needed)} are needed," if needed else ""
    return (
        f"{text}{size} {size_in_words(free_disk_bytes(there))} are free. Free disk space or choose a folder on another "
        "disk, then run again. What was finished before is kept."
    )


def _without_temporary(place: Path) -> Path:
    """The path with the final names of temporary files and folders."""
    found = ((part, TEMPORARY.fullmatch(part)) for part in place.parts)
    return Path(*(f"{match['stem']}{match['suffix'] or ''}" if match else part for part, match in found))


def existing_folder(place: Path) -> Path:
    """The folder `place`, or the nearest folder above it that exists."""
    return next((each for each in (place, *place.absolute().parents) if _is_folder(each)), Path())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # the name is too long, or no file can have it
        return False


def is_device_name(name: str) -> bool:
    """Whether Windows reserves this name for a device, whatever its extension."""
    return name.split(".")[0].rstrip(" ").upper() in _WINDOWS_DEVICES


def name_exists(path: Path) -> bool:
    """Whether there is a file or folder of this name. False for a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def free_disk_bytes(place: Path) -> int:
    """Bytes that this user can still write to the disk of a folder that exists; 0 if that can't be told."""
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0


def size_in_words(size: float) -> str:
    """A number of bytes as text, in GB, MB, kB or bytes."""
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit), (1, "bytes"))
    return f"{size / unit:.1f} {name}" if unit > 1 else f"{size:.0f} {name}"
