"""The ordinary numbers behind a linear layer's weight, whatever its precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .frozen_linear import FrozenLinear


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] that the layer's forward multiplies with. Made anew where it is quantised, for one use."""
    weight: Any = layer.weight
    if isinstance(layer, FrozenLinear):
        return layer.dequantised(torch.float32)
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize().detach() if hasattr(weight, "qtype") else weight.detach()
