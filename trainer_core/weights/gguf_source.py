"""Reads weights from a .gguf file with the optional package `gguf`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingPackageError, ModelFileError
from ..text import reason_of
from .stored import Read, StoredWeight


class GgufSource:
    """A WeightSource for a .gguf file. Weights of any GGUF type are dequantised when they are read."""

    packing = "GGUF"
    is_rotated = False

    def __init__(self, place: Path, prefixes: Sequence[str] = ()) -> None:
        self.place = place
        tensors = {tensor.name: tensor for tensor in _reader(place).tensors}
        prefix = next((each for each in prefixes if sum(name.startswith(each) for name in tensors) > 5), "")
        names = [name for name in tensors if name.startswith(prefix)]
        self._prefix = prefix
        self.markers = frozenset(name.removeprefix(prefix) for name in names if "__" in name)
        self.shapes = {  # GGUF lists dimensions in reverse order
            name.removeprefix(prefix): tuple(int(side) for side in reversed(tensors[name].shape))
            for name in names
            if name.removeprefix(prefix) not in self.markers
        }

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Implements WeightSource.opened."""
        from gguf import quants

        tensors = {tensor.name: tensor for tensor in _reader(self.place).tensors}

        def read(name: str) -> StoredWeight:
            tensor = tensors[self._prefix + name]
            try:
                values = quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ModelFileError(
                    f"{self.place.name} holds {name} as {tensor.tensor_type.name}, which the installed package "
                    "gguf can't read. Update gguf, or choose another file."
                ) from error
            return StoredWeight(torch.from_numpy(values.copy()).reshape(self.shapes[name]))

        yield read


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingPackageError("gguf", "A .gguf base model") from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise ModelFileError(
            f"{path.name} is not a complete .gguf file ({reason_of(error)}). Download it again."
        ) from error
