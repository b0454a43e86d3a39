"""Products of a linear layer with 8-bit operands: their definition in plain torch, and what computes them on a card.

    forward     y = (codes of x · codes of Wᵀ) · scales of x · scales of W + bias
    backward    dx = (codes of g' · codes of W) · scales of g',   g' = g · scales of W

x and g have a scale per token, by whose reciprocal they are multiplied before they are rounded; W has one per output
row. In the backward pass the sum runs over the rows of W, so their scales are folded into the gradient before it is
rounded. Codes are int8, or fp8 (e4m3) where the weight has fp8 codes and the card multiplies them. int8 codes are
summed exactly in int32, fp8 codes in float32, of which a card keeps fewer bits (see `fp8_product`). Scales, bias and
an adapter's change are applied in float32, and the result is rounded once.

Plain torch computes them, and on a CUDA device `card_operators`; the results agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..packages import need_triton
from ..text import reason_of
from ..weights.stored import hadamard
from .card_operators import NAMESPACE, define_operators, fp8_product, largest_code
from .formats import EightBits, Format, Nf4, depending_on
from .operators import operator

LEAST_CAPABILITY = (8, 0)  # Triton compiles no int8 products for older cards
FP8 = torch.float8_e4m3fn
UNROUNDED_ROWS = 16  # so few, as the modulation has, only read the weight: 8 bits would save no time
_FEW_ROWS = 2  # the most rows that `few_rows` computes


class Coded(NamedTuple):
    """Numbers as 8-bit codes [rows, columns] with a float32 scale for each row [rows]. `rotation` is that of
    StoredWeight. If `is_transposed`, the codes are [columns, rows]."""

    codes: Tensor
    scales: Tensor
    rotation: int = 0
    is_transposed: bool = False


class Change(NamedTuple):
    """An adapter's change of a product: scale · inner [..., rank] · up [out, rank]ᵀ."""

    inner: Tensor
    up: Tensor
    scale: float = 1.0

    def scaled_up(self) -> Tensor:
        """scale · up."""
        return self.up if self.scale == 1 else self.up * self.scale


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


def input_gradient(gradient: Tensor, weight: Coded, gelu_input: Tensor | None = None) -> Tensor:
    """dx [..., in] of a gradient [..., out] and a weight [out, in], in the gradient's dtype.

    With `gelu_input` [..., out], the product's result, `gradient` is that of gelu(gelu_input).
    """
    gelu_input = None if gelu_input is None else gelu_input.flatten(0, -2)
    tokens = quantised(gradient.flatten(0, -2), weight.codes.dtype, weight.scales, gelu_input=gelu_input)
    dx = _multiplied(tokens, weight.codes, None, None, gradient.dtype, backward=not weight.is_transposed)
    return rotated(dx.view(*gradient.shape[:-1], dx.shape[-1]), weight.rotation)


def quantised(
    x: Tensor,
    dtype: torch.dtype,
    factors: Tensor | None = None,
    *,
    gelu: bool = False,
    gelu_input: Tensor | None = None,
) -> Coded:
    """x [rows, columns] times `factors` [columns], as codes of `dtype`: a row's largest number gets the largest code.

    `gelu`: the codes are those of gelu(x). `gelu_input` [rows, columns]: x is the gradient of gelu(gelu_input), and the
    codes are those of the gradient of gelu_input. gelu is the approximation with tanh, rounded to x's dtype.

    A row with NaN or infinite numbers gets the scale NaN or infinite.
    """
    if x.is_cuda:
        return Coded(*operator(NAMESPACE, "quantise")(x, factors, gelu_input, gelu, dtype))
    if gelu:
        x = functional.gelu(x, approximate="tanh")
    if gelu_input is not None:
        x = torch.ops.aten.gelu_backward.default(x, gelu_input, approximate="tanh")
    values = x if factors is None else x * factors
    scales = token_scales(values, dtype)
    values = values * scales.reciprocal()
    return Coded((values if dtype.is_floating_point else values.round()).to(dtype), scales.flatten())


