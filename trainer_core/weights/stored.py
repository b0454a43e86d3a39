"""A weight in the format of its file, and its dequantisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import MissingPackageError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_HADAMARD_4 = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as the file stores it: bf16, fp16 or fp32 numbers, or fp8, int8 or NF4 codes.

    `scale` is one number, or one per row [out, 1]. If `rotation` is not 0, each group of that many columns was
    multiplied with a Hadamard matrix before quantisation (ComfyUI's `convrot`). `nf4` holds bitsandbytes' quantisation
    state by its names in the file.
    """

    codes: Tensor
    scale: Tensor | None = None
    rotation: int = 0
    nf4: dict[str, Any] = field(default_factory=dict)

    @property
    def is_quantised(self) -> bool:
        """Whether the codes are fp8 or int8, which FrozenLinear can use without conversion."""
        return self.codes.dtype in (*FP8, torch.int8)

    def to(self, device: torch.device) -> StoredWeight:
        """The same weight on another device. Cheaper than moving it dequantised, as codes are smaller."""
        scale = None if self.scale is None else self.scale.to(device)
        nf4 = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in self.nf4.items()}
        return replace(self, codes=self.codes.to(device), scale=scale, nf4=nf4)

    def dequantise(self, dtype: torch.dtype, *, copy: bool = True) -> Tensor:
        """The weight as `dtype`, on the codes' device. Scales are applied in float32.

        Without `copy`, the result may share the file's memory map: don't keep it after the file is closed.
        """
        if self.nf4:
            return _from_nf4(self.codes, self.nf4).to(dtype)
        if self.scale is None:
            return self.codes.to(dtype, copy=copy)
        return dequantise(self.codes, self.scale, self.rotation, dtype)


def dequantise(codes: Tensor, scale: Tensor, rotation: int, dtype: torch.dtype) -> Tensor:
    """codes × scale [out, in], with the rotation of the columns undone. Computed in float32 and rounded once."""
    factor = scale.to(torch.float32)
    if rotation:
        matrix = hadamard(rotation, codes.device)
        weight = codes.to(torch.float32).mul_(factor)
        return (weight.unflatten(-1, (-1, rotation)) @ matrix).flatten(-2).to(dtype)
    # torch.mul multiplies in float32 and stores in dtype element by element, so there is no float32 copy of the weight.
    exact = (
        codes if codes.dtype == torch.int8 else codes.to(dtype)
    )  # torch can't multiply float8; dtype holds it exactly
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(exact, factor, out=weight)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The rotation [size, size] of ComfyUI's `convrot` layout. It is symmetric and orthonormal: its own inverse."""
    seed = torch.tensor(_HADAMARD_4, device=device)
    matrix = seed
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix / math.sqrt(size)


def _from_nf4(codes: Tensor, companions: dict[str, Any]) -> Tensor:
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError as error:
        raise MissingPackageError("bitsandbytes", "A base model stored as NF4") from error
    state = QuantState.from_dict(companions, device=codes.device)
    shape, state.shape = state.shape, torch.Size(nf4_shape(math.prod(state.shape), state.blocksize))
    return dequantize_4bit(codes, state).view(shape)


def nf4_shape(numbers: int, blocksize: int) -> tuple[int, int]:
    """The shape in which bitsandbytes dequantises so many numbers right: blocks as rows.

    On a CPU with AVX-512, version 0.50 takes wrong scales for rows that are not whole blocks.
    """
    return (1, numbers) if numbers % blocksize else (numbers // blocksize, blocksize)


Read = Callable[[str], StoredWeight]


class WeightSource(Protocol):
    """Named weights of a file or folder. Names and shapes are known at once; weights are read one at a time."""

    @property
    def place(self) -> Path:
        """Path of the file or folder."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by its name, without the file's prefix."""
        ...

    @property
    def markers(self) -> frozenset[str]:
        """Names of entries that are not weights, such as `__index_timestep_zero__`."""
        ...

    @property
    def packing(self) -> str:
        """`NF4` or `GGUF` if the file packs weights in a format that no layer can use directly; otherwise empty."""
        ...

    @property
    def is_rotated(self) -> bool:
        """Whether weights have a rotation, see StoredWeight."""
        ...

    def opened(self) -> AbstractContextManager[Read]:
        """Yields a function that reads a weight by name. Closing the context closes the file and its memory map."""
        ...
