"""What all sources of weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from .stored import StoredWeight

Read = Callable[[str], StoredWeight]


class WeightSource(Protocol):
    """Named weights of known shape, read one at a time."""

    @property
    def place(self) -> Path:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by its name, without a prefix the file may have."""
        ...

    @property
    def markers(self) -> frozenset[str]:
        """Names of entries that are not weights, such as `__index_timestep_zero__`."""
        ...

    @property
    def packing(self) -> str:
        """`NF4` or `GGUF` where several weights share a code, which no layer keeps as it is; else empty."""
        ...

    def opened(self) -> AbstractContextManager[Read]:
        """Reads by name while the context lasts; what is read lives on. Closed files give back their memory map."""
        ...
