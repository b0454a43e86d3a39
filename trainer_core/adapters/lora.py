"""LoRA as a variant of peft's layer, with a forward that does less work in Python."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


class LoraLinear(Linear):
    """peft's LoRA layer with one adapter: y = base(x) + s · B · A · dropout(x), bit-equal to peft's.

    For every call, peft's own forward loops over adapters, looks for variants, and calls a module for each factor. An
    uncompiled step with few tokens takes as long as the host needs to launch its kernels, so this matters.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to y [..., out]."""
        (name,) = self.lora_A
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if self.disable_adapters or self.merged or x.dtype != down.dtype:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)  # first, as in peft: the order decides how the gradients of x add up
        dropout, scale = self.lora_dropout[name], self.scaling[name]
        dropped = x if isinstance(dropout, nn.Identity) else dropout(x)
        change = functional.linear(functional.linear(dropped, down), up)
        return result + (change if scale == 1 else change * scale)
