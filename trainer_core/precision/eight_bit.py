"""Products of a linear layer with 8-bit operands: their definition in plain torch, and what computes them on a card.

    forward     y = (codes of x · codes of Wᵀ) · scales of x · scales of W + bias
    backward    dx = (codes of g' · codes of W) · scales of g',   g' = g · scales of W

x and g have a scale per token, by whose reciprocal they are multiplied before they are rounded; W has one per output
row. In the backward pass the sum runs over the rows of W, so their scales are folded into the gradient before it is
rounded. Codes are int8, or fp8 (e4m3) where the weight has fp8 codes
and the card multiplies them. int8 codes are summed exactly in int32, fp8 codes in float32, of which a card keeps fewer
bits (see `_fp8_product`). Scales and bias are applied in float32, and the result is rounded once.

On a CUDA device operators that the compiler does not look into compute the codes and the product, with Triton: the
compiler's own code for the codes reads and activates wide rows twice. Elsewhere plain torch does; the results agree up
to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..packages import need_triton
from ..text import reason_of
from ..weights.stored import hadamard
from .formats import EightBits, Format

LEAST_CAPABILITY = (8, 0)  # Triton compiles no int8 products for older cards
FP8 = torch.float8_e4m3fn
FEW_ROWS = 16  # products of so few rows, such as the modulation's, only read the weight: 8 bits would save no time
_NAMESPACE = re.sub(r"\W", "_", __name__)  # of the operator; two copies of the pack in a process have their own


class Coded(NamedTuple):
    """Numbers as 8-bit codes [rows, columns] with a float32 scale for each row [rows]. `rotation` is that of
    StoredWeight."""

    codes: Tensor
    scales: Tensor
    rotation: int = 0


class Change(NamedTuple):
    """An adapter's change of a product: inner [..., rank] · up [out, rank]ᵀ."""

    inner: Tensor
    up: Tensor


