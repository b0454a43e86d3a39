"""Products of a linear layer with 8-bit operands: their definition in plain torch, and what computes them on a card.

    forward     y = (codes of x · codes of Wᵀ) · scales of x · scales of W + bias
    backward    dx = (codes of g' · codes of W) · scales of g',   g' = g · scales of W

x and g have a scale per token, W has one per output row. In the backward pass the sum runs over the rows of W, so their
scales are folded into the gradient before it is rounded. Codes are int8, or fp8 (e4m3) where the weight has fp8 codes
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

from ..errors import ConfigError
from ..packages import need_triton
from ..text import reason_of
from ..weights.stored import hadamard
from .formats import EightBits, Format, Nf4, depending_on

LEAST_CAPABILITY = (8, 0)  # Triton compiles no int8 products for older cards
FP8 = torch.float8_e4m3fn
FEW_ROWS = 16  # products of so few rows, such as the modulation's, only read the weight: 8 bits would save no time
_NAMESPACE = re.sub(r"\W", "_", __name__)  # of the operator; two copies of the pack in a process have their own


class Coded(NamedTuple):
    """Numbers as 8-bit codes [rows, columns] with a float32 scale for each row [rows]. `rotation` is that of
    StoredWeight. If `is_transposed`, the codes are [columns, rows]."""

    codes: Tensor
    scales: Tensor
    rotation: int = 0
    is_transposed: bool = False


def product(x: Tensor, weight: Coded, bias: Tensor | None, tokens: Coded | None = None) -> Tensor:
    """y [..., out] of x [..., in] and a weight [out, in], in x's dtype. `tokens`: the codes of x, if they are known."""
    tokens = tokens or quantised(rotated(x, weight.rotation).flatten(0, -2), weight.codes.dtype)
    y = _multiplied(tokens, weight.codes, weight.scales, bias, x.dtype, backward=False)
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(gradient: Tensor, weight: Coded) -> Tensor:
    """dx [..., in] of a gradient [..., out] and a weight [out, in], in the gradient's dtype."""
    tokens = quantised(gradient.flatten(0, -2), weight.codes.dtype, weight.scales)
    dx = _multiplied(tokens, weight.codes, None, None, gradient.dtype, backward=not weight.is_transposed)
    return rotated(dx.view(*gradient.shape[:-1], dx.shape[-1]), weight.rotation)


def quantised(x: Tensor, dtype: torch.dtype, factors: Tensor | None = None) -> Coded:
    """x [rows, columns] times `factors` [columns], as codes of `dtype`: a row's largest number gets the largest code.

    A row with NaN or infinite numbers gets the scale NaN or infinite.
    """
    if x.is_cuda:
        return Coded(*_operator("quantise")(x, factors, dtype))
    values = x if factors is None else x * factors
    scales = token_scales(values, dtype)
    values = values / scales
    return Coded((values if dtype.is_floating_point else values.round()).to(dtype), scales.flatten())


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


def coded(form: Format, tensors: Sequence[Tensor], dtype: torch.dtype, gradient: Tensor | None = None) -> Coded:
    """A weight [out, in] of any format as codes of `dtype`.

    Codes of that type are taken as they are. Others, such as NF4, are dequantised to float32 and rounded, with a scale
    per row. `gradient`: the one that is multiplied with the weight in a backward pass. Codes that are made for it may
    be transposed.
    """
    if is_coded(form, tensors, dtype):
        codes, scale = tensors
        return Coded(codes, scale.float().expand(len(codes), 1).reshape(-1), form.rotation)  # type: ignore[union-attr]
    if _is_on_card(tensors[0]) and (known := _kernel_sizes(form, tensors[0])):
        codes, scales = _operator("quantise_weight")(list(tensors), *known, gradient)
        return Coded(codes, scales, is_transposed=gradient is not None)
    tensors = tensors if gradient is None else depending_on(gradient, tensors)
    return quantised(form.dequantise(tensors, torch.float32), dtype)


