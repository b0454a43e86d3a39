"""A frozen linear layer with a quantised weight that gradients pass through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import eight_bit
from .card_operators import define_operators
from .formats import EightBits, Format, QuantisedWeight, depending_on

_PADDING = (None,) * 6  # a format has at most six tensors
Place = Literal["", "before gelu", "after gelu"]  # of a layer in an MLP


class FrozenLinear(nn.Linear):
    """y = x · dequantised(weight)ᵀ + bias, x [..., in], y [..., out]. The weight gets no gradient.

    Forward and backward each dequantise the weight to x's dtype, so that only the quantised weight stays in memory. x
    is not kept for the backward pass, because a frozen weight has no gradient. The parameter `weight` holds the codes,
    and buffers hold the format's other tensors.

    With `rounds_input`, x is rounded to the codes' 8-bit format first, with one scale per token. The backward pass
    ignores the rounding (a straight-through estimator). With `codes`, a type of 8-bit codes, both passes multiply such
    codes, as `eight_bit` defines it, which rounds x too. `set_products` sets it.
    """

    rounds_input = False

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        define_operators()
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
        return self._product(input, self._codes_for(input))

    def with_change(self, x: Tensor, change: eight_bit.Change) -> Tensor:
        """`forward` of x [..., in] plus a change, in one kernel. Call it if `adds_changes`."""
        return self._product(x, self.codes, change)

    def adds_changes(self, x: Tensor) -> bool:
        """Whether the kernel for the product of x [..., in] adds an adapter's change."""
        codes = self._codes_for(x)
        return codes is not None and eight_bit.adds_changes(codes, x)

    def _codes_for(self, x: Tensor) -> torch.dtype | None:
        """The type of codes in which x [..., in] is multiplied; None if it is not rounded."""
        return self.codes if x.numel() > eight_bit.UNROUNDED_ROWS * self.in_features else None

    def _all_tensors(self) -> list[Any]:
        # Looks buffers up directly: nn.Module's attribute access is slow, and NF4 has five.
        return [self.weight, *(self._buffers[name] for name in self.format.names[1:])]

    def _product(
        self, x: Tensor, codes: torch.dtype | None, change: eight_bit.Change | None = None, place: Place = ""
    ) -> Tensor:
        if self.rounds_input and codes is None:
            x = _Rounded.apply(x, self.weight.dtype)  # type: ignore[no-untyped-call]
        tensors = self._all_tensors()
        inner, up, scale = change or (None, None, 1.0)
        if not torch.is_grad_enabled() or not (x.requires_grad or (up is not None and up.requires_grad)):
            return product(x, self.bias, self.format, tensors, codes, change, place)
        how = scale, self.format, codes, place, 0
        return _Product.apply(x, self.bias, inner, up, *how, *tensors, *_PADDING[len(tensors) :])  # type: ignore[no-untyped-call]

    def shares(self, other: nn.Module, x: Tensor) -> bool:
        """Whether this layer and another one multiply the same 8-bit codes of x."""
        return self.is_coded(x) and isinstance(other, FrozenLinear) and self.codes == other.codes and not self.rotation

    def is_coded(self, x: Tensor) -> bool:
        """Whether x [..., in] is rounded to 8-bit codes."""
        return self._codes_for(x) is not None

    @property
    def rotation(self) -> int:
        """The rotation of the weight's columns, 0 for none; see StoredWeight."""
        return self.format.rotation if isinstance(self.format, EightBits) else 0

    def product_of(self, tokens: eight_bit.Coded, x: Tensor, change: eight_bit.Change | None) -> Tensor:
        """y [..., out] of x [..., in] with these codes, plus a change, without gradients."""
        assert self.codes is not None
        weight = eight_bit.coded(self.format, self._all_tensors(), self.codes)
        return eight_bit.product(x, weight, self.bias, tokens, change)

    def only_gradients(self, x: Tensor, place: Place = "") -> Tensor:
        """See the function of the same name."""
        tensors, how = self._all_tensors(), (1.0, self.format, self._codes_for(x), place, self.out_features)
        return _Product.apply(x, None, None, None, *how, *tensors, *_PADDING[len(tensors) :])  # type: ignore[no-untyped-call]

    def before_gelu(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in] for a layer that calls `after_gelu` with it. Both need codes.

        In the backward pass, this layer takes the gradient of gelu(y): one kernel can then round the gradient of y.
        """
        return self._product(x, self.codes, place="before gelu")

    def after_gelu(self, x: Tensor, *, gradient_only: bool) -> Tensor:
        """`forward` of gelu(x), or what `only_gradients` says of it. The gradient is that of gelu(x)."""
        return (
            self.only_gradients(x, "after gelu") if gradient_only else self._product(x, self.codes, place="after gelu")
        )


def together(layers: Sequence[nn.Module], x: Tensor, changes: Sequence[eight_bit.Change] = ()) -> list[Tensor]:
    """The outputs [..., out] of several linear layers for the same x [..., in], which may share work.

    Adapters of one kind share a product. Without gradients, 8-bit products share the codes of x; with gradients, the
    compiler finds that they are the same. `changes`: one for each layer; all are frozen then, and add changes.
    """
    first, *others = layers
    if own := getattr(type(first), "together", None):
        return own(layers, x) if all(type(other) is type(first) for other in others) else [each(x) for each in layers]
    frozen: list[Any] = list(layers)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or any(each.up.requires_grad for each in changes))
    if not needs_gradient and all(isinstance(each, FrozenLinear) and each.shares(first, x) for each in layers):
        codes = eight_bit.quantised(x.flatten(0, -2), frozen[0].codes)
        return [each.product_of(codes, x, change) for each, change in zip_longest(frozen, changes)]
    if changes:
        return [layer.with_change(x, change) for layer, change in zip(frozen, changes, strict=True)]
    return [each(x) for each in layers]


def mlp(first: nn.Module, last: nn.Module, x: Tensor, *, gradient_only: bool) -> Tensor:
    """last(gelu(first(x))) [..., out] of x [..., in], or what `only_gradients` says of it. gelu is the approximation
    with tanh.

    Between two 8-bit products, gelu and the rounding are one kernel in each direction.
    """
    both = isinstance(first, FrozenLinear) and isinstance(last, FrozenLinear) and first.codes == last.codes
    if both and first.is_coded(x) and not last.rotation:
        return last.after_gelu(first.before_gelu(x), gradient_only=gradient_only)
    inner = functional.gelu(first(x), approximate="tanh")
    return only_gradients(last, inner) if gradient_only else last(inner)


def set_products(network: nn.Module, device: torch.device, *, in_8_bits: bool) -> None:
    """Let the quantised layers of `network` multiply 8-bit codes on `device`, or numbers of their input's dtype."""
    for layer in network.modules():
        if isinstance(layer, FrozenLinear):
            layer.codes = eight_bit.code_dtype(layer.format, layer.weight.dtype, device) if in_8_bits else None


