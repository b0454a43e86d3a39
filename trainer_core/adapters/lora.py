"""LoRA as a variant of peft's layer, with a forward that does less work in Python."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from ..precision.frozen_linear import gradient_only


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

    def _plus_change(self, result: Tensor, x: Tensor) -> Tensor:
        """`result` [..., out] plus s · B · A · dropout(x), for x [..., in]."""
        (name,) = self.lora_A
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        dropout, scale = self.lora_dropout[name], self.scaling[name]
        dropped = x if isinstance(dropout, nn.Identity) else dropout(x)
        change = functional.linear(functional.linear(dropped, down), up)
        return result + (change if scale == 1 else change * scale)
