"""Names of LoRA tensors in files: `transformer.<module>.lora_A.weight`, which ComfyUI and diffusers both read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "transformer."


def to_file_tensors(lora: Mapping[str, Tensor], scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the file for adapter tensors named `<module>.lora_A` and `<module>.lora_B`.

    The scale alpha / rank is folded into B and there is no alpha tensor: readers disagree about what a missing or
    present one means, and all agree about this.
    """
    return {
        f"{PREFIX}{name}.weight": (tensor.detach().float().cpu() * (scale if name.endswith(".lora_B") else 1)).to(dtype)
        for name, tensor in lora.items()
    }


def weight_changes(file_tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(down [rank, in], up [out, rank]) of every module in tensors of this layout."""
    modules = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in file_tensors}
    return {
        module: (file_tensors[f"{PREFIX}{module}.lora_A.weight"], file_tensors[f"{PREFIX}{module}.lora_B.weight"])
        for module in sorted(modules)
    }
