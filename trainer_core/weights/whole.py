"""Recognises files that are no whole weight file, from their first bytes and their size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from ..json_text import parse_json
from ..text import shown

_LENGTH_BYTES = 8  # before a safetensors header, its length
_MAX_HEADER = 2**24  # a large model's has a few hundred KiB
_FIRST_BYTES = 1024
_AGAIN = "Download it again."
_LFS_SIZE = re.compile(rb"^size (\d{1,15})$", re.MULTILINE)
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype|html|\?xml)", re.IGNORECASE | re.DOTALL)
_PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # what torch.save writes


def check_whole(path: Path) -> None:
    """Check that a .safetensors or .gguf file is one and, for safetensors, that nothing of it is missing.

    Raises:
        ModelFileError: it is not; the message says what it is in its place.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(_FIRST_BYTES)
            what = _other_content(begin, size, path.suffix)
            if not what and path.suffix == ".safetensors":
                length = int.from_bytes(begin[:_LENGTH_BYTES], "little")
                file.seek(_LENGTH_BYTES)
                what = _header_fault(file.read(min(length, _MAX_HEADER, size)), length, size, path.name)
    except OSError as error:
        raise ModelFileError(f"Can't read {path}: {error.strerror}.") from error
    if what:
        raise ModelFileError(f"{path.name} is not a complete {path.suffix} file: {what}")
    if path.with_name(f"{path.name}.aria2").exists():
        raise ModelFileError(
            f"{path.name} is still being downloaded: {path.name}.aria2 is beside it. Wait for its end."
        )


def _other_content(begin: bytes, size: int, suffix: str) -> str:
    """What a file that begins so is, if it is no weight file of this suffix; empty if it may be one."""
    if not size:
        return f"it is empty. {_AGAIN}"
    if begin.startswith(b"version https://git-lfs"):
        stated = _LFS_SIZE.search(begin)
        instead = f"the {int(stated[1]) / 1e9:.1f} GB file" if stated else "the file"
        return f"it is a git-lfs pointer in place of {instead}. Run `git lfs pull` in its folder, or download the file."
    if _PAGE.match(begin):
        return "it is a web page. Its download needs a login or another link; download the file itself."
    if begin.startswith(_PICKLE):
        return (
            "it is a PyTorch file with another name, which can run code when it is loaded. Choose a .safetensors file."
        )
    if begin.startswith(b"GGUF") != (suffix == ".gguf"):
        is_gguf = begin.startswith(b"GGUF")
        return "it is a .gguf file. Rename it." if is_gguf else f"its first bytes are not GGUF. {_AGAIN}"
    if size <= _FIRST_BYTES and begin.isascii() and begin.decode().isprintable():
        return f"it is a text, {shown(begin.decode()[:80])!r}. {_AGAIN}"
    return ""


def _header_fault(header: bytes, length: int, size: int, name: str) -> str:
    """What is wrong with a safetensors file of `size` bytes with this header; empty if nothing is."""
    if length > _MAX_HEADER:
        return f"its first bytes are not the length of a header. {_AGAIN}"
    if len(header) < length or size < _LENGTH_BYTES:
        return f"it has {size:,} bytes and ends within its header. {_AGAIN}"
    try:
        entries = parse_json(header, f"the header of {name}", max_bytes=_MAX_HEADER, error=ModelFileError)
        ends = [_end_of(entry) for key, entry in dict(entries).items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return f"its header is damaged ({shown(str(error))}). {_AGAIN}"
    whole = _LENGTH_BYTES + length + max(ends, default=0)
    if size < whole:
        return f"it has {size:,} of {whole:,} bytes, so its download was cut short. {_AGAIN}"
    return f"it has {size:,} bytes, but its header describes {whole:,}. {_AGAIN}" if size > whole else ""


def _end_of(entry: Any) -> int:
    """Where a tensor's data ends, in bytes after the header."""
    return int(entry["data_offsets"][1])
