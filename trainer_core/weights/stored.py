"""One weight as it lies in a file, and the way from there to ordinary numbers."""

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
    """Codes as in the file: bf16, fp16, fp32, or fp8 and int8 with a scale.

    `scale` is one number, or one per row [out, 1]. `rotation` > 0: each group of so many columns was multiplied with a
    Hadamard matrix before quantising (ComfyUI's `convrot`). `nf4` holds bitsandbytes' companions of packed codes.
    """

    codes: Tensor
    scale: Tensor | None = None
    rotation: int = 0
    nf4: dict[str, Any] = field(default_factory=dict)

    @property
    def is_quantised(self) -> bool:
        """Whether the codes are fp8 or int8, which a layer can keep as they are."""
        return self.codes.dtype in (*FP8, torch.int8)

    def to(self, device: torch.device) -> StoredWeight:
        """The same on another device; less to carry than the dequantised weight."""
        scale = None if self.scale is None else self.scale.to(device)
        nf4 = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in self.nf4.items()}
        return replace(self, codes=self.codes.to(device), scale=scale, nf4=nf4)

    def dequantise(self, dtype: torch.dtype, *, copy: bool = True) -> Tensor:
        """Ordinary numbers, on the codes' device; through float32 where there is a scale.

        Without `copy` they may still lie in the file's memory map, so they must not outlive their use.
        """
        if self.nf4:
            return _from_nf4(self.codes, self.nf4).to(dtype)
        if self.scale is None:
            return self.codes.to(dtype, copy=copy)
        return dequantise(self.codes, self.scale, self.rotation, dtype)


def dequantise(codes: Tensor, scale: Tensor, rotation: int, dtype: torch.dtype) -> Tensor:
    """codes × scale [out, in], with the columns' rotation undone. Computed in float32 and rounded once."""
    factor = scale.to(torch.float32)
    if rotation:
        matrix = hadamard(rotation, codes.device)
        weight = codes.to(torch.float32).mul_(factor)
        return (weight.unflatten(-1, (-1, rotation)) @ matrix).flatten(-2).to(dtype)
    # One pass over the weight: the product is taken in float32 and stored in dtype, without a float32 copy.
    exact = codes if codes.dtype == torch.int8 else codes.to(dtype)  # float8 has no products of its own
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(exact, factor, out=weight)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The matrix [size, size] of ComfyUI's `convrot` layout: symmetric, orthonormal, its own inverse."""
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
    return dequantize_4bit(codes, QuantState.from_dict(companions, device=codes.device))


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
