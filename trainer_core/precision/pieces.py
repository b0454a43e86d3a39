"""Converts a quantised layer to plain tensors plus a JSON note and back, bit-identically."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..device import aligned
from ..weights.stored import StoredWeight
from .frozen_linear import FrozenLinear


class Pieces(NamedTuple):
    """The tensors of a quantised weight. `note` (JSON) has the `kind` and what that kind needs to rebuild the layer."""

    tensors: dict[str, Tensor]
    note: dict[str, Any]


def pieces_of(layer: Any) -> Pieces | None:
    """The pieces of a quantised layer; None if the layer is not quantised."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, FrozenLinear):
        tensors: dict[str, Any] = {"codes": layer.weight.data, "scale": layer.scale}
        return Pieces(tensors, {"kind": "codes", "rotation": layer.rotation})
    if getattr(weight, "quant_state", None) is not None:
        return Pieces({"codes": weight.data, **weight.quant_state.as_dict(packed=True)}, {"kind": "nf4"})
    if not hasattr(layer, "weight_qtype"):
        return None
    tensors = {}
    return Pieces(tensors, {"kind": "quanto", "type": layer.weight_qtype.name, "tree": _flat(weight, "codes", tensors)})


def layer_of(pieces: Pieces, bias: nn.Parameter | None) -> nn.Module:
    """The layer again, on the device of its tensors; they are used as they are, not copied."""
    kind = pieces.note["kind"]
    if kind == "codes":
        stored = StoredWeight(pieces.tensors["codes"], pieces.tensors["scale"], pieces.note["rotation"])
        return FrozenLinear(stored, None if bias is None else bias.data)
    return _nf4(pieces, bias) if kind == "nf4" else _quanto(pieces, bias)


def _nf4(pieces: Pieces, bias: nn.Parameter | None) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    companions = dict(pieces.tensors)
    codes = companions.pop("codes")
    weight = Params4bit.from_prequantized(codes, companions, device=codes.device)
    state: Any = weight.quant_state
    rows, columns = state.shape
    layer = Linear4bit(columns, rows, bias=bias is not None, compute_dtype=state.dtype, quant_type="nf4", device="meta")
    weight.module, layer.weight, layer.quant_state, layer.bias = layer, weight, state, bias
    layer.support_avx512bf16_for_cpu = False  # see quantise.py
    return layer


def _quanto(pieces: Pieces, bias: nn.Parameter | None) -> nn.Module:
    from optimum.quanto import qtypes
    from optimum.quanto.nn import QLinear

    weight = _whole(pieces.note["tree"], "codes", pieces.tensors)
    rows, columns = weight.shape
    layer = QLinear(
        columns, rows, bias is not None, dtype=weight.dtype, device="meta", weights=qtypes[pieces.note["type"]]
    )
    layer.input_scale, layer.output_scale = (torch.ones((), dtype=weight.dtype, device=weight.device) for _ in range(2))
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), bias
    return layer.requires_grad_(False)  # noqa: FBT003


def _flat(tensor: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe the nested tensor classes of a quanto weight as a note, and add their plain tensors to `tensors`."""
    if type(tensor) in (Tensor, nn.Parameter):
        tensors[name] = tensor.detach()
        return {}
    inner, settings = tensor.__tensor_flatten__()
    parts = {each: _flat(getattr(tensor, each), f"{name}.{each}", tensors) for each in inner}
    return {"class": type(tensor).__name__, "settings": settings, "parts": parts}


def _whole(note: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Any:
    if not note:
        return tensors[name]
    parts = {each: _whole(part, f"{name}.{each}", tensors) for each, part in note["parts"].items()}
    return _quanto_classes()[note["class"]].__tensor_unflatten__(parts, note["settings"], None, None)


def _quanto_classes() -> dict[str, Any]:
    from optimum.quanto.tensor.packed import PackedTensor
    from optimum.quanto.tensor.weights import WeightQBitsTensor
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor, TinyGemmWeightQBitsTensor

    known = (PackedTensor, WeightQBitsTensor, TinyGemmPackedTensor, TinyGemmWeightQBitsTensor)
    return {each.__name__: each for each in known}


def in_one_buffer(network: nn.Module, names: Iterable[str]) -> None:
    """Move the named modules' tensors in host memory into one allocation.

    The C library returns one large allocation to the system when it is freed, but keeps the gaps that many small ones
    leave. With one allocation per weight, loading would end with about twice the memory that the weights need.
    """
    layers = {name: network.get_submodule(name) for name in names}
    plain: dict[str, Tensor] = {}
    quantised: dict[str, Pieces] = {}
    for name, layer in layers.items():
        pieces = pieces_of(layer)
        if pieces is not None:
            quantised[name] = pieces
        for each, parameter in layer.named_parameters(recurse=False):
            if pieces is None or each != "weight":
                plain[f"{name}/{each}"] = parameter.data
    tensors = plain | {f"{name}/{key}": each for name, (held, _) in quantised.items() for key, each in held.items()}
    moved = _copied([(name, each) for name, each in tensors.items() if each.device.type == "cpu"])
    for name in plain.keys() & moved.keys():
        layer, _, parameter = name.rpartition("/")
        getattr(layers[layer], parameter).data = moved[name]
    for name, (held, note) in quantised.items():
        if not any(f"{name}/{key}" in moved for key in held):
            continue
        parts = {key: moved.get(f"{name}/{key}", each) for key, each in held.items()}
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer_of(Pieces(parts, note), layers[name].bias))  # type: ignore[arg-type]


def _copied(tensors: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    places, end = [], 0
    for _, each in tensors:
        places.append(end)
        end += aligned(each.nbytes)
    buffer = torch.empty(end, dtype=torch.uint8)
    moved = {}
    for place, (name, each) in zip(places, tensors, strict=True):
        moved[name] = buffer[place : place + each.nbytes].view(each.dtype).view(each.shape).copy_(each)
    return moved
