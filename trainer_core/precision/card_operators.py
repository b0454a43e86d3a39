"""8-bit products on a CUDA device: operators that the compiler does not look into, and what computes them.

Triton's kernels compute all but products of fp8 codes, which are torch's. The compiler's own code for the codes reads
and activates wide rows twice.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .operators import define, namespace_of


def largest_code(dtype: torch.dtype) -> float:
    """The largest number that a code stands for."""
    return float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)


def _quantised(
    x: Tensor,
    factors: Tensor | None,
    gelu_input: Tensor | None,
    gelu: bool,  # noqa: FBT001 - an operator's arguments have no names
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    kind = 2 if gelu_input is not None else int(gelu)
    return _kernels().quantise(x, dtype, largest_code(dtype), factors, kind, gelu_input)


def _quantised_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=others[-1]), x.new_empty(x.shape[0], dtype=torch.float32)


def _quantised_weight(
    tensors: list[Tensor], kind: str, shape: list[int], sizes: list[int], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `eight_bit.coded`. The compiler must think that it needs the gradient: otherwise it would make the
    codes of all weights in the forward pass and keep them until the backward pass."""
    largest, transposed = largest_code(torch.int8), gradient is not None
    return _kernels("weight_kernels").quantise(kind, shape, sizes, tensors, largest, transposed=transposed)


def _quantised_weight_shapes(
    tensors: list[Tensor], _kind: str, shape: list[int], _sizes: list[int], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    codes = tensors[0].new_empty((rows, columns) if gradient is None else (columns, rows), dtype=torch.int8)
    return codes, tensors[0].new_empty(rows, dtype=torch.float32)


def _product(  # noqa: PLR0913
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    inner: Tensor | None,
    up: Tensor | None,
    backward: bool,  # noqa: FBT001
    dtype: torch.dtype,
) -> Tensor:
    """See `eight_bit._multiplied`. In the backward pass it copies the weight's codes, transposed."""
    if backward:
        b = _kernels().transposed(b)
    if a.dtype == torch.int8:
        return _kernels().int8_product(a, b, a_scale, b_scale, bias, dtype, inner, up)
    assert inner is None, "only int8 products take a change along"
    b_scale = torch.ones(len(b), device=b.device) if b_scale is None else b_scale
    return fp8_product(a, b, a_scale, b_scale, bias, dtype)


def _few_rows(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels().few_rows(x, codes, scales, bias)


def _few_rows_shape(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], codes.shape[0])


def fp8_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of fp8 codes a [rows, depth] and b [columns, depth]ᵀ, as torch and this card compute it."""
    # Fast accumulation keeps fewer bits of partial sums. On an H200 it is 1.2 times as fast, with an error of 3.1e-3
    # instead of 1.7e-3; rounding the operands to fp8 costs ten times that.
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage]
        a,
        b.T,
        scale_a=a_scale.unsqueeze(1),
        scale_b=b_scale.unsqueeze(0),
        bias=bias if dtype == torch.bfloat16 else None,
        out_dtype=torch.bfloat16,  # the only one for scales per row
        use_fast_accum=True,
    )
    if dtype == torch.bfloat16:
        return y
    return (y.float() if bias is None else y.float() + bias).to(dtype)


def _product_shape(a: Tensor, b: Tensor, a_scale: Tensor, *others: Any) -> Tensor:  # noqa: ARG001
    *_, backward, dtype = others
    return a.new_empty(a.shape[0], b.shape[1 if backward else 0], dtype=dtype)


@cache
def _kernels(module: str = "kernels") -> Any:
    return import_module(f".{module}", __package__)


NAMESPACE = namespace_of(__name__)
_OPERATORS = {
    "product(Tensor a, Tensor b, Tensor a_scale, Tensor? b_scale, Tensor? bias, Tensor? inner, Tensor? up, "
    "bool backward, ScalarType dtype) -> Tensor": (_product, _product_shape),
    "quantise(Tensor x, Tensor? factors, Tensor? gelu_input, bool gelu, ScalarType dtype) -> (Tensor, Tensor)": (
        _quantised,
        _quantised_shapes,
    ),
    "quantise_weight(Tensor[] tensors, str kind, int[] shape, int[] sizes, Tensor? gradient) -> (Tensor, Tensor)": (
        _quantised_weight,
        _quantised_weight_shapes,
    ),
    "few_rows(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor": (_few_rows, _few_rows_shape),
}


def define_operators() -> None:
    """Make the operators known to torch, once in a process. Quantised layers need them on a card."""
    define(NAMESPACE, "CUDA", _OPERATORS)
