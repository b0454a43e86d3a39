"""A LoRA file on a transformer for sampling, with the effect that ComfyUI gives it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LoraType
from ..weights.adapter_file import AdapterPart, LowRank
from .lora import ADAPTER, inject_planned, put_start
from .lora_plan import LayerPlan, read_parts
from .master_weights import copy_for_network

KINDS: tuple[LoraType, ...] = ("lora", "dora", "lokr")


def load_into(transformer: nn.Module, path: Path, strength: float = 1.0) -> None:
    """Apply a LoRA, DoRA or LoKr file in any layout that ComfyUI loads to a diffusers transformer.

    Raises:
        ModelFileError: the file is damaged, belongs to another model, or is of another kind.
    """
    parts = read_parts(transformer, path)
    dtype: torch.dtype = transformer.proj_out.weight.dtype  # type: ignore[assignment, union-attr]
    for kind in KINDS:
        plan = {name: _planned(part, strength) for name, part in parts.items() if part.kind == kind}
        if not plan:
            continue
        parameters = inject_planned(transformer, plan, kind)
        for name, layer in plan.items():
            with torch.no_grad():
                put_start(transformer, parameters, name, layer)
            if kind == "dora":
                adapted: Any = transformer.get_submodule(name)
                adapted.lora_magnitude_vector[ADAPTER].strength = strength
        for parameter in parameters.values():
            parameter.requires_grad_(False)  # noqa: FBT003
            parameter.data = copy_for_network(parameter.data, dtype)


def _planned(part: AdapterPart, strength: float) -> LayerPlan:
    """`strength` is a factor of the change; that of a DoRA, whose change is no product, stands in the layer."""
    rows, columns = part.shape
    rank = part.down.shape[0] if isinstance(part, LowRank) else 1
    start = part if part.kind == "dora" else replace(part, scale=part.scale * strength)
    return LayerPlan(columns, rows, rank, 1.0, start)
