"""LoRAs that are part of the frozen base model: their weight changes are added while the model is loaded.

So they cost a step no time and no memory. The base model of a run is then the model with these LoRAs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import FrozenLoraConfig
from ..events import SILENT, Observer
from ..qwen_image.base_model import BaseModel
from ..qwen_image.transformer import load_transformer
from ..weights.stored import Read, StoredWeight, WeightSource
from .plan import read_parts
from .reader import AdapterPart, changed_weight

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

Changes = Mapping[str, Sequence[tuple[AdapterPart, float]]]  # weight changes and their strengths by layer


def read_frozen_loras(base: BaseModel) -> Changes:
    """The weight changes of the model's frozen LoRAs, in their order.

    Raises:
        ModelFileError: a file is damaged, belongs to another model, or has an unsupported type.
    """
    found: dict[str, list[tuple[AdapterPart, float]]] = {}
    for lora in base.config.frozen_loras:
        for layer, part in read_parts(base.network, Path(lora.file)).items():
            found.setdefault(layer, []).append((part, lora.strength))
    return found


def load_with_frozen_loras(
    base: BaseModel, device: torch.device, observer: Observer = SILENT, *, on_host: Collection[int] = ()
) -> QwenImageTransformer2DModel:
    """`load_transformer` with the model's frozen LoRAs in its weights.

    Raises:
        ModelFileError: as `load_transformer` and `read_frozen_loras`.
        MissingPackageError, Interrupted: as `load_transformer`.
    """
    changes = read_frozen_loras(base)
    source = base.transformer_weights
    if changes:
        computes_on = torch.device("cpu") if base.config.quantize_via == "cpu" else device
        source = _ChangedWeights(source, changes, computes_on, base.config.base_model_precision == "file")
    return load_transformer(base, device, observer, on_host=on_host, source=source)


def in_words(loras: Sequence[FrozenLoraConfig]) -> str:
    """The files and strengths, such as: style.safetensors at 0.8."""
    return ", ".join(f"{Path(lora.file).name} at {lora.strength:g}" for lora in loras)


@dataclass(frozen=True, slots=True)
class _ChangedWeights:
    """A WeightSource whose linear layers have the weight changes. `keeps_codes`: 8-bit weights are rounded again."""

    source: WeightSource
    changes: Changes
    computes_on: torch.device
    keeps_codes: bool

    @property
    def place(self) -> Path:
        return self.source.place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.source.shapes

    @property
    def markers(self) -> frozenset[str]:
        return self.source.markers

    @property
    def packing(self) -> str:
        return self.source.packing

    @property
    def is_rotated(self) -> bool:
        return self.source.is_rotated

    @contextmanager
    def opened(self) -> Iterator[Read]:
        with self.source.opened() as read:
            yield lambda name: self._changed(name, read(name))

    def _changed(self, name: str, stored: StoredWeight) -> StoredWeight:
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.changes:
            return stored
        weight = stored.to(self.computes_on).dequantise(torch.float32)
        for part, strength in self.changes[layer]:
            here = part.to(self.computes_on)
            weight += strength * (changed_weight(here, weight) - weight)
        return (
            _rounded(weight, stored.codes.dtype) if self.keeps_codes and stored.is_quantised else StoredWeight(weight)
        )


def _rounded(weight: Tensor, dtype: torch.dtype) -> StoredWeight:
    """A weight [out, in] as int8 or fp8 codes, with one scale per row."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scale = (weight.abs().amax(dim=1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    codes = weight / scale
    return StoredWeight((codes if dtype.is_floating_point else codes.round()).to(dtype), scale)
