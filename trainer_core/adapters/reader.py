"""Reads LoRA files in all layouts that ComfyUI loads, and sorts their tensors by layer. Knows layouts, not networks.

Shapes: a layer's weight is [o, i], r is the rank. A Kronecker product of [a, c] and [b, d] has a·b = o and c·d = i.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config import LoraType
from ..errors import ModelFileError
from ..files import read_metadata, read_tensors
from ..text import brief, reason_of, shown
from ..weights.whole import check_whole
from .naming import LOKR_PARTS, sort_by_layer
from .scaling import CONFIG_FILE, KOHYAS_KEY, Scaling, find_scaling

LORA_TYPE = "qwen_edit_trainer.lora_type"  # a key in the header of files that this program wrote
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST = 2**27  # elements of a matrix; the largest of Qwen-Image's have 57 million
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A weight change: scale · up [o, r] @ down [r, i].

    With `dora_scale` [o], each row of the changed weight is multiplied by dora_scale / (norm of the base weight's row),
    as ComfyUI does. With `magnitude` [o], each of its rows gets that norm, as in peft's files.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    dora_scale: Tensor | None = None
    magnitude: Tensor | None = None

    def to(self, device: torch.device) -> LowRank:
        """The same change on another device."""
        rows = [None if each is None else each.to(device) for each in (self.dora_scale, self.magnitude)]
        return LowRank(self.down.to(device), self.up.to(device), self.scale, *rows)

    @property
    def kind(self) -> LoraType:
        """The adapter's type, as a value of `lora_type`."""
        return "lora" if self.dora_scale is None and self.magnitude is None else "dora"

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

    def to(self, device: torch.device) -> Kronecker:
        """The same change on another device."""
        return Kronecker(self.first.to(device), tuple(matrix.to(device) for matrix in self.second), self.scale)

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
    if isinstance(part, LowRank) and part.magnitude is not None:
        return changed * (part.magnitude.float() / changed.norm(dim=1)).unsqueeze(1)
    if isinstance(part, Kronecker) or part.dora_scale is None:
        return changed
    return changed * (part.dora_scale.float() / weight.float().norm(dim=1)).unsqueeze(1)


def read_adapter(path: Path, layers: Collection[str]) -> dict[str, AdapterPart]:
    """The weight changes of a LoRA file by layer. `layers` are full names of the network's layers.

    Logs which scale is used and why, unless each layer has an alpha tensor or this program wrote the file.

    Raises:
        ModelFileError: the file is damaged, belongs to another model, or has an unsupported type (LoHa, OFT, ...).
    """
    if path.suffix != ".safetensors" or not path.is_file():
        reason = "is missing" if path.suffix == ".safetensors" else "is not a .safetensors file; others can run code"
        raise ModelFileError(f"The LoRA {shown(path.name)} {reason}. Choose another file.")
    check_whole(path)
    try:
        header, tensors = read_metadata(path), read_tensors(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"The LoRA {path.name} is damaged ({reason_of(error)}). Download it again.") from error
    is_peft = any(name.startswith("base_model.model.") for name in tensors)
    scaling = find_scaling(path, header, is_peft=is_peft) or Scaling("")
    parts = adapter_parts(tensors, layers, path.name, scaling)
    _check_finite(tensors, path.name)
    if LORA_TYPE not in header and (note := _note(parts, scaling, tensors, header)):
        _LOG.info("%s %s", shown(path.name), note)
    return parts


def _note(parts: Mapping[str, AdapterPart], scaling: Scaling, names: Iterable[str], header: Mapping[str, str]) -> str:
    """Which scale is used and why, as the end of a sentence; empty if each layer has an alpha tensor."""
    without = len(parts) - sum(name.endswith(".alpha") for name in names)
    if not without:
        return ""
    if scaling.alpha is None and not scaling.alpha_pattern:
        layers = "" if without == len(parts) else f" for {without} of its {len(parts)} layers"
        note = (
            f"states no alpha{layers}: no tensor has it, and neither the header nor an {CONFIG_FILE} beside the file "
            f"has peft's lora_alpha. Scale 1 is used{' there' if layers else ''}, as in ComfyUI and diffusers."
        )
        if KOHYAS_KEY not in header:
            return note
        return (
            f"{note} The {KOHYAS_KEY} {brief(header[KOHYAS_KEY])} in its header is ignored: files whose weights "
            "already contain the scale keep it too. If these don't, put the file into a folder of its own, with an "
            f"{CONFIG_FILE} that states r and lora_alpha."
        )
    scales = sorted({part.scale for part in parts.values()})
    both = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    formula = "alpha / √rank, because of use_rslora," if scaling.use_rslora else "alpha / rank,"
    return f"is used with scale {both}: {formula} as stated in {scaling.place}."