def _is_on_card(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _kernel_sizes(form: Format, codes: Tensor) -> tuple[str, list[int], list[int]] | None:
    """The kind, shape and sizes of `weight_kernels.quantise` for a weight; None if there is no kernel for it, or rows
    and blocks are not whole words."""
    if isinstance(form, EightBits):
        return None if form.rotation or codes.shape[1] % 4 else ("fp8", list(codes.shape), [])
    shape = [form.rows, form.columns]
    if isinstance(form, Nf4):
        return None if form.columns % 8 else ("nf4", shape, [form.blocksize, form.nested_blocksize])
    return None if form.group % 4 else ("packed", shape, [form.bits, form.group])


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
    try:
        x = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
        tokens = quantised(x, torch.int8)
        _on_card(tokens.codes, tokens.codes, tokens.scales, None, None, True, x.dtype).tolist()  # noqa: FBT003
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


def _multiplied(
    tokens: Coded, weight: Tensor, scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype, *, backward: bool
) -> Tensor:
    """tokens · weightᵀ for a weight [out, in], or tokens · weight if `backward`. Applies the tokens' scales,
    `scales` and bias."""
    if weight.is_cuda:
        return _operator("product")(tokens.codes, weight, tokens.scales, scales, bias, backward, dtype)
    values = weight.float()
    y = tokens.codes.float() @ (values if backward else values.T)
    y *= tokens.scales.unsqueeze(-1)
    if scales is not None:
        y *= scales
    return (y if bias is None else y + bias).to(dtype)


def _quantised_on_card(x: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _kernels().quantise(x, dtype, factors, largest_code(dtype))


def _quantised_shapes(x: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def _quantised_weight_on_card(
    tensors: list[Tensor], kind: str, shape: list[int], sizes: list[int], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operator on a CUDA device. The compiler must think that it needs the gradient: otherwise it would make the
    codes of all weights in the forward pass and keep them until the backward pass."""
    largest, transposed = largest_code(torch.int8), gradient is not None
    return _kernels("weight_kernels").quantise(kind, shape, sizes, tensors, largest, transposed=transposed)


def _quantised_weight_shapes(
    tensors: list[Tensor], _kind: str, shape: list[int], _sizes: list[int], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    codes = tensors[0].new_empty((rows, columns) if gradient is None else (columns, rows), dtype=torch.int8)
    return codes, tensors[0].new_empty(rows, dtype=torch.float32)


def _on_card(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    backward: bool,  # noqa: FBT001 - an operator's arguments have no names
    dtype: torch.dtype,
) -> Tensor:
    """The operator on a CUDA device. In the backward pass it copies the weight's codes, transposed."""
    if backward:
        b = _kernels().transposed(b)
    if a.dtype == torch.int8:
        return _kernels().int8_product(a, b, a_scale, b_scale, bias, dtype)
    b_scale = torch.ones(len(b), device=b.device) if b_scale is None else b_scale
    return _fp8_product(a, b, a_scale, b_scale, bias, dtype)


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
def _kernels(module: str = "kernels") -> Any:
    return import_module(f".{module}", __package__)


class _Operators:
    """The library that holds the operators, which torch forgets with it."""

    library: torch.library.Library | None = None


def define_operator() -> None:
    """Make the operator known to torch, once in a process. Layers that multiply on a card need it."""
    if _Operators.library is None:
        library = torch.library.Library(_NAMESPACE, "FRAGMENT")
        library.define(
            "product(Tensor a, Tensor b, Tensor a_scale, Tensor? b_scale, Tensor? bias, bool backward, "
            "ScalarType dtype) -> Tensor"
        )
        library.define("quantise(Tensor x, Tensor? factors, ScalarType dtype) -> (Tensor, Tensor)")
        library.define(
            "quantise_weight(Tensor[] tensors, str kind, int[] shape, int[] sizes, Tensor? gradient) "
            "-> (Tensor, Tensor)"
        )
        library.impl("product", _on_card, "CUDA")
        library.impl("quantise", _quantised_on_card, "CUDA")
        library.impl("quantise_weight", _quantised_weight_on_card, "CUDA")
        torch.library.register_fake(f"{_NAMESPACE}::product", _result, lib=library)
        torch.library.register_fake(f"{_NAMESPACE}::quantise", _quantised_shapes, lib=library)
        torch.library.register_fake(f"{_NAMESPACE}::quantise_weight", _quantised_weight_shapes, lib=library)
        _Operators.library = library


def _operator(name: str) -> Any:
    return getattr(getattr(torch.ops, _NAMESPACE), name).default
