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
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import DamagedFileError
from ..files import (
    DIGEST,
    NO_DIGEST,
    add_digest,
    check_digest,
    clean_leftovers,
    is_whole,
    remove,
    rename,
    temporary_beside,
    write_atomically,
)
from ..text import reason_of
from .formats import QuantisedWeight, format_of

_LOG = logging.getLogger(__name__)
_CHECKERS = 4  # threads that check the next blocks while one is placed


@dataclass(frozen=True, slots=True)
class QuantisedCache:
    """The cache entry `key` in `folder`. `limit_bytes` limits the size of all entries together."""

    folder: Path
    key: str
    limit_bytes: int

    @contextmanager
    def opened(self, num_blocks: int) -> Iterator[Entry]:
        """Open the entry for reading if it is complete; otherwise for writing, block by block in order."""
        clean_leftovers(self.folder)
        reading = _is_complete(self.folder / self.key, num_blocks)
        with ThreadPoolExecutor(_CHECKERS, thread_name_prefix="check-quantised") as checkers:
            entry = Entry(self, num_blocks, checkers if reading else None)
            try:
                yield entry
                entry.finish()
            finally:
                checkers.shutdown(wait=True, cancel_futures=True)
                remove(entry.temporary)


class Entry:
    """An open cache entry: for reading with `checkers`, which check the files' digests ahead; else for writing."""

    def __init__(self, cache: QuantisedCache, num_blocks: int, checkers: ThreadPoolExecutor | None) -> None:
        self.cache, self.num_blocks, self.reading = cache, num_blocks, checkers is not None
        self.place = cache.folder / cache.key
        self.temporary = temporary_beside(self.place)
        self._bytes, self._gave_up = 0, self.reading
        self._checkers, self._checks = checkers, list[Future[None]]()

    def _file(self, block: int) -> Path:
        return self.place / f"{block:05d}.safetensors"

    def read(self, block: int, device: torch.device) -> dict[str, QuantisedWeight]:
        """A block's quantised weights on `device`, by layer name.

        Empty if the entry is open for writing, or if the block's file is damaged: the caller then quantises the block,
        and the next start builds the entry again.
        """
        if self._checkers is None:
            return {}
        # Only a few ahead: after those, host memory may not hold the files until their blocks are placed.
        ahead = range(len(self._checks), min(block + 1 + _CHECKERS, self.num_blocks))
        self._checks += [self._checkers.submit(check_digest, self._file(number)) for number in ahead]
        try:
            self._checks[block].result()
            return _read(self._file(block), device)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, DamagedFileError) as error:
            _LOG.warning(
                "The quantised weights in %s are damaged (%s). This block is quantised again from the model, and the "
                "next start rebuilds %s.",
                self._file(block),
                reason_of(error),
                self.place,
            )
            with suppress(OSError):
                (self.place / "entry.json").unlink()
            return {}

    def write(self, block: int, weights: dict[str, QuantisedWeight]) -> None:
        """Write a block. A disk error is logged and stops the caching, but not the loading of the network."""
        if self._gave_up:
            return
        try:
            self._bytes += _write(self.temporary / f"{block:05d}.safetensors", weights)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk
            self._give_up(
                f"{self.cache.folder} can't be written to ({reason_of(error)}). Check its permissions and the disk"
            )
        if self._bytes > self.cache.limit_bytes:
            self._give_up(f"they need more than quantised_cache_gb ({self.cache.limit_bytes / 1e9:.1f}). Raise it")

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        remove(self.temporary)
        _LOG.warning("The quantised weights are not cached, because %s.", reason)

    def finish(self) -> None:
        """After the last block: publish a written entry and delete old ones, or mark a read one as used."""
        if self.reading:
            with suppress(OSError):  # the disk is read-only, or a damaged block has removed the file
                os.utime(self.place / "entry.json")
            return
        try:
            if not self._gave_up:
                write_atomically(self.temporary / "entry.json", json.dumps({"blocks": self.num_blocks}).encode())
                shutil.rmtree(self.place, ignore_errors=True)
                rename(self.temporary, self.place)
                _make_room(self.cache)
        except OSError as error:  # for example, another run has just published the same entry
            _LOG.warning(
                "The quantised weights are not cached in %s (%s). The next run tries again.",
                self.place,
                reason_of(error),
            )


def _is_complete(place: Path, num_blocks: int) -> bool:
    try:
        known = json.loads((place / "entry.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    blocks = [place / f"{block:05d}.safetensors" for block in range(num_blocks)]
    return known == {"blocks": num_blocks} and all(map(is_whole, blocks))


def _make_room(cache: QuantisedCache) -> None:
    """Delete the least recently used other entries until the cache is within its limit."""
    used = {path.parent: path.stat().st_mtime for path in cache.folder.glob("*/entry.json")}
    sizes = {place: sum(path.stat().st_size for path in place.iterdir()) for place in used}
    for place in sorted(used, key=lambda each: used[each]):
        if sum(sizes.values()) <= cache.limit_bytes:
            break
        if place.name != cache.key:
            shutil.rmtree(place, ignore_errors=True)
            del sizes[place]


def _write(path: Path, weights: dict[str, QuantisedWeight]) -> int:
    """Write a block to a safetensors file. Returns its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, weight in weights.items()
        for key, tensor in weight.tensors.items()
    }
    notes = json.dumps({name: weight.note for name, weight in weights.items()})
    # Not write_tensors: it would need the memory of the block twice.
    save_file(tensors, path, {"notes": notes, DIGEST: NO_DIGEST})
    add_digest(path)
    return path.stat().st_size


def _read(path: Path, device: torch.device) -> dict[str, QuantisedWeight]:
    with safe_open(path, framework="pt", device=str(device)) as file:  # type: ignore[no-untyped-call]
        notes = json.loads(file.metadata()["notes"])
        weights = {name: QuantisedWeight(format_of(note), {}) for name, note in notes.items()}
        for full in file.keys():  # noqa: SIM118 - not a dict
            name, _, key = full.partition("/")
            weights[name].tensors[key] = file.get_tensor(full)
    return weights
