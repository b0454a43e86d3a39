"""Injects adapters into the transformer with peft, and sets their initial weights from the seed or a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LoraType
from ..memory.streaming import weights_on_device
from ..packages import explained_imports
from ..rng import stream, undisturbed
from .master_weights import copy_for_network
from .plan import AdapterPlan, LayerPlan, lokr_shapes, read_parts
from .reader import AdapterPart, Kronecker, LowRank

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


ADAPTER = "default"  # peft's name for the adapter
LORA_TYPES: tuple[LoraType, ...] = ("lora", "dora", "lokr")
_LOKR = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def inject_lora(transformer: QwenImageTransformer2DModel, plan: AdapterPlan, seed: int) -> dict[str, nn.Parameter]:
    """Inject an adapter into the frozen transformer. Returns its float32 parameters by name, the only trainable ones.

    Names are `<module>.lora_A` and `.lora_B`; for a DoRA also `.dora_scale`, which holds the row norms m while training
    (`for_file` converts them); for a LoKr `.lokr_w1`, and `.lokr_w2` or its factors `.lokr_w2_a` and `.lokr_w2_b`.
    A new adapter changes nothing: B or w1 is zero. The others are drawn from (seed, name), Kaiming-uniform like peft's.
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
    """Inject adapters of one type into the planned layers. Returns their parameters, all zero except a DoRA's norms."""
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
    with explained_imports("peft"):
        import peft

        from .dora import DoraLinear
        from .lora import LoraLinear

    settings = peft.LoraConfig(
        r=1,
        rank_pattern=_ranks(plan),
        lora_dropout=dropout,
        target_modules=list(plan),
        init_lora_weights=False,
        use_dora=use_dora,
    )
    settings._register_custom_module({nn.Linear: DoraLinear if use_dora else LoraLinear})  # peft's way
    peft.inject_adapter_in_model(settings, transformer, ADAPTER)


def _inject_lokr(transformer: nn.Module, plan: Mapping[str, LayerPlan], factor: int) -> None:
    with explained_imports("peft"):
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
    """peft's rank_pattern, with one pattern per rank: peft tries every pattern on every layer, which would be slow."""
    grouped: dict[int, list[str]] = {}
    for name, layer in plan.items():
        grouped.setdefault(layer.rank, []).append(re.escape(name))
    return {"|".join(names): rank for rank, names in grouped.items()}


def _reshape_lokr(layer: Any, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Replace the parameters by ones with the shapes in the start file, because peft may have factored differently."""
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
    """Copy a layer's start weights into its parameters, converted to the layer's scale. Call it under no_grad."""
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
    """A DoRA's initial row norms m [o]: from the file; those of the merged weight if the file is a plain LoRA."""
    from .dora import merged_length

    base = layer.lora_magnitude_vector[ADAPTER].base_square
    if start.magnitude is not None:
        return start.magnitude.to(base)
    with weights_on_device(layer.get_base_layer()):
        length = merged_length(layer, ADAPTER)
    if start.dora_scale is None:
        return length
    return length * start.dora_scale.to(length) / base.sqrt()


def for_file(transformer: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an adapter's tensors (its own, or their EMA) to the ones that files hold.

    ComfyUI divides by the norm of the base weight's rows where DoRA divides by that of the merged weight's rows, so
    `dora_scale` is multiplied by their ratio. All other tensors stay unchanged.
    """
    tensors = dict(parameters)
    for name, length in parameters.items():
        if name.endswith(".dora_scale"):
            from .dora import merged_lengths

            module = name.removesuffix(".dora_scale")
            layer: Any = transformer.get_submodule(module)
            lora_a, lora_b = (parameters[f"{module}.{side}"].detach().float() for side in ("lora_A", "lora_B"))
            base = layer.lora_magnitude_vector[ADAPTER].base_square.sqrt()
            with weights_on_device(layer.get_base_layer()):
                tensors[name] = length.detach() * base / merged_lengths(layer, ADAPTER, lora_a, lora_b)
    return tensors


def is_dora(module: nn.Module) -> bool:
    """Whether a module is a layer with a DoRA."""
    return ADAPTER in getattr(module, "lora_magnitude_vector", ())


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """Disables the adapter while the context lasts, so that the transformer computes the base model's output.

    Sets peft's flag itself: `enable_adapters` also changes requires_grad of every parameter, which takes long and would
    disturb a step that goes on with them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def without_dropout(transformer: nn.Module) -> Iterator[None]:
    """Switches to eval mode while the context lasts and restores the mode afterwards."""
    was_training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(was_training)


def load_into(transformer: nn.Module, path: Path, strength: float = 1.0) -> None:
    """Apply a LoRA, DoRA or LoKr file in any layout that ComfyUI loads to a diffusers transformer.

    Raises:
        ModelFileError: the file is damaged, belongs to another model, or has an unsupported type.
    """
    load_parts(transformer, read_parts(transformer, path), strength)


def load_parts(transformer: nn.Module, parts: Mapping[str, AdapterPart], strength: float = 1.0) -> None:
    """Apply weight changes that `read_parts` returned for a transformer of the same model."""
    dtype: torch.dtype = transformer.proj_out.weight.dtype  # type: ignore[assignment, union-attr]
    for kind in LORA_TYPES:
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
    """The layer plan that applies a file's weight change times `strength`.

    For a DoRA, scaling the factors would not scale the change, so the layer itself applies the strength.
    """
    rows, columns = part.shape
    rank = part.down.shape[0] if isinstance(part, LowRank) else 1
    start = part if part.kind == "dora" else replace(part, scale=part.scale * strength)
    return LayerPlan(columns, rows, rank, 1.0, start)
