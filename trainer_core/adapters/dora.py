"""DoRA on base weights of any precision, as a variant of peft's LoRA layer.

A layer's weight becomes m · (W + s·B·A) / |W + s·B·A|, row by row. m [o] is trained; the norm in the denominator is
treated as a constant in the gradient (section 4.3 of the DoRA paper, arXiv 2402.09353). peft's own variant can't use
quantised weights (fp8, int8 or nf4 codes) and builds several matrices of the weight's size. Here the norm is computed
from the stored |W|² and products with the thin matrices A and B.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from ..memory.streaming import weights_on_device
from ..precision.frozen_linear import dense_weight


class DoraLinear(Linear):
    """peft's LoRA layer with DoraOnAnyWeight instead of peft's DoRA variant."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """The variant for each combination of settings, as peft looks it up."""
        return {(): None, ("use_dora",): DoraOnAnyWeight}


class Magnitude(nn.Module):
    """The trained row norms m [o], and |W|² of the base weight's rows [o].

    `strength` scales the whole change: 0 is the base model, 1 the adapter as trained.
    """

    def __init__(self, base_square: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(base_square.sqrt())
        self.register_buffer("base_square", base_square, persistent=False)
        self.strength = 1.0


class DoraOnAnyWeight(LoraVariant):
    """The DoRA forward described in the module's docstring."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Start m at the base weight's row norms. peft calls this after it has created A and B."""
        device, base = module.lora_A[adapter_name].weight.device, module.get_base_layer()
        with weights_on_device(base):
            square = dense_weight(base).float().square().sum(dim=1)
        module.lora_magnitude_vector[adapter_name] = Magnitude(square.to(device))

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output [..., o]. `result` is the base layer's output for x; dropout affects only the adapter."""
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        magnitude: Magnitude = module.lora_magnitude_vector[active_adapter]
        change = lora_b(lora_a(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
        bias = module.get_base_layer().bias
        unbiased = (result if bias is None else result - bias.to(result.dtype)) + change
        gain = magnitude.weight / merged_length(module, active_adapter)
        moved = change + (gain - 1).to(result.dtype) * unbiased
        return result + (moved if magnitude.strength == 1 else moved * magnitude.strength)


@torch.no_grad()
def merged_length(module: Any, adapter_name: str) -> Tensor:
    """Row norms |W + s·B·A| [o] in float32, computed without that matrix. Needs the base weight on the device."""
    lora_a, lora_b = (each[adapter_name].weight.detach().float() for each in (module.lora_A, module.lora_B))
    return merged_lengths(module, adapter_name, lora_a, lora_b)


@torch.no_grad()
def merged_lengths(module: Any, adapter_name: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """`merged_length` for any A [r, i] and B [o, r]: the root of |W|² + 2s·W·BA + s²·|BA|², row by row."""
    scale, square = module.scaling[adapter_name], module.lora_magnitude_vector[adapter_name].base_square
    with torch.autocast(lora_a.device.type, enabled=False):
        weight = dense_weight(module.get_base_layer())
        across = (weight @ lora_a.to(weight.dtype).T).float()
        crossed = (across * lora_b).sum(dim=1)
        own = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(dim=1)
    return (square + 2 * scale * crossed + scale**2 * own).clamp_min(1e-12).sqrt()