def product(
    x: Tensor,
    weight: Coded,
    bias: Tensor | None,
    tokens: Coded | None = None,
    change: Change | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """y [..., out] of x [..., in], or of gelu(x), and a weight [out, in], in x's dtype, plus the change.

    `tokens`: the codes of x, if they are known. gelu and the weight's rotation exclude each other.
    """
    tokens = tokens or quantised(rotated(x, weight.rotation).flatten(0, -2), weight.codes.dtype, gelu=gelu)
    y = _multiplied(tokens, weight.codes, weight.scales, bias, x.dtype, change=change, backward=False)
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(gradient: Tensor, weight: Coded, before: Tensor | None = None) -> Tensor:
    """dx [..., in] of a gradient [..., out] and a weight [out, in], in the gradient's dtype.

    With `before` [..., out], the product's result, `gradient` is that of gelu(before).
    """
    before = None if before is None else before.flatten(0, -2)
    tokens = quantised(gradient.flatten(0, -2), weight.codes.dtype, weight.scales, before=before)
    dx = _multiplied(tokens, weight.codes, None, None, gradient.dtype, backward=True)
    return rotated(dx.view(*gradient.shape[:-1], dx.shape[-1]), weight.rotation)


def quantised(
    x: Tensor, dtype: torch.dtype, factors: Tensor | None = None, *, gelu: bool = False, before: Tensor | None = None
) -> Coded:
    """x [rows, columns] times `factors` [columns], as codes of `dtype`: a row's largest number gets the largest code.

    `gelu`: the codes are those of gelu(x). `before` [rows, columns]: x is the gradient of gelu(before), and the codes
    are those of the gradient of `before`. gelu is the approximation with tanh, and its result is rounded to x's dtype.

    A row with NaN or infinite numbers gets the scale NaN or infinite.
    """
    if x.is_cuda:
        return Coded(*_operator("quantise")(x, factors, before, gelu, dtype))
    if gelu:
        x = functional.gelu(x, approximate="tanh")
    if before is not None:
        x = torch.ops.aten.gelu_backward.default(x, before, approximate="tanh")
    values = x if factors is None else x * factors
    scales = token_scales(values, dtype)
    values = values * scales.reciprocal()
    return Coded((values if dtype.is_floating_point else values.round()).to(dtype), scales.flatten())


def few_rows(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    """y [..., out] of one or two rows x [..., in]: on a card, it reads each 8-bit code once and writes no weight.

    `codes` [out, in] and `scale` [out, 1] or [] are the tensors of EightBits.
    """
    codes, scales, _ = stored(codes, scale)
    if x.is_cuda:
        return _operator("few_rows")(x.flatten(0, -2), codes, scales, bias).view(*x.shape[:-1], len(codes))
    y = x.float() @ codes.float().T * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def token_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 scales [..., 1] with which x [..., columns] is rounded to codes of `dtype`."""
    # The least scale is not denormal: MPS would take it as zero, and divide a token of zeros by it.
    return (x.abs().amax(-1, keepdim=True).float() / largest_code(dtype)).clamp_min(torch.finfo(torch.float32).tiny)


def largest_code(dtype: torch.dtype) -> float:
    """The largest number that a code stands for."""
    return float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)


def rotated(x: Tensor, rotation: int) -> Tensor:
    """x [..., columns] with each group of `rotation` columns multiplied with the Hadamard matrix; 0 changes nothing."""
    if not rotation:
        return x
    return (x.unflatten(-1, (-1, rotation)) @ hadamard(rotation, x.device).to(x.dtype)).flatten(-2)


def coded(form: Format, tensors: Sequence[Tensor], dtype: torch.dtype, compute: torch.dtype) -> Coded:
    """A weight [out, in] of any format as codes of `dtype`.

    Codes of that type are taken as they are. Others, such as NF4, are dequantised to `compute` and rounded, with
    a scale per row.
    """
    if not is_coded(form, tensors, dtype):
        return quantised(form.dequantise(tensors, compute), dtype)
    return stored(*tensors, form.rotation)  # type: ignore[union-attr]


def stored(codes: Tensor, scale: Tensor, rotation: int = 0) -> Coded:
    """The tensors of EightBits, whose scale [out, 1] or [] is one for each row, as a kernel reads them."""
    return Coded(codes, scale.float().expand(len(codes), 1).flatten().contiguous(), rotation)


def is_coded(form: Format, tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the weight is stored in codes of `dtype`, which can be multiplied as they are."""
    return isinstance(form, EightBits) and tensors[0].dtype == dtype


def check_device(device: torch.device, needed_for: str, instead: str = "Set it to bf16.") -> None:
    """Check that a device multiplies 8-bit codes.

    `needed_for`: what needs it, such as "matmul_precision 8bit". `instead`: a sentence that says what to do.

    Raises:
        ConfigError: the card is too old, it is no CUDA device, or Triton fails. The CPU is slow, but serves for tests.
        MissingPackageError: Triton is not installed.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ConfigError(f"{needed_for} needs a CUDA device or the CPU, but the device is {device}. {instead}")
    if (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        needed, has = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, found))
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"{needed_for} needs a card with compute capability {needed} or higher (RTX 30 or newer), but {name} has "
            f"{has}. {instead}"
        )
    need_triton(needed_for)
    if failure := _failure(device):
        raise ConfigError(f"{needed_for} needs Triton, which fails on this machine ({failure}). {instead}")


@cache
def _failure(device: torch.device) -> str:
    """Why a small product fails on a CUDA device, for example because Triton finds no C compiler; empty if it works."""
    define_operators()
    try:
        x = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
        tokens = quantised(x, torch.int8)
        _operator("product")(tokens.codes, tokens.codes, tokens.scales, None, None, None, None, True, x.dtype).tolist()  # noqa: FBT003
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        return f"{type(error).__name__}: {reason_of(error)}"
    return ""


def code_dtype(form: Format, codes: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of codes in which a weight of this format is multiplied on a device."""
    if isinstance(form, EightBits) and codes == FP8 and (device.type != "cuda" or multiplies_fp8(device)):
        return FP8
    return torch.int8


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether a CUDA device multiplies fp8 codes with a scale per row, as this version of torch computes it.

    It depends on the card, on torch and on CUDA in ways that no version number tells, so a small product is tried.
    """
    codes, scales = torch.zeros(32, 32, dtype=FP8, device=device), torch.ones(32, device=device)
    try:
        return torch.is_tensor(_fp8_product(codes, codes, scales, scales, None, torch.bfloat16))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def adds_changes(codes: torch.dtype, x: Tensor) -> bool:
    """Whether a card's product of such codes takes a Change of x's dtype along: on others, that saves nothing."""
    return codes == torch.int8 and x.is_cuda and x.dtype.itemsize == 2


def _multiplied(
    tokens: Coded,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    change: Change | None = None,
    backward: bool,
) -> Tensor:
    """tokens · weightᵀ for a weight [out, in], or tokens · weight if `backward`. Applies the tokens' scales, `scales`,
    bias and the change."""
    if weight.is_cuda:
        inner, up = (None, None) if change is None else (change.inner.flatten(0, -2), change.up)
        return _operator("product")(tokens.codes, weight, tokens.scales, scales, bias, inner, up, backward, dtype)
    values = weight.float()
    y = tokens.codes.float() @ (values if backward else values.T)
    y *= tokens.scales.unsqueeze(-1)
    if scales is not None:
        y *= scales
    if bias is not None:
        y = y + bias
    if change is not None:
        y = y + change.inner.flatten(0, -2).float() @ change.up.float().T
    return y.to(dtype)


def _quantised_on_card(
    x: Tensor,
    factors: Tensor | None,
    before: Tensor | None,
    gelu: bool,  # noqa: FBT001 - an operator's arguments have no names
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    kind = 2 if before is not None else int(gelu)
    return _kernels().quantise(x, dtype, largest_code(dtype), factors, kind, before)


def _quantised_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=others[-1]), x.new_empty(x.shape[0], dtype=torch.float32)


def _on_card(  # noqa: PLR0913
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
    """The operator on a CUDA device. In the backward pass it copies the weight's codes, transposed."""
    if backward:
        b = _kernels().transposed(b)
    if a.dtype == torch.int8:
        return _kernels().int8_product(a, b, a_scale, b_scale, bias, dtype, inner, up)
    assert inner is None, "only int8 products take a change along"
    b_scale = torch.ones(len(b), device=b.device) if b_scale is None else b_scale
    return _fp8_product(a, b, a_scale, b_scale, bias, dtype)


def _few_rows_on_card(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels().few_rows(x, codes, scales, bias)


def _few_rows_shape(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], codes.shape[0])


def _fp8_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
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


def _result(a: Tensor, b: Tensor, a_scale: Tensor, *others: Any) -> Tensor:  # noqa: ARG001
    """What the operator returns, for the compiler: an empty tensor."""
    *_, backward, dtype = others
    return a.new_empty(a.shape[0], b.shape[1 if backward else 0], dtype=dtype)


@cache
def _kernels() -> Any:
    return import_module(".kernels", __package__)


class _Operators:
    """The library that holds the operators, which torch forgets with it."""

    library: torch.library.Library | None = None


def define_operators() -> None:
    """Make the operators known to torch, once in a process. Quantised layers need them on a card."""
    if _Operators.library is None:
        library = torch.library.Library(_NAMESPACE, "FRAGMENT")
        library.define(
            "product(Tensor a, Tensor b, Tensor a_scale, Tensor? b_scale, Tensor? bias, Tensor? inner, Tensor? up, "
            "bool backward, ScalarType dtype) -> Tensor"
        )
        library.define(
            "quantise(Tensor x, Tensor? factors, Tensor? before, bool gelu, ScalarType dtype) -> (Tensor, Tensor)"
        )
        library.define("few_rows(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor")
        for name, compute, shape in (
            ("product", _on_card, _result),
            ("quantise", _quantised_on_card, _quantised_shapes),
            ("few_rows", _few_rows_on_card, _few_rows_shape),
        ):
            library.impl(name, compute, "CUDA")
            torch.library.register_fake(f"{_NAMESPACE}::{name}", shape, lib=library)
        _Operators.library = library


def _operator(name: str) -> Any:
    return getattr(getattr(torch.ops, _NAMESPACE), name).default