def adapter_parts(
    tensors: Mapping[str, Tensor], layers: Collection[str], name: str, scaling: Scaling | None = None
) -> dict[str, AdapterPart]:
    """`read_adapter` for tensors that are already loaded, keyed as in the file. `name` is the file's name for messages.

    Raises:
        ModelFileError: as `read_adapter`.
    """
    found = sort_by_layer(tensors, layers, name)
    if not found:
        raise ModelFileError(f"{name} contains no LoRA weights. Choose another file.")
    _check_types(tensors, name)
    scaling = scaling or Scaling("")
    parts = {
        layer: _part({part: tensors[key] for part, key in keys.items()}, layer, name, scaling)
        for layer, keys in sorted(found.items())
    }
    if scaling.use_dora and not any(part.kind == "dora" for part in parts.values()):
        raise ModelFileError(
            f"{name} lacks its DoRA weights: use_dora is on in {scaling.place}, but the file has neither "
            "lora_magnitude_vector nor dora_scale. Choose a complete file."
        )
    return parts


def _part(parts: Mapping[str, Tensor], layer: str, name: str, scaling: Scaling) -> AdapterPart:
    first, second = _factors(parts, LOKR_PARTS[0]), _factors(parts, "lokr_w2")
    if {"down", "up"} <= parts.keys() and not any(each in parts for each in LOKR_PARTS):
        down, up = parts["down"], parts["up"]
        if _multiply(up, down):
            scale = _scale(parts, layer, name, scaling, down.shape[0])
            rows = [_rows(parts, key, up.shape[0], layer, name) for key in ("dora_scale", "magnitude")]
            return LowRank(down, up, scale, *rows)
    elif parts.keys() <= {"alpha", *LOKR_PARTS} and first and second and _multiply(*first) and _multiply(*second):
        ranks = [each[1].shape[0] for each in (first, second) if len(each) > 1]
        scale = _scale(parts, layer, name, scaling, ranks[-1] if ranks else None)
        return Kronecker(first[0] if len(first) == 1 else first[0].float() @ first[1].float(), second, scale)
    raise ModelFileError(
        f"{name} is incomplete or has an unsupported type: for {layer} it has only {', '.join(sorted(parts))}. "
        "Choose a LoRA, DoRA or LoKr file."
    )


def _check_types(tensors: Mapping[str, Tensor], file: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS and not name.endswith(".alpha"):
            stored = str(tensor.dtype).removeprefix("torch.")
            raise ModelFileError(f"{file} stores {shown(name)} as {stored}. Choose a bf16, fp16 or fp32 file.")


def _check_finite(tensors: Mapping[str, Tensor], file: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise ModelFileError(f"{file} has infinite or undefined values in {shown(name)}. Download it again.")


def _multiply(*matrices: Tensor) -> bool:
    """Whether these are one or two matrices with elements whose product can be built."""
    shapes = [each.shape for each in matrices]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] * shapes[-1][1] > _LARGEST:
        return False
    return len(shapes) == 1 or shapes[0][1] == shapes[1][0]


def _scale(parts: Mapping[str, Tensor], layer: str, name: str, scaling: Scaling, rank: int | None) -> float:
    """The scale by the layer's alpha tensor, or else as stated beside the tensors. `rank` None: a LoKr without one."""
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ModelFileError(f"{name} has an alpha for {layer} that is not one number. Download it again.")
        return float(parts["alpha"]) / rank if rank else 1.0
    stated = scaling.rank_of(layer)
    if rank and stated is not None and stated != rank:
        raise ModelFileError(
            f"{name} has rank {rank} for {layer}, but {scaling.place} states {stated:g}: it describes another file, so "
            "the scale is not known. Correct it, or remove it if the scale is 1."
        )
    return scaling.scale_of(layer, rank)


def _factors(parts: Mapping[str, Tensor], key: str) -> tuple[Tensor, ...]:
    """The part `key` as one matrix or as its two factors; empty if the file has neither."""
    if key in parts:
        return (parts[key],)
    return (parts[f"{key}_a"], parts[f"{key}_b"]) if {f"{key}_a", f"{key}_b"} <= parts.keys() else ()


def _rows(parts: Mapping[str, Tensor], key: str, rows: int, layer: str, name: str) -> Tensor | None:
    """A DoRA's numbers per row, `dora_scale` [o, 1] or `magnitude` [o]; None if the file has none."""
    found = parts.get(key)
    if found is None or found.shape == (rows, 1) or (key == "magnitude" and found.shape == (rows,)):
        return None if found is None else found.flatten()
    raise ModelFileError(
        f"{name} scales the columns of {layer} ({key} of shape {list(found.shape)}), but only a DoRA that scales its "
        f"{rows} rows is supported. Choose another file."
    )
