"""DoRA on weights of any precision, as a variant of peft's LoRA layer.

A layer's weight becomes m · (W + s·B·A) / |W + s·B·A|, row by row: m [o] is learnt, and the length in the denominator
counts as a constant in the gradient (section 4.3 of the DoRA paper, arXiv 2402.09353). peft's own variant reads
`layer.weight` as numbers, which codes of fp8, int8 or nf4 are not, and builds several matrices of the weight's size.
Here the length comes from |W|², kept, and two thin products.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from ..precision.frozen_linear import dense_weight


class DoraLinear(Linear):
    """peft's LoRA layer with our variant in the place of its own. The base layer may be of any precision."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """By the settings that ask for it."""
        return {(): None, ("use_dora",): DoraOnAnyWeight}


class Magnitude(nn.Module):
    """The learnt length m of each row [o], and |W|² of each [o]. `strength` 0 is the base, 1 as trained."""

    def __init__(self, base_square: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(base_square.sqrt())
        self.register_buffer("base_square", base_square, persistent=False)
        self.strength = 1.0


class DoraOnAnyWeight(LoraVariant):
    """See the module."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Called by peft when it has made A and B."""
        device = module.lora_A[adapter_name].weight.device
        square = dense_weight(module.get_base_layer()).float().square().sum(dim=1)
        module.lora_magnitude_vector[adapter_name] = Magnitude(square.to(device))

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """`result` [..., o] is the base layer's output for x; dropout acts on the adapter's inputs alone."""
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
    """|W + s·B·A| of each row [o] in float32, without that matrix."""
    lora_a, lora_b = (each[adapter_name].weight.detach().float() for each in (module.lora_A, module.lora_B))
    return merged_lengths(module, adapter_name, lora_a, lora_b)


@torch.no_grad()
def merged_lengths(module: Any, adapter_name: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The same for A [r, i] and B [o, r] that need not be the layer's own: |W|² + 2s·W·BA + s²·|BA|² by rows."""
    scale, square = module.scaling[adapter_name], module.lora_magnitude_vector[adapter_name].base_square
    with torch.autocast(lora_a.device.type, enabled=False):
        weight = dense_weight(module.get_base_layer())
        across = (weight @ lora_a.to(weight.dtype).T).float()
        crossed = (across * lora_b).sum(dim=1)
        own = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(dim=1)
    return (square + 2 * scale * crossed + scale**2 * own).clamp_min(1e-12).sqrt()