def multiplies_8_bits(layer: nn.Module) -> bool:
    """Whether a layer, with or without an adapter, multiplies 8-bit codes."""
    return getattr(getattr(layer, "base_layer", layer), "codes", None) is not None


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
    x: Tensor,
    bias: Tensor | None,
    form: Format,
    weight: Sequence[Tensor],
    codes: torch.dtype | None,
    change: eight_bit.Change | None = None,
    place: Place = "",
) -> Tensor:
    """y [..., out] of x [..., in]. `weight` has the format's tensors, `codes` is that of FrozenLinear, and `place` says
    where gelu is. Only products of codes take a change or gelu."""
    if codes is not None:
        weights = eight_bit.coded(form, weight, codes)
        return eight_bit.product(x, weights, bias, change=change, gelu=place == "after gelu")
    if torch.compiler.is_compiling() and eight_bit.reads_few_rows(x, form, weight[0].dtype):
        return eight_bit.few_rows(x, bias, *weight)
    return functional.linear(x, form.dequantise(weight, x.dtype), bias)


def input_gradient(
    gradient: Tensor,
    form: Format,
    weight: Sequence[Tensor],
    codes: torch.dtype | None,
    gelu_input: Tensor | None = None,
) -> Tensor:
    """dx [..., in] of a gradient [..., out], with the arguments of `product`. `gelu_input` is that of `eight_bit`."""
    if codes is None:
        return gradient @ form.dequantise(depending_on(gradient, weight), gradient.dtype)
    return eight_bit.input_gradient(gradient, eight_bit.coded(form, weight, codes, gradient), gelu_input)


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
        inner: Tensor | None,
        up: Tensor | None,
        scale: float,
        form: Format,
        codes: torch.dtype | None,
        place: Place,
        out_features: int,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        d: Tensor | None,
        e: Tensor | None,
        f: Tensor | None,
    ) -> Tensor:
        """`inner` [..., rank], `up` [out, rank] and `scale` are those of a Change, `a` to `f` the format's tensors.

        With `out_features`, the product is skipped: see `only_gradients`.
        """
        ctx.form, ctx.codes, ctx.scale = form, codes, scale
        if out_features:
            y = x.new_zeros(()).expand(*x.shape[:-1], out_features)
        else:
            change = None if inner is None or up is None else eight_bit.Change(inner, up, scale)
            tensors = [each for each in (a, b, c, d, e, f) if each is not None]
            y = product(x, bias, form, tensors, codes, change, place)
        ctx.save_for_backward(y if place == "before gelu" else None, inner, up, a, b, c, d, e, f)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        y, inner, up, *tensors = ctx.saved_tensors
        of_inner, of_up = None, None
        if inner is not None:
            change = eight_bit.Change(inner, up, ctx.scale)
            of_inner, of_up = gradient @ change.scaled_up(), gradient.flatten(0, -2).T @ inner.flatten(0, -2)
            of_up = of_up if ctx.scale == 1 else of_up * ctx.scale
        weight = [each for each in tensors if each is not None]
        of_x = input_gradient(gradient, ctx.form, weight, ctx.codes, y) if ctx.needs_input_grad[0] else None
        return of_x, None, of_inner, of_up, None, None, None, None, None, *_PADDING


def only_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    """A tensor like `layer(x)` with the same gradient of x, but whose values mean nothing: it skips the product.

    For the last layer of a block that is computed again only for its gradients. Layers of other kinds compute all.
    """
    if own := getattr(layer, "only_gradients", None):
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
