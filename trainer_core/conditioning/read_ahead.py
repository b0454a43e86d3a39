"""Read pictures and write results in background threads while a network runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

from torch import Tensor

from ..errors import DatasetError
from ..files import write_tensors

_READERS = max(2, min(8, os.cpu_count() or 1))
_READ_AHEAD = 16  # pictures decoded ahead of the network
_WRITERS = 4  # several, because each waits until its file is on the disk
WRITE_BEHIND = 8  # results that wait to be written

Write: TypeAlias = Callable[[Path, Mapping[str, Tensor]], None]

T = TypeVar("T")
R = TypeVar("R")


def or_error(read: Callable[[T], R]) -> Callable[[T], R | DatasetError]:
    """Wrap `read` to return a DatasetError instead of raising it, so that the other pictures are still encoded."""

    def attempt(item: T) -> R | DatasetError:
        try:
            return read(item)
        except DatasetError as error:
            return error

    return attempt


def read_ahead(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of `read`, which threads call for a few items in advance."""
    source = iter(items)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead") as pool:
        waiting = [(item, pool.submit(read, item)) for item in islice(source, _READ_AHEAD)]
        try:
            while waiting:
                item, future = waiting.pop(0)
                result = future.result()
                waiting += [(item_, pool.submit(read, item_)) for item_ in islice(source, 1)]
                yield item, result
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def write_behind() -> Iterator[Write]:
    """Yield a function that writes tensors to a file in the background. At most WRITE_BEHIND files wait at a time.

    The context ends when all files are written, also if it ends with an error.

    Raises:
        DiskError: a file can't be written. Raised by a later call, or when the context ends.
    """
    waiting: deque[Future[None]] = deque()

    def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
        while waiting and (len(waiting) >= WRITE_BEHIND or waiting[0].done()):
            waiting.popleft().result()
        # Not in the background from MPS: torch crashes if two threads use it at once.
        ready = {name: each if each.device.type == "cuda" else each.cpu() for name, each in tensors.items()}
        waiting.append(pool.submit(write_tensors, path, ready))

    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write-behind") as pool:
        yield write
        for each in waiting:
            each.result()
