"""LoRA as a variant of peft's layer, with a forward that does less work in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from ..precision.frozen_linear import gradient_only, together


class LoraLinear(Linear):
    """peft's LoRA layer with one adapter: y = base(x) + s · B · A · dropout(x), bit-equal to peft's.

    For every call, peft's own forward loops over adapters, looks for variants, and calls a module for each factor. An
    uncompiled step with few tokens takes as long as the host needs to launch its kernels, so this matters.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to y [..., out]."""
        (name,) = self.lora_A
        if self.disable_adapters or self.merged or x.dtype != self.lora_A[name].weight.dtype:
            return super().forward(x, *args, **kwargs)
        return self._plus_change(self.base_layer(x), x)  # first, as in peft: the order decides how gradients add up

    def gradient_only(self, x: Tensor) -> Tensor:
        """A tensor like the output, with the same gradients but other values: see `precision.frozen_linear`."""
        if self.disable_adapters or self.merged:
            return gradient_only(self.base_layer, x)
        return self._plus_change(gradient_only(self.base_layer, x), x)

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
        results = together([layer.base_layer for layer in layers], x)
        inner = functional.linear(x, torch.cat(downs)).split(sizes, dim=-1)
        return [layer._plus_up(result, each) for layer, result, each in zip(layers, results, inner, strict=True)]

    def _plus_change(self, result: Tensor, x: Tensor) -> Tensor:
        """`result` [..., out] plus s · B · A · dropout(x), for x [..., in]."""
        (name,) = self.lora_A
        dropout = self.lora_dropout[name]
        dropped = x if isinstance(dropout, nn.Identity) else dropout(x)
        return self._plus_up(result, functional.linear(dropped, self.lora_A[name].weight))

    def _plus_up(self, result: Tensor, inner: Tensor) -> Tensor:
        """`result` [..., out] plus s · B · inner, for inner [..., rank]."""
        (name,) = self.lora_A
        change, scale = functional.linear(inner, self.lora_B[name].weight), self.scaling[name]
        return result + (change if scale == 1 else change * scale)
