"""Reads LoRA files in all layouts that ComfyUI loads, and sorts their tensors by layer. Knows layouts, not networks.

Shapes: a layer's weight is [o, i], r is the rank. A Kronecker product of [a, c] and [b, d] has a·b = o and c·d = i.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import LoraType
from ..errors import ModelFileError
from ..files import is_whole, read_tensors

LAYER_PREFIXES = ("transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
FLAT_LAYER_PREFIXES = (
    "lora_unet_",
    "lycoris_",
    "lora_transformer_",
)  # followed by the layer's name with _ for each dot
_PAIRS = (".lora_{}.weight", ".lora_{}.default.weight", ".lora_{}", ".lora.{}.weight", "_lora.{}.weight")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_PARTS = {
    **{pair.format(name): "down" for pair in _PAIRS for name in ("A", "down")},
    **{pair.format(name): "up" for pair in _PAIRS for name in ("B", "up")},
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    **{f".{name}": name for name in ("alpha", "dora_scale", *_LOKR)},
}
_ENDINGS = tuple(sorted(_PARTS, key=len, reverse=True))
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LowRank:
    """A weight change: scale · up [o, r] @ down [r, i].

    With `dora_scale` [o], each row of the changed weight is multiplied by dora_scale / (norm of the base weight's row),
    as ComfyUI does.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    dora_scale: Tensor | None = None

    @property
    def kind(self) -> LoraType:
        """The adapter's type, as a value of `lora_type`."""
        return "lora" if self.dora_scale is None else "dora"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of the layer's weight."""
        return self.up.shape[0], self.down.shape[1]

    def change(self) -> Tensor:
        """The low-rank product [o, i] in float32."""
        return self.scale * (self.up.float() @ self.down.float())

    def factors(self) -> tuple[Tensor, Tensor]:
        """[o, r] and [r, i] in float64, whose product is the change."""
        return self.scale * self.up.double(), self.down.double()


@dataclass(frozen=True, slots=True)
class Kronecker:
    """A weight change: scale · first [a, c] ⊗ second. `second` is one matrix [b, d], or its factors [b, r], [r, d]."""

    first: Tensor
    second: tuple[Tensor, ...]
    scale: float = 1.0

    @property
    def kind(self) -> LoraType:
        """The adapter's type, as a value of `lora_type`."""
        return "lokr"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of the layer's weight."""
        return self.first.shape[0] * self.second[0].shape[0], self.first.shape[1] * self.second[-1].shape[1]

    def change(self) -> Tensor:
        """The product [o, i] in float32."""
        second = [matrix.float() for matrix in self.second]
        return self.scale * torch.kron(self.first.float(), second[0] if len(second) == 1 else second[0] @ second[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """[a, c] and [b, d] in float64, whose Kronecker product is the change."""
        second = [matrix.double() for matrix in self.second]
        return self.scale * self.first.double(), second[0] if len(second) == 1 else second[0] @ second[1]


AdapterPart = LowRank | Kronecker


def changed_weight(part: AdapterPart, weight: Tensor) -> Tensor:
    """A layer's weight [o, i] with the change applied at strength 1, in float32, as ComfyUI and our sampler do it."""
    changed = weight.float() + part.change()
    if isinstance(part, Kronecker) or part.dora_scale is None:
        return changed
    return changed * (part.dora_scale.float() / weight.float().norm(dim=1)).unsqueeze(1)


def read_adapter(path: Path, layers: Collection[str]) -> dict[str, AdapterPart]:
    """The weight changes of a LoRA file by layer. `layers` are full names of the network's layers.

    Raises:
        ModelFileError: the file is damaged, belongs to another model, or has an unsupported type (LoHa, OFT, ...).
    """
    if not is_whole(path):
        raise ModelFileError(f"The LoRA {path.name} is missing or not a complete .safetensors file. Download it again.")
    return adapter_parts(read_tensors(path), layers, path.name)


def adapter_parts(tensors: Mapping[str, Tensor], layers: Collection[str], name: str) -> dict[str, AdapterPart]:
    """`read_adapter` for tensors that are already loaded, keyed as in the file. `name` is the file's name for messages.

    Raises:
        ModelFileError: as `read_adapter`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown, foreign = [], []
    flat = {layer.replace(".", "_"): layer for layer in layers}
    for key, tensor in tensors.items():
        ending = next((each for each in _ENDINGS if key.endswith(each)), "")
        layer = _layer_of(key.removesuffix(ending), layers, flat)
        if not ending:
            foreign.append(key)
        elif layer is None:
            unknown.append(key)
        else:
            found.setdefault(layer, {})[_PARTS[ending]] = tensor
    if foreign:
        raise ModelFileError(
            f"{len(foreign)} of the {len(tensors)} tensors in {name} are neither LoRA, DoRA nor LoKr, such as "
            f"{', '.join(foreign[:_SHOWN])}. Choose another file; ComfyUI's own LoRA loader may support this one."
        )
    if unknown:
        raise ModelFileError(
            f"{len(unknown)} of the {len(tensors)} tensors in {name} belong to layers that this model doesn't have, "
            f"such as {', '.join(unknown[:_SHOWN])}. The file was made for another model. Choose another file."
        )
    if not found:
        raise ModelFileError(f"{name} contains no LoRA weights. Choose another file.")
    return {layer: _part(parts, layer, name) for layer, parts in sorted(found.items())}


def _layer_of(key: str, layers: Collection[str], flat: Mapping[str, str]) -> str | None:
    for prefix in ("", *LAYER_PREFIXES):
        if key.startswith(prefix) and key.removeprefix(prefix) in layers:
            return key.removeprefix(prefix)
    plain = next((key.removeprefix(prefix) for prefix in FLAT_LAYER_PREFIXES if key.startswith(prefix)), "")
    return flat.get(plain)


def _part(parts: Mapping[str, Tensor], layer: str, name: str) -> AdapterPart:
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    if {"down", "up"} <= parts.keys() and not any(each in parts for each in _LOKR):
        down, up = parts["down"], parts["up"]
        if down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]:
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            return LowRank(down, up, scale, _rows(parts.get("dora_scale"), up.shape[0], layer, name))
    elif "down" not in parts and "up" not in parts and "dora_scale" not in parts:
        first, second = _factors(parts, "lokr_w1"), _factors(parts, "lokr_w2")
        if first and second:
            ranks = [each[1].shape[0] for each in (first, second) if len(each) > 1]
            scale = alpha / ranks[-1] if alpha is not None and ranks else 1.0
            return Kronecker(first[0] if len(first) == 1 else first[0].float() @ first[1].float(), second, scale)
    raise ModelFileError(
        f"{name} is incomplete or has an unsupported type: for {layer} it has only {', '.join(sorted(parts))}. "
        "Choose a LoRA, DoRA or LoKr file."
    )


def _factors(parts: Mapping[str, Tensor], key: str) -> tuple[Tensor, ...]:
    """The part `key` as one matrix or as its two factors; empty if the file has neither."""
    if key in parts:
        return (parts[key],)
    return (parts[f"{key}_a"], parts[f"{key}_b"]) if {f"{key}_a", f"{key}_b"} <= parts.keys() else ()


def _rows(dora_scale: Tensor | None, rows: int, layer: str, name: str) -> Tensor | None:
    if dora_scale is None or dora_scale.shape == (rows, 1):
        return None if dora_scale is None else dora_scale.flatten()
    raise ModelFileError(
        f"{name} scales the columns of {layer} (dora_scale of shape {list(dora_scale.shape)}), but only a DoRA that "
        f"scales its {rows} rows is supported. Choose another file."
    )
