"""The adapter: peft puts it in, and its weights start from the seed or from a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LoraType
from ..rng import stream, undisturbed
from .master_weights import copy_for_network
from .plan import AdapterPlan, LayerPlan, lokr_shapes, read_parts
from .reader import AdapterPart, Kronecker, LowRank

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


from dataclasses import replace
from pathlib import Path

ADAPTER = "default"
_LOKR = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def inject_lora(transformer: QwenImageTransformer2DModel, plan: AdapterPlan, seed: int) -> dict[str, nn.Parameter]:
    """Put an adapter into the frozen transformer; its float32 parameters by name, the only trainable ones.

    Names are those in the file: `<module>.lora_A` and `.lora_B`; for a DoRA also `.dora_scale`, here the rows' lengths;
    for a LoKr `.lokr_w1`, and `.lokr_w2` or its factors `.lokr_w2_a` and `.lokr_w2_b`. A fresh adapter changes nothing:
    B or w1 is zero, and the others are drawn uniformly (Kaiming, as peft) from (seed, name).
    """
    lora = plan.config
    parameters = inject_planned(
        transformer, plan.layers, lora.lora_type, dropout=lora.lora_dropout, factor=lora.lokr_factor
    )
    with torch.no_grad():
        _draw_initial_weights(parameters, seed)
        for name, layer in plan.layers.items():
            put_start(transformer, parameters, name, layer)
    return parameters


def inject_planned(
    transformer: nn.Module, plan: Mapping[str, LayerPlan], kind: LoraType, *, dropout: float = 0.0, factor: int = -1
) -> dict[str, nn.Parameter]:
    """Adapters of one kind in the planned layers: their parameters by name, all zero but a DoRA's lengths."""
    with undisturbed(next(transformer.parameters()).device):
        if kind == "lokr":
            _inject_lokr(transformer, plan, factor)
        else:
            _inject_lora(transformer, plan, use_dora=kind == "dora", dropout=dropout)
    for name, planned in plan.items():
        transformer.get_submodule(name).scaling[ADAPTER] = planned.scale  # type: ignore[union-attr, operator]
    parameters = {f"{module}.{name}": each for module in plan for name, each in _of_layer(transformer, module)}
    for name, weight in parameters.items():
        if not name.endswith(".dora_scale"):
            weight.data = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        weight.requires_grad_(True)  # noqa: FBT003
    return parameters


def _inject_lora(transformer: nn.Module, plan: Mapping[str, LayerPlan], *, use_dora: bool, dropout: float) -> None:
    import peft

    settings = peft.LoraConfig(
        r=1,
        rank_pattern=_ranks(plan),
        lora_dropout=dropout,
        target_modules=list(plan),
        init_lora_weights=False,
        use_dora=use_dora,
    )
    if use_dora:
        from .dora import DoraLinear

        settings._register_custom_module({nn.Linear: DoraLinear})  # peft's way for layers of one's own
    peft.inject_adapter_in_model(settings, transformer, ADAPTER)


def _inject_lokr(transformer: nn.Module, plan: Mapping[str, LayerPlan], factor: int) -> None:
    import peft

    from .lokr import LokrModel

    settings = peft.LoKrConfig(
        r=1,
        rank_pattern=_ranks(plan),
        decompose_factor=factor,
        target_modules=list(plan),
        init_weights=False,
    )
    LokrModel(transformer, settings, ADAPTER)
    for name, planned in plan.items():
        if planned.start is not None:
            _reshape_lokr(transformer.get_submodule(name), lokr_shapes(planned, factor))


def _ranks(plan: Mapping[str, LayerPlan]) -> dict[str, int]:
    """peft's rank_pattern: it tries each pattern on each layer, so layers of one rank share a pattern."""
    grouped: dict[int, list[str]] = {}
    for name, layer in plan.items():
        grouped.setdefault(layer.rank, []).append(re.escape(name))
    return {"|".join(names): rank for rank, names in grouped.items()}


