"""Work on many files in threads. Results come in order, and a stop takes effect at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from ..events import Observer, raise_if_stopped

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 8
_AHEAD = 4  # items per thread that are handed out
_POLL_SECONDS = 0.2


def in_threads(work: Callable[[T], R], items: Iterable[T], observer: Observer, name: str) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of `work`, which threads named `name` do for several items at a time.

    A stop doesn't wait for items that threads are still working on. Those threads end by themselves.

    Raises:
        Interrupted: the observer asked to stop.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    source, waiting = iter(items), deque[tuple[T, Future[R]]]()
    try:
        while True:
            missing = threads * _AHEAD - len(waiting)
            waiting.extend((item, pool.submit(work, item)) for item in islice(source, missing))
            if not waiting:
                return
            item, future = waiting.popleft()
            while not future.done():
                raise_if_stopped(observer)
                wait([future], timeout=_POLL_SECONDS)
            raise_if_stopped(observer)
            yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
