"""A frozen linear layer with a quantised weight that gradients pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .formats import Format, QuantisedWeight

_PADDING = (None,) * 6  # a format has at most six tensors


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
        self.format = weight.format
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
        # Looks buffers up directly: nn.Module's attribute access is slow, and NF4 has five.
        tensors = [self.weight, *(self._buffers[name] for name in self.format.names[1:])]
        if not (x.requires_grad and torch.is_grad_enabled()):
            return functional.linear(x, self.format.dequantise(tensors, x.dtype), self.bias)
        return _Product.apply(x, self.bias, self.format, 0, *tensors, *_PADDING[len(tensors) :])  # type: ignore[no-untyped-call]

    def gradient_only(self, x: Tensor) -> Tensor:
        """See the function of the same name."""
        tensors = [self.weight, *(self._buffers[name] for name in self.format.names[1:])]
        sizes = None, self.format, self.out_features
        return _Product.apply(x, *sizes, *tensors, *_PADDING[len(tensors) :])  # type: ignore[no-untyped-call]


def rounded_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] rounded to int8 or fp8 with one scale per token, in x's dtype again."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    # The least scale is not denormal: MPS would take it as zero, and divide a token of zeros by it.
    scale = (x.float().abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    codes = x.float() / scale
    codes = codes.to(dtype).float() if dtype.is_floating_point else codes.round()
    if torch.compiler.is_compiling():
        return (codes * scale).to(x.dtype)  # not in place: compiled by torch 2.11, the gradient would be zero
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
    def forward(  # noqa: PLR0913 - torch's compiler can't handle a variable number of arguments
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        form: Format,
        out_features: int,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        d: Tensor | None,
        e: Tensor | None,
        f: Tensor | None,
    ) -> Tensor:
        """`a` to `f` are the format's tensors. With `out_features`, the product is skipped: see `gradient_only`."""
        ctx.save_for_backward(a, b, c, d, e, f)
        ctx.form = form
        weight = [each for each in (a, b, c, d, e, f) if each is not None]
        if out_features:
            return x.new_zeros(()).expand(*x.shape[:-1], out_features)
        return functional.linear(x, form.dequantise(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        weight = [each for each in ctx.saved_tensors if each is not None]
        if torch.compiler.is_compiling():
            # Adds zero. The compiler sees that the whole weight depends on the gradient. Otherwise it would compute the
            # weight, or its unpacked codes, in the forward pass and keep them until the backward pass. torch can't add
            # fp8 codes, and they need no unpacking.
            zero = gradient.flatten()[:0].sum()
            weight = [
                each if each.dtype.itemsize == 1 and each.is_floating_point() else each + zero.to(each.dtype)
                for each in weight
            ]
        return gradient @ ctx.form.dequantise(weight, gradient.dtype), None, None, None, *_PADDING


def gradient_only(layer: nn.Module, x: Tensor) -> Tensor:
    """A tensor like `layer(x)` with the same gradient of x, but whose values mean nothing: it skips the product.

    For the last layer of a block that is computed again only for its gradients. Layers of other kinds compute all.
    """
    if own := getattr(layer, "gradient_only", None):
        return own(x)
    if type(layer) is nn.Linear and not layer.weight.requires_grad:
        return _NoProduct.apply(x, layer.weight)  # type: ignore[no-untyped-call]
    return layer(x)


class _NoProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ ctx.saved_tensors[0], None


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer of any precision. A quantised weight is dequantised on every call.

    If the layer may be streamed, read it in the block's forward pass or inside `memory.streaming.weights_on_device`.
    """
    if isinstance(layer, FrozenLinear):
        return layer.dequantised(torch.float32)
    weight: Any = layer.weight
    return weight.detach()
