"""Atomic file writes, safetensors files whose damage is noticed, and the removal of what killed processes left."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import psutil
from safetensors import SafetensorError, safe_open

from .disk import TEMPORARY, disk_errors
from .errors import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # safetensors refuses longer headers
_FIRST_READ_BYTES = 1024  # covers a cache entry's header in one read: a run checks thousands of them when it starts

# A key of the header: the SHA-256 of the whole file, computed while the digits themselves are zeros.
DIGEST = "qwen_edit_trainer.sha256"
NO_DIGEST = "0" * 64
_STORED_DIGEST = re.compile(re.escape(f'"{DIGEST}":"').encode() + rb'([^"]{64})"')
_READ_BYTES = 1 << 20

_OLDER_TEMPORARY = re.compile(r"\.[a-z0-9_]{8}\.partial")  # a copy of a LoRA by an older version
_SET_ASIDE = re.compile(r".+\.damaged(-\d+)?", re.DOTALL)
_ABANDONED_SECONDS = 7 * 86_400  # no write takes that long
_CLOCK_SECONDS = 600  # how far the clock of a network drive may be off
# What systems answer where a disk has no hard links.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)
# On Windows, nothing can be renamed while another program, such as a virus scanner, has it open: wait for that program.
_RENAME_SECONDS = 10.0 if os.name == "nt" else 0.0


def is_whole(path: Path) -> bool:
    """True if the safetensors file exists and has the length that its header states. False if it is truncated."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(_FIRST_READ_BYTES)
            length = int.from_bytes(begin[:HEADER_LENGTH_BYTES], "little")
            if length > min(size, MAX_HEADER_BYTES):
                return False
            begin += file.read(max(0, HEADER_LENGTH_BYTES + length - len(begin)))
            header = json.loads(begin[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(size == HEADER_LENGTH_BYTES + length + max(ends, default=0))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied into host memory. Checks the digest if the file has one.

    Raises:
        DamagedFileError: the file isn't a whole safetensors file, or was changed after it was written.
        OSError: the file is missing or can't be read.
    """
    check_digest(path)
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            # Copies, because safetensors returns views of the mapped file, which change with it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {str(error)[:200]}.") from error


def check_digest(path: Path) -> None:
    """Compare the file's content with the digest in its header. Files of older versions have none and pass.

    Raises:
        DamagedFileError: the content differs.
        OSError: the file is missing or can't be read.
    """
    with path.open("rb", buffering=0) as file:
        found = _digest_of(file)
    if found is not None and found.stored != found.computed:
        raise DamagedFileError(f"{path} is damaged: its content has changed since it was written.")


def add_digest(path: Path) -> None:
    """Set the digest of a safetensors file that was written with NO_DIGEST in its place, and flush the file."""
    with path.open("r+b") as file:
        found = _digest_of(file)
        if found is not None:
            file.seek(found.place)
            file.write(found.computed)
        file.flush()
        os.fsync(file.fileno())


class _Digest(NamedTuple):
    place: int  # of its first digit in the file
    stored: bytes
    computed: bytes


def _digest_of(file: BinaryIO | io.FileIO) -> _Digest | None:
    """The digest in the header and that of the content; None if the header has none."""
    begin = file.read(HEADER_LENGTH_BYTES)
    length = int.from_bytes(begin, "little")
    if length > MAX_HEADER_BYTES:
        return None
    begin += file.read(length)
    found = _STORED_DIGEST.search(begin)
    if found is None:
        return None
    digest = hashlib.sha256(begin[: found.start(1)] + NO_DIGEST.encode() + begin[found.end(1) :])
    while part := file.read(_READ_BYTES):
        digest.update(part)
    return _Digest(found.start(1), found[1], digest.hexdigest().encode())


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header, without the digest; empty if there is none.

    Raises:
        SafetensorError, OSError: the file is damaged, missing or can't be read.
    """
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        return {name: value for name, value in (file.metadata() or {}).items() if name != DIGEST}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, even if two runs write the same file at once.

    Its header gets `metadata`, or a digest that `read_tensors` checks. A file with metadata is for other programs. They
    may change its tensors and keep the header, so it gets no digest.
    """
    from safetensors.torch import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if metadata is not None:
        write_atomically(path, save(ready, metadata))
        return
    data = memoryview(save(ready, {DIGEST: NO_DIGEST}))
    length = HEADER_LENGTH_BYTES + int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    found = _STORED_DIGEST.search(data[:length])
    assert found is not None
    digest = hashlib.sha256(data).hexdigest().encode()
    write_atomically(path, data[: found.start(1)], digest, data[found.end(1) :])


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write bytes to a temporary file in the same folder, flush it to disk, then rename it to `path`.

    A reader therefore sees the old file or the whole new one, never a part. Creates the folder if needed.

    Raises:
        DiskError: the disk is full, read-only or failing, or the name is too long.
    """
    size = sum(map(len, parts))
    with disk_errors(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path, size) as temporary, temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())


def write_new(path: Path, data: bytes) -> bool:
    """Write a file that does not exist yet, atomically. Returns False, and changes nothing, if it exists by now.

    Disks without hard links, such as FAT, have no atomic way of that: there, a power cut may leave a part of the file.

    Raises:
        DiskError: as `write_atomically`.
    """
    temporary = temporary_beside(path)
    with disk_errors(path, len(data)):
        try:
            _write_flushed(temporary, data)
            place = os.rename if os.name == "nt" else os.link  # neither replaces a file
            try:
                place(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _written_exclusively(path, data)
        finally:
            remove(temporary)
    return True


def _written_exclusively(path: Path, data: bytes) -> bool:
    try:
        _write_flushed(path, data)
    except FileExistsError:
        return False
    except OSError:
        remove(path)  # what there is of it is ours
        raise
    return True


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def written_beside(path: Path, size: int = 0) -> Iterator[Path]:
    """A hidden path in the same folder, to write a file or folder to.

    It is renamed to `path` when the block ends, and removed if the block raises. `size` in bytes is for errors, if it
    is known.

    Raises:
        DiskError: as `write_atomically`.
    """
    temporary = temporary_beside(path)
    try:
        with disk_errors(path, size):
            yield temporary
            rename(temporary, path)
    finally:
        remove(temporary)


def rename(path: Path, new: Path) -> Path:
    """Rename a file or folder. Replaces a file of that name. Returns the new path.

    Raises:
        OSError: it can't be renamed; on Windows, also not within ten seconds.
    """
    until = time.monotonic() + _RENAME_SECONDS
    while True:
        try:
            return path.replace(new)
        except PermissionError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.1)


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the same folder. If this process is killed, `clean_leftovers` finds what it wrote there.

    It keeps the suffix of `path`, because some readers go by it.
    """
    # The name is cut: file systems allow 255 bytes.
    writer = f"{_machine()}-{os.getpid()}"
    return path.with_name(f".{path.stem[:40]}.{writer}.{secrets.token_hex(4)}.tmp{path.suffix}")


def remove(path: Path) -> None:
    """Delete a file, or a folder with its content. What can't be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file or folder to `<name>.damaged`, so that it isn't used any more. Returns the new path.

    Adds a number if that name is taken. None if it can't be renamed, for example on a read-only disk.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    try:
        return rename(path, aside)
    except OSError:
        return None


def is_unused(name: str) -> bool:
    """Whether this is the name of a temporary file or folder, or of one that was set aside."""
    return is_leftover(name) or bool(_SET_ASIDE.fullmatch(name))


def is_leftover(name: str) -> bool:
    """Whether this is the name of a temporary file or folder of `temporary_beside`."""
    return bool(TEMPORARY.fullmatch(name) or _OLDER_TEMPORARY.fullmatch(name))


def clean_leftovers(folder: Path, *, nobody_writes: bool = False) -> None:
    """Delete the temporary files and folders that killed processes left anywhere below `folder`.

    Keeps those of running processes, and those of other machines and containers until they are a week old. With
    `nobody_writes`, the caller holds the folder's lock and all are deleted. What can't be deleted stays.
    """
    for place, folders, files in os.walk(folder):
        for name in filter(is_leftover, [*folders, *files]):
            path = Path(place, name)
            if nobody_writes or _is_abandoned(path):
                remove(path)
        folders[:] = [name for name in folders if not is_leftover(name)]


def _is_abandoned(path: Path) -> bool:
    """Whether the process that wrote the temporary file has ended."""
    try:
        changed = path.lstat().st_mtime
    except OSError:  # its process has just renamed it
        return False
    if time.time() - changed > _ABANDONED_SECONDS:
        return True
    found = TEMPORARY.fullmatch(path.name)
    if found is None or found["machine"] != _machine() or int(found["pid"]) == os.getpid():
        return False
    try:
        writer = psutil.Process(int(found["pid"]))
        # A process that started after the last write only got the same number.
        return writer.status() == psutil.STATUS_ZOMBIE or writer.create_time() > changed + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


@functools.cache
def _machine() -> str:
    """A name for this machine or container: inside it, a process number means one process."""
    known = [platform.node()]
    with suppress(OSError):
        known.append(Path("/etc/machine-id").read_text(encoding="utf-8"))
    with suppress(OSError):
        known.append(str(Path("/proc/self/ns/pid").stat().st_ino))  # differs between containers
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
