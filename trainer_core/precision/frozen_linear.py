"""A frozen linear layer with a quantised weight that gradients pass through."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .formats import Format, QuantisedWeight, format_of

_LIBRARIES: list[torch.library.Library] = []  # an operator exists as long as its library object


class FrozenLinear(nn.Linear):
    """y = x · dequantised(weight)ᵀ + bias, x [..., in], y [..., out]. Only x gets a gradient.

    Forward and backward each dequantise the weight to x's dtype, so that only the quantised weight stays in memory. x
    is not kept for the backward pass, because a frozen weight has no gradient. The parameter `weight` holds the codes,
    and buffers hold the format's other tensors.

    With `rounds_input`, x is rounded to the codes' 8-bit format first, with one scale per token. The backward pass
    ignores the rounding (a straight-through estimator).
    """

    rounds_input = False

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.format, self._note = weight.format, json.dumps(weight.note)
        tensors = dict(weight.tensors)
        self.weight = nn.Parameter(tensors.pop("codes"), requires_grad=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def quantised(self) -> QuantisedWeight:
        """The weight; its tensors are the layer's own."""
        return QuantisedWeight(self.format, dict(zip(self.format.names, self._tensors(), strict=True)))

    def _tensors(self) -> list[Tensor]:
        return [self.weight.data, *(self.get_buffer(name) for name in self.format.names[1:])]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a new tensor of `dtype`."""
        return self.format.dequantise(self._tensors(), dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """x [..., in] to y [..., out]."""
        x = _Rounded.apply(input, self.weight.dtype) if self.rounds_input else input  # type: ignore[no-untyped-call]
        tensors = [getattr(self, name) for name in ("weight", *self.format.names[1:])]
        if torch.compiler.is_compiling():
            return torch.ops.qwen_edit_trainer.product(x, tensors, self._note, self.out_features, False, self.bias)  # noqa: FBT003
        return _Product.apply(x, self.bias, self._note, *tensors)  # type: ignore[no-untyped-call]


def rounded_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] rounded to int8 or fp8 with one scale per token, in x's dtype again."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    codes = x.float() / scale
    codes = codes.to(dtype).float() if dtype.is_floating_point else codes.round()
    return codes.mul_(scale).to(x.dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004 - autograd's form
        return rounded_tokens(x, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return gradients[0], None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, note: str, *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.note = note
        return _multiplied(x, weight, note, 0, False, bias)  # noqa: FBT003

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors
        gradient = _multiplied(gradients[0], weight, ctx.note, 0, True, None)  # noqa: FBT003
        return gradient, None, None, *(None for _ in weight)


def _multiplied(
    x: Tensor,
    weight: Sequence[Tensor],
    note: str,
    width: int,  # noqa: ARG001 - of the result; only the compiler needs it
    transposed: bool,  # noqa: FBT001 - operators have no keywords here
    bias: Tensor | None,
) -> Tensor:
    """x · Wᵀ + bias, or x · W if `transposed`."""
    matrix = _format(note).dequantise(weight, x.dtype)
    return x @ matrix if transposed else functional.linear(x, matrix, bias)


@cache
def _format(note: str) -> Format:
    return format_of(json.loads(note))


@cache
def register_product() -> None:
    """Register the product as an operator, before code that uses it is compiled.

    The compiler would otherwise see the dequantised weight, and keep it from the forward to the backward pass.
    """
    if hasattr(torch.ops.qwen_edit_trainer, "product"):  # by a copy of this module with another package name
        return
    library = torch.library.Library("qwen_edit_trainer", "FRAGMENT")
    library.define("product(Tensor x, Tensor[] w, str note, int width, bool transposed, Tensor? bias) -> Tensor")
    library.impl("product", _multiplied, "CompositeExplicitAutograd")
    library.impl("product", lambda x, _w, _note, width, *_: x.new_empty((*x.shape[:-1], width)), "Meta")
    torch.library.register_autograd("qwen_edit_trainer::product", _backward, setup_context=_keep, lib=library)
    _LIBRARIES.append(library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's form
    x, weight, ctx.note = inputs[:3]
    ctx.width = x.shape[-1]
    ctx.save_for_backward(*weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    product, weight = torch.ops.qwen_edit_trainer.product, list(ctx.saved_tensors)
    return product(gradient, weight, ctx.note, ctx.width, True, None), [None] * len(weight), None, None, None, None  # noqa: FBT003


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer of any precision. A quantised weight is dequantised on every call."""
    if isinstance(layer, FrozenLinear):
        return layer.dequantised(torch.float32)
    weight: Any = layer.weight
    return weight.detach()