def _reshape_lokr(layer: Any, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Parameters in the shapes of the file that the layer starts from, whatever factors peft chose."""
    device = layer.lokr_w1[ADAPTER].device
    for name in _LOKR:
        entries = getattr(layer, name)
        if ADAPTER in entries:
            del entries[ADAPTER]
        if name in shapes:
            entries[ADAPTER] = nn.Parameter(torch.zeros(shapes[name], device=device))


def _of_layer(transformer: nn.Module, module: str) -> list[tuple[str, nn.Parameter]]:
    layer: Any = transformer.get_submodule(module)
    if hasattr(layer, "lokr_w1"):
        return [(name, getattr(layer, name)[ADAPTER]) for name in _LOKR if ADAPTER in getattr(layer, name)]
    found = [(name, getattr(layer, name)[ADAPTER].weight) for name in ("lora_A", "lora_B")]
    if ADAPTER in layer.lora_magnitude_vector:
        found.append(("dora_scale", layer.lora_magnitude_vector[ADAPTER].weight))
    return found


def _draw_initial_weights(parameters: Mapping[str, Tensor], seed: int) -> None:
    for name, weight in parameters.items():
        if name.endswith((".lora_A", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b")):
            bound = 1 / math.sqrt(weight.shape[1])
            drawn = torch.rand(weight.shape, generator=stream(seed, "lora", name))
            weight.copy_((drawn * 2 - 1) * bound)


def put_start(transformer: nn.Module, parameters: Mapping[str, Tensor], name: str, layer: LayerPlan) -> None:
    """What the layer starts from, at the layer's own scale, into its parameters. Call it without gradients."""
    start = layer.start
    if isinstance(start, LowRank):
        parameters[f"{name}.lora_A"].copy_(start.down)
        parameters[f"{name}.lora_B"].copy_(start.up.float() * (start.scale / layer.scale))
        if f"{name}.dora_scale" in parameters:
            parameters[f"{name}.dora_scale"].copy_(_lengths(transformer.get_submodule(name), start))
    elif isinstance(start, Kronecker):
        parameters[f"{name}.lokr_w1"].copy_(start.first.float() * (start.scale / layer.scale))
        names = ["lokr_w2"] if len(start.second) == 1 else ["lokr_w2_a", "lokr_w2_b"]
        for each, matrix in zip(names, start.second, strict=True):
            parameters[f"{name}.{each}"].copy_(matrix)


def _lengths(layer: Any, start: LowRank) -> Tensor:
    """Of a DoRA's rows: what the file says, or those of the weight that a plain LoRA file makes."""
    from .dora import merged_length

    length = merged_length(layer, ADAPTER)
    if start.dora_scale is None:
        return length
    return length * start.dora_scale.to(length) / layer.lora_magnitude_vector[ADAPTER].base_square.sqrt()


def for_file(transformer: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors (its own, or an average of them) as files hold them.

    ComfyUI divides by the length of the base weight's rows where DoRA divides by that of the changed ones: `dora_scale`
    takes the quotient in. All other tensors are as they are.
    """
    tensors = dict(parameters)
    for name, length in parameters.items():
        if name.endswith(".dora_scale"):
            from .dora import merged_lengths

            module = name.removesuffix(".dora_scale")
            layer: Any = transformer.get_submodule(module)
            lora_a, lora_b = (parameters[f"{module}.{side}"].detach().float() for side in ("lora_A", "lora_B"))
            base = layer.lora_magnitude_vector[ADAPTER].base_square.sqrt()
            tensors[name] = length.detach() * base / merged_lengths(layer, ADAPTER, lora_a, lora_b)
    return tensors


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The base model's own output while the context lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


@contextmanager
def without_dropout(transformer: nn.Module) -> Iterator[None]:
    """As it is used after the training, while the context lasts."""
    was_training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(was_training)


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
