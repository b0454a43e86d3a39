"""Read files in background threads while a network runs, and return errors instead of raising them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ..errors import DatasetError

READ_AHEAD = 4  # pictures decoded ahead of the network

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
    """Yield each item with the result of `read`, which threads call for at most READ_AHEAD items in advance."""
    source = iter(items)
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read-ahead") as pool:
        waiting = [(item, pool.submit(read, item)) for item in islice(source, READ_AHEAD)]
        try:
            while waiting:
                item, future = waiting.pop(0)
                result = future.result()
                waiting += [(item_, pool.submit(read, item_)) for item_ in islice(source, 1)]
                yield item, result
        finally:
            for _, future in waiting:
                future.cancel()