def reads_few_rows(x: Tensor, form: Format, codes: torch.dtype) -> bool:
    """Whether `few_rows` computes a product of x [..., in] with a weight in this format."""
    return x.numel() <= _FEW_ROWS * x.shape[-1] and form == EightBits() and codes in (torch.int8, FP8)


def few_rows(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    """y [..., out] of one or two rows x [..., in]: on a card, it reads each 8-bit code once and writes no weight.

    `codes` [out, in] and `scale` [out, 1] or [] are the tensors of EightBits.
    """
    codes, scales, *_ = stored(codes, scale)
    if x.is_cuda:
        return operator(NAMESPACE, "few_rows")(x.flatten(0, -2), codes, scales, bias).view(*x.shape[:-1], len(codes))
    y = x.float() @ codes.float().T * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def token_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 scales [..., 1] with which x [..., columns] is rounded to codes of `dtype`."""
    # The least scale is not denormal: MPS would take it as zero, and divide a token of zeros by it.
    return (x.abs().amax(-1, keepdim=True).float() / largest_code(dtype)).clamp_min(torch.finfo(torch.float32).tiny)


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
        return stored(*tensors, form.rotation)  # type: ignore[union-attr]
    if _is_on_card(tensors[0]) and (known := _kernel_sizes(form, tensors[0])):
        codes, scales = operator(NAMESPACE, "quantise_weight")(list(tensors), *known, gradient)
        return Coded(codes, scales, is_transposed=gradient is not None)
    tensors = tensors if gradient is None else depending_on(gradient, tensors)
    return quantised(form.dequantise(tensors, torch.float32), dtype)


def stored(codes: Tensor, scale: Tensor, rotation: int = 0) -> Coded:
    """The tensors of EightBits, whose scale [out, 1] or [] is one for each row, as a kernel reads them."""
    return Coded(codes, scale.float().expand(len(codes), 1).flatten().contiguous(), rotation)


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
    """Why small products fail on a CUDA device, for example because Triton finds no C compiler; empty if they work."""
    define_operators()
    try:
        x = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        stored_codes, nf4 = quantised(x, torch.int8), _small_nf4(device)
        for weight in (stored_codes, coded(*nf4, torch.int8)):
            product(x, weight, None, change=Change(x[:, :16], x[:, :16]), gelu=True)
        for weight in (stored_codes, coded(*nf4, torch.int8, x)):
            input_gradient(x, weight, x).tolist()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        return f"{type(error).__name__}: {reason_of(error)}"
    return ""


def _small_nf4(device: torch.device) -> tuple[Nf4, list[Tensor]]:
    """A weight [64, 64] of zeros in NF4."""
    codes, absmax = (torch.zeros(count, dtype=torch.uint8, device=device) for count in (2048, 64))
    others = [torch.zeros(shape, device=device) for shape in ((16,), (1,), (256,), ())]
    return Nf4(64, 64, 64, 256), [codes, absmax, *others]


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
        return torch.is_tensor(fp8_product(codes, codes, scales, scales, None, torch.bfloat16))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def adds_changes(codes: torch.dtype, x: Tensor) -> bool:
    """Whether the kernel that multiplies such codes adds a Change of x's dtype: int8's does, on a card."""
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
        inner, up = (None, None) if change is None else (change.inner.flatten(0, -2), change.scaled_up())
        return operator(NAMESPACE, "product")(
            tokens.codes, weight, tokens.scales, scales, bias, inner, up, backward, dtype
        )
    values = weight.float()
    y = tokens.codes.float() @ (values if backward else values.T)
    y *= tokens.scales.unsqueeze(-1)
    if scales is not None:
        y *= scales
    if bias is not None:
        y = y + bias
    if change is not None:
        y = y + change.inner.flatten(0, -2).float() @ change.scaled_up().float().T
    return y.to(dtype)
