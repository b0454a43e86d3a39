"""The formats of quantised weights: 8-bit codes, bitsandbytes' NF4, and quanto's packed 4-bit and 2-bit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..weights.stored import dequantise, nf4_shape


@dataclass(frozen=True, slots=True)
class EightBits:
    """fp8 or int8 codes [out, in] with float32 scales: one per row [out, 1], or one for the whole weight []. `rotation`
    is that of StoredWeight."""

    names: ClassVar[tuple[str, ...]] = ("codes", "scale")
    rotation: int = 0

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [out, in], computed in float32 and rounded once."""
        codes, scale = tensors
        return dequantise(codes, scale, self.rotation, dtype)


@dataclass(frozen=True, slots=True)
class Nf4:
    """bitsandbytes' 4-bit codes, whose scales are 8-bit codes themselves. Sizes of blocks are in weights and scales."""

    names: ClassVar[tuple[str, ...]] = ("codes", "absmax", "quant_map", "nested_absmax", "nested_map", "offset")
    rows: int
    columns: int
    blocksize: int
    nested_blocksize: int

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [out, in], as bitsandbytes computes it: in float32 and rounded once."""
        if torch.compiler.is_compiling():
            return self._in_one_kernel(tensors, dtype)
        import_module("bitsandbytes")  # defines the operators below; its functions that call them do more in Python
        library = torch.ops.bitsandbytes
        codes, absmax, _, nested_absmax, nested_map, offset = tensors
        scales = library.dequantize_blockwise.default(
            absmax, nested_absmax, nested_map, self.nested_blocksize, torch.float32
        ).add_(offset)
        shape = nf4_shape(self.rows * self.columns, self.blocksize)
        weight = library.dequantize_4bit.default(codes, scales, self.blocksize, "nf4", shape, dtype)
        return weight.view(self.rows, self.columns)

    def _in_one_kernel(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`dequantise` in operations that the compiler fuses; bitsandbytes needs four kernels."""
        codes, absmax, quant_map, nested_absmax, nested_map, offset = tensors
        blocks = torch.arange(absmax.numel(), device=absmax.device) // self.nested_blocksize
        scales = nested_map[absmax.int()] * nested_absmax[blocks] + offset
        pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=-1)
        values = quant_map[pairs.int()]
        weight = values.view(-1, self.blocksize) * scales.unsqueeze(-1)
        return weight.to(dtype).view(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Packed:
    """quanto's codes of 4 or 2 bits in groups of `group` weights, each with a scale and a shift: scale * code - shift.

    The groups are the rows of a matrix, which is cut into 8 / bits parts of equal height. A byte holds the codes at the
    same place of all parts.
    """

    names: ClassVar[tuple[str, ...]] = ("codes", "scale", "shift")
    rows: int
    columns: int
    bits: int
    group: int

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [out, in], computed in float32 and rounded once."""
        codes, scale, shift = tensors
        weight = torch.empty(self.rows * self.columns // self.group, self.group, dtype=dtype, device=codes.device)
        parts = zip(*(each.split(len(codes)) for each in (weight, scale.float(), shift.float())), strict=True)
        for number, (part, factor, offset) in enumerate(parts):
            unpacked = (codes[: len(part)] >> (number * self.bits)) & (2**self.bits - 1)
            torch.sub(unpacked * factor, offset, out=part)
        return weight.view(self.rows, self.columns)


Format: TypeAlias = EightBits | Nf4 | Packed
_KINDS: dict[str, type[Format]] = {"codes": EightBits, "nf4": Nf4, "packed": Packed}


def format_of(note: Mapping[str, Any]) -> Format:
    """The format that `note`, made by `QuantisedWeight.note`, describes.

    Raises:
        KeyError, TypeError: it describes no known format.
    """
    values = dict(note)
    return _KINDS[values.pop("kind")](**values)


class QuantisedWeight(NamedTuple):
    """A quantised weight [out, in]: its format, and that format's tensors by name."""

    format: Format
    tensors: dict[str, Tensor]

    @property
    def note(self) -> dict[str, Any]:
        """The format as JSON values."""
        kind = next(name for name, each in _KINDS.items() if isinstance(self.format, each))
        return {"kind": kind, **asdict(self.format)}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if isinstance(self.format, EightBits):
            rows, columns = self.tensors["codes"].shape
            return rows, columns
        return self.format.rows, self.format.columns


def depending_on(gradient: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a format, for its `dequantise` in a backward pass: for the compiler, they need the gradient.

    Otherwise it would compute the weight, or its unpacked codes, in the forward pass and keep them until the backward
    pass.
    """
    if not torch.compiler.is_compiling():
        return list(tensors)
    zero = gradient.flatten()[:0].sum()
    # torch can't add fp8 codes, and they need no unpacking.
    return [
        each if each.dtype.itemsize == 1 and each.is_floating_point() else each + zero.to(each.dtype)
        for each in tensors
    ]
