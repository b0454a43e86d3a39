"""A frozen linear layer with a quantised weight that gradients pass through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import eight_bit
from .formats import EightBits, Format, QuantisedWeight, depending_on

_PADDING = (None,) * 6  # a format has at most six tensors
_FEW = 2  # rows


class FrozenLinear(nn.Linear):
    """y = x · dequantised(weight)ᵀ + bias, x [..., in], y [..., out]. Only x gets a gradient.

    Forward and backward each dequantise the weight to x's dtype, so that only the quantised weight stays in memory. x
    is not kept for the backward pass, because a frozen weight has no gradient. The parameter `weight` holds the codes,
    and buffers hold the format's other tensors.

    With `rounds_input`, x is rounded to the codes' 8-bit format first, with one scale per token. The backward pass
    ignores the rounding (a straight-through estimator). With `codes`, a type of 8-bit codes, both passes multiply such
    codes, as `eight_bit` defines it; that rounds x in the same way. `set_products` sets it.
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
        self.codes: torch.dtype | None = None

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
        codes = self.codes if input.numel() > eight_bit.FEW_ROWS * self.in_features else None
        rounds = self.rounds_input and codes is None
        x = _Rounded.apply(input, self.weight.dtype) if rounds else input  # type: ignore[no-untyped-call]
        # Looks buffers up directly: nn.Module's attribute access is slow, and NF4 has five.
        tensors = [self.weight, *(self._buffers[name] for name in self.format.names[1:])]
        if not (x.requires_grad and torch.is_grad_enabled()):
            return product(x, self.bias, self.format, tensors, codes)  # type: ignore[arg-type]
        others = _PADDING[len(tensors) :]
        return _Product.apply(x, self.bias, self.format, codes, 0, *tensors, *others)  # type: ignore[no-untyped-call]

    def shares(self, other: nn.Module, x: Tensor) -> bool:
        """Whether this layer and another one multiply the same 8-bit codes of x."""
        is_coded = self.codes is not None and x.numel() > eight_bit.FEW_ROWS * self.in_features
        return is_coded and isinstance(other, FrozenLinear) and self.codes == other.codes and not self.rotation

    @property
    def rotation(self) -> int:
        """The rotation of the weight's columns, 0 for none; see StoredWeight."""
        return self.format.rotation if isinstance(self.format, EightBits) else 0

    def product_of(self, tokens: eight_bit.Coded, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in] with these codes, without gradients."""
        assert self.codes is not None
        tensors = [self.weight, *(self._buffers[name] for name in self.format.names[1:])]
        weight = eight_bit.coded(self.format, tensors, self.codes)  # type: ignore[arg-type]
        return eight_bit.product(x, weight, self.bias, tokens)

    def gradient_only(self, x: Tensor) -> Tensor:
        """See the function of the same name."""
        tensors = [self.weight, *(self._buffers[name] for name in self.format.names[1:])]
        codes = self.codes if x.numel() > eight_bit.FEW_ROWS * self.in_features else None
        given = None, self.format, codes, self.out_features
        return _Product.apply(x, *given, *tensors, *_PADDING[len(tensors) :])  # type: ignore[no-untyped-call]


def together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs [..., out] of several linear layers for the same x [..., in], which may share work.

    Adapters of one kind share a product. Without gradients, 8-bit products share the codes of x; with gradients, the
    compiler finds that they are the same.
    """
    first, *others = layers
    if own := getattr(type(first), "together", None):
        return own(layers, x) if all(type(other) is type(first) for other in others) else [each(x) for each in layers]
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if needs_gradient or not all(isinstance(each, FrozenLinear) and each.shares(first, x) for each in layers):
        return [each(x) for each in layers]
    frozen: list[Any] = list(layers)
    codes = eight_bit.quantised(x.flatten(0, -2), frozen[0].codes)
    return [each.product_of(codes, x) for each in frozen]


def set_products(network: nn.Module, device: torch.device, *, in_8_bits: bool) -> None:
    """Let the quantised layers of `network` multiply 8-bit codes on `device`, or numbers of their input's dtype."""
    if in_8_bits and device.type == "cuda":
        eight_bit.define_operator()
    for layer in network.modules():
        if isinstance(layer, FrozenLinear):
            layer.codes = eight_bit.code_dtype(layer.format, layer.weight.dtype, device) if in_8_bits else None


@contextmanager
def exact_products(network: nn.Module) -> Iterator[None]:
    """A context in which no layer of `network` multiplies 8-bit codes."""
    layers = [layer for layer in network.modules() if isinstance(layer, FrozenLinear)]
    before = [layer.codes for layer in layers]
    for layer in layers:
        layer.codes = None
    try:
        yield
    finally:
        for layer, codes in zip(layers, before, strict=True):
            layer.codes = codes


def product(
    x: Tensor, bias: Tensor | None, form: Format, weight: Sequence[Tensor], codes: torch.dtype | None
) -> Tensor:
    """y [..., out] of x [..., in]. `weight` has the format's tensors; the other arguments are those of FrozenLinear."""
    if codes is None and torch.compiler.is_compiling() and x.numel() <= _FEW * x.shape[-1] and form == EightBits():
        return _few_rows(x, bias, *weight)
    if codes is None:
        return functional.linear(x, form.dequantise(weight, x.dtype), bias)
    return eight_bit.product(x, eight_bit.coded(form, weight, codes), bias)


def _few_rows(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    """y [..., out] of one or two rows x [..., in]. Compiled, it reads each code once and writes no weight."""
    y = (x.unsqueeze(-2).float() * codes.float()).sum(-1) * scale.flatten()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def input_gradient(gradient: Tensor, form: Format, weight: Sequence[Tensor], codes: torch.dtype | None) -> Tensor:
    """dx [..., in] of a gradient [..., out], with the arguments of `product`."""
    if codes is None:
        return gradient @ form.dequantise(depending_on(gradient, weight), gradient.dtype)
    return eight_bit.input_gradient(gradient, eight_bit.coded(form, weight, codes, gradient))


def rounded_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] rounded to int8 or fp8 with one scale per token, in x's dtype again."""
    scale = eight_bit.token_scales(x, dtype)
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
        codes: torch.dtype | None,
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
        ctx.form, ctx.codes = form, codes
        if out_features:
            return x.new_zeros(()).expand(*x.shape[:-1], out_features)
        return product(x, bias, form, [each for each in (a, b, c, d, e, f) if each is not None], codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight = [each for each in ctx.saved_tensors if each is not None]
        return input_gradient(gradients[0], ctx.form, weight, ctx.codes), None, None, None, None, *_PADDING


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
