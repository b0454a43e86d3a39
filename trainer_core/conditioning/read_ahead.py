"""Reading in threads while a network works, and errors that are handed on instead of raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ..errors import DatasetError

READ_AHEAD = 4  # pictures decoded while the network works on the one before

T = TypeVar("T")
R = TypeVar("R")


def or_error(read: Callable[[T], R]) -> Callable[[T], R | DatasetError]:
    """`read`, whose DatasetError is handed on, not raised, so that the other pictures are encoded all the same."""

    def attempt(item: T) -> R | DatasetError:
        try:
            return read(item)
        except DatasetError as error:
            return error

    return attempt


def read_ahead(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each item with what `read` made of it in a thread, a few items ahead and no more."""
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
