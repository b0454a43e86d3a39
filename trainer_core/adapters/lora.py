"""LoRA as a variant of peft's layer, with a forward that does less work in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from ..precision.eight_bit import Change
from ..precision.frozen_linear import FrozenLinear, only_gradients, together

_FUSED_RANK = 64  # largest rank of a change that 8-bit products add: larger ones need too much shared memory


class LoraLinear(Linear):
    """peft's LoRA layer with one adapter: y = base(x) + s · B · A · dropout(x), bit-equal to peft's.

    An int8 product of the base layer adds the change itself, before it rounds the sum.

    For every call, peft's own forward loops over adapters, looks for variants, and calls a module for each factor. An
    uncompiled step with few tokens takes as long as the host needs to launch its kernels, so this matters.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to y [..., out]."""
        (name,) = self.lora_A
        if self.disable_adapters or self.merged or x.dtype != self.lora_A[name].weight.dtype:
            return super().forward(x, *args, **kwargs)
        if self._is_fused(x):
            return self.base_layer.with_change(x, self._change(self._inner(x)))
        return self._plus_up(self.base_layer(x), self._inner(x))  # as in peft: the order decides how gradients add up

    def only_gradients(self, x: Tensor) -> Tensor:
        """A tensor like the output, with the same gradients but other values: see `precision.frozen_linear`."""
        if self.disable_adapters or self.merged:
            return only_gradients(self.base_layer, x)
        result, inner = only_gradients(self.base_layer, x), self._inner(x)
        if self._is_fused(x):  # with the gradients of the fused form, to the last bit
            change = self._change(inner)
            return result + functional.linear(inner, change.scaled_up())
        return self._plus_up(result, inner)

    @staticmethod
    def together(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        """The outputs [..., out] of several layers with the same input: see `precision.frozen_linear`.

        Their factors A are one matrix: x is read once, and its gradients are added up in the product.
        """
        downs, sizes = [], []
        for layer in layers:
            (name,) = layer.lora_A
            down = layer.lora_A[name].weight
            is_plain = isinstance(layer.lora_dropout[name], nn.Identity) and x.dtype == down.dtype
            if layer.disable_adapters or layer.merged or not is_plain:
                return [each(x) for each in layers]
            downs, sizes = [*downs, down], [*sizes, len(down)]
        bases = [layer.base_layer for layer in layers]
        if all(layer._is_fused(x) for layer in layers):
            inner = functional.linear(x, torch.cat(downs)).split(sizes, dim=-1)
            return together(bases, x, [layer._change(each) for layer, each in zip(layers, inner, strict=True)])
        results = together(bases, x)  # first: the order decides how gradients add up
        inner = functional.linear(x, torch.cat(downs)).split(sizes, dim=-1)
        return [layer._plus_up(result, each) for layer, result, each in zip(layers, results, inner, strict=True)]

    def _is_fused(self, x: Tensor) -> bool:
        """Whether the base layer's product of x adds the change."""
        (rank,) = self.r.values()
        return rank <= _FUSED_RANK and isinstance(self.base_layer, FrozenLinear) and self.base_layer.adds_changes(x)

    def _inner(self, x: Tensor) -> Tensor:
        """A · dropout(x) [..., rank] of x [..., in]."""
        (name,) = self.lora_A
        dropout = self.lora_dropout[name]
        return functional.linear(x if isinstance(dropout, nn.Identity) else dropout(x), self.lora_A[name].weight)

    def _change(self, inner: Tensor) -> Change:
        """The change of the base layer's result for inner [..., rank]."""
        (name,) = self.lora_A
        return Change(inner, self.lora_B[name].weight, self.scaling[name])

    def _plus_up(self, result: Tensor, inner: Tensor) -> Tensor:
        """`result` [..., out] plus s · B · inner, for inner [..., rank]."""
        (name,) = self.lora_A
        change, scale = functional.linear(inner, self.lora_B[name].weight), self.scaling[name]
        return result + (change if scale == 1 else change * scale)
