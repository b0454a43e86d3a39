"""A disk cache of quantised weights, so that the next start reads them instead of quantising again.

    <folder>/<key>/entry.json           the number of blocks
    <folder>/<key>/00012.safetensors    the quantised weights of one block; their notes are in the header

The key is a digest of everything that determines the codes. An entry is written under a temporary name and renamed
when it is complete. When the folder exceeds its size limit, the least recently used entries are deleted.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelFileError
from ..files import HEADER_LENGTH_BYTES, is_whole, write_atomically
from .pieces import Pieces

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 256  # bytes; as CUDA allocations, so that views into a buffer are as fast as tensors of their own
_LEFT_OVER_SECONDS = 86_400  # an unfinished entry this old was left by a process that has ended
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class QuantisedCache:
    """The cache entry `key` in `folder`. `limit_bytes` limits the size of all entries together."""

    folder: Path
    key: str
    limit_bytes: int

    @contextmanager
    def opened(self, num_blocks: int) -> Iterator[Entry]:
        """Open the entry for reading if it is complete; otherwise for writing, block by block in order."""
        reading = _is_complete(self.folder / self.key, num_blocks)
        entry = Entry(self, num_blocks, reading=reading)
        try:
            yield entry
            entry.finish()
        finally:
            shutil.rmtree(entry.temporary, ignore_errors=True)


class Entry:
    """An open cache entry, either for reading or for writing."""

    def __init__(self, cache: QuantisedCache, num_blocks: int, *, reading: bool) -> None:
        self.cache, self.num_blocks, self.reading = cache, num_blocks, reading
        self.place = cache.folder / cache.key
        self.temporary = cache.folder / f".{cache.key}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._bytes, self._gave_up = 0, reading

    def read(self, block: int, device: torch.device) -> dict[str, Pieces]:
        """A block's quantised weights on `device`, by layer name; empty if the entry is open for writing.

        Raises:
            ModelFileError: the entry's file is damaged.
        """
        if not self.reading:
            return {}
        path = self.place / f"{block:05d}.safetensors"
        try:
            return _read(path, device)
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(
                f"The quantised weights in {path} can't be read ({error}). Delete the folder {self.place}; it will be "
                "rebuilt from the model."
            ) from error

    def write(self, block: int, weights: dict[str, Pieces]) -> None:
        """Write a block. A disk error is logged and stops the caching, but not the loading of the network."""
        if self._gave_up:
            return
        try:
            self._bytes += _write(self.temporary / f"{block:05d}.safetensors", weights)
        except OSError as error:
            self._give_up(f"{self.cache.folder} can't be written to ({error})")
        if self._bytes > self.cache.limit_bytes:
            self._give_up(f"they need more than the cache's limit of {self.cache.limit_bytes / 1e9:.1f} GB")

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        shutil.rmtree(self.temporary, ignore_errors=True)
        _LOG.warning("The quantised weights are not cached: %s.", reason)

    def finish(self) -> None:
        """After the last block: publish a written entry and delete old ones, or mark a read one as used."""
        try:
            if self.reading:
                os.utime(self.place / "entry.json")
            elif not self._gave_up:
                write_atomically(self.temporary / "entry.json", json.dumps({"blocks": self.num_blocks}).encode())
                shutil.rmtree(self.place, ignore_errors=True)
                self.temporary.replace(self.place)
                _make_room(self.cache)
        except OSError as error:  # for example, another run has just published the same entry
            _LOG.warning("The quantised weights could not be cached in %s: %s", self.place, error)


def _is_complete(place: Path, num_blocks: int) -> bool:
    try:
        known = json.loads((place / "entry.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    blocks = [place / f"{block:05d}.safetensors" for block in range(num_blocks)]
    return known == {"blocks": num_blocks} and all(map(is_whole, blocks))


def _make_room(cache: QuantisedCache) -> None:
    """Delete the least recently used other entries until the cache is within its limit, and unfinished old ones."""
    used = {path.parent: path.stat().st_mtime for path in cache.folder.glob("*/entry.json")}
    sizes = {place: sum(path.stat().st_size for path in place.iterdir()) for place in used}
    for place in sorted(used, key=lambda each: used[each]):
        if sum(sizes.values()) <= cache.limit_bytes:
            break
        if place.name != cache.key:
            shutil.rmtree(place, ignore_errors=True)
            del sizes[place]
    for left in cache.folder.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > _LEFT_OVER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _write(path: Path, weights: dict[str, Pieces]) -> int:
    """Write a safetensors file tensor by tensor, without a second copy of the block in memory. Returns its size.

    Padding between tensors is stored as tensors of its own, because safetensors files may not have gaps.
    """
    header: dict[str, Any] = {
        "__metadata__": {"notes": json.dumps({name: pieces.note for name, pieces in weights.items()})}
    }
    tensors, end = [], 0
    for name, pieces in weights.items():
        for key, tensor in pieces.tensors.items():
            begin, end = end, end + tensor.nbytes
            header[f"{name}/{key}"] = _described(_NAMES[tensor.dtype], list(tensor.shape), begin, end)
            tensors.append(tensor)
            if padding := -end % _ALIGNMENT:
                header[f"{name}/{key}/padding"] = _described("U8", [padding], end, end + padding)
                tensors.append(torch.zeros(padding, dtype=torch.uint8))
                end += padding
    text = json.dumps(header).encode()
    text += b" " * (-(HEADER_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text)
        for tensor in tensors:
            file.write(_as_bytes(tensor).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return HEADER_LENGTH_BYTES + len(text) + end


def _described(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _read(path: Path, device: torch.device) -> dict[str, Pieces]:
    """Read a block with one read into one buffer. Its tensors are views of that buffer."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")))
        notes = json.loads(header.pop("__metadata__")["notes"])
        size = max((each["data_offsets"][1] for each in header.values()), default=0)
        host = torch.empty(size, dtype=torch.uint8)
        if file.readinto(host.numpy().data) != size:
            raise ValueError("the file is truncated")
    buffer = host.to(device)
    weights = {name: Pieces({}, note) for name, note in notes.items()}
    for full, each in header.items():
        name, key, *padding = full.split("/")
        if not padding:
            begin, end = each["data_offsets"]
            weights[name].tensors[key] = buffer[begin:end].view(_DTYPES[each["dtype"]]).view(each["shape"])
    return weights
