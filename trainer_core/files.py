"""Atomic file writes, and safetensors files that are checked for truncation."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

HEADER_LENGTH_BYTES = 8
_FIRST_READ_BYTES = 1024  # covers a cache entry's header in one read: a run checks thousands of them when it starts


def is_whole(path: Path) -> bool:
    """True if the safetensors file exists and has the length that its header states. False if it is truncated."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(_FIRST_READ_BYTES)
            length = int.from_bytes(begin[:HEADER_LENGTH_BYTES], "little")
            if length > size:
                return False
            begin += file.read(max(0, HEADER_LENGTH_BYTES + length - len(begin)))
            header = json.loads(begin[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
    except (OSError, ValueError):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == HEADER_LENGTH_BYTES + length + max(ends, default=0)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied into host memory."""
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header; empty if there is none."""
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        return dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, even if two runs write the same file at once."""
    write_atomically(
        path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes to a temporary file in the same folder, flush it to disk, then rename it to `path`.

    A reader therefore sees the old file or the whole new one, never a part. Creates the folder if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A hidden path in the same folder, to write a file or folder to.

    It is renamed to `path` when the block ends, and removed if the block raises. It keeps the suffix of `path`, because
    some readers go by it.
    """
    # The name is cut: file systems allow 255 bytes.
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
