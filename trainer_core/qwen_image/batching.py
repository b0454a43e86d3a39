"""Groups consecutive items into batches for one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_batches(items: Iterable[T], limit: int, cost: Callable[[list[T]], float]) -> Iterator[list[T]]:
    """Yield consecutive items as lists whose `cost` is at most `limit`, or single items that cost more.

    A cost of infinity keeps items apart. Takes no more items than it needs: with a limit of 0, one at a time.
    """
    batch: list[T] = []
    for item in items:
        if batch and cost([*batch, item]) > limit:
            yield batch
            batch = []
        batch.append(item)
        if cost(batch) >= limit:
            yield batch
            batch = []
    if batch:
        yield batch
