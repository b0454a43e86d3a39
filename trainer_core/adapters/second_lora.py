"""A second, frozen LoRA that a network has only while a context lasts, such as a few-step LoRA for previews."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelFileError
from ..text import shown
from .plan import read_parts
from .reader import AdapterPart, Kronecker, LowRank


def read_second_lora(transformer: nn.Module, path: Path) -> dict[str, AdapterPart]:
    """A file's weight changes by layer, for a transformer that may be on the meta device.

    Raises:
        ModelFileError: the file is damaged, belongs to another model, or is no LoRA or LoKr.
    """
    parts = read_parts(transformer, path)
    if any(part.kind == "dora" for part in parts.values()):
        raise ModelFileError(
            f"{shown(path.name)} is a DoRA, which can't be switched on and off. Choose a LoRA or LoKr file."
        )
    return parts


def second_lora_bytes(parts: Mapping[str, AdapterPart], element_bytes: int) -> int:
    """Bytes of the file's matrices in a dtype of so many bytes."""
    return element_bytes * sum(matrix.numel() for part in parts.values() for matrix in _matrices(part))


@contextmanager
def with_second_lora(
    transformer: nn.Module, parts: Mapping[str, AdapterPart], strength: float, device: torch.device
) -> Iterator[None]:
    """Adds the weight changes to the layers while the context lasts. Its matrices are on `device` until then.

    The network must run uncompiled: the layers are other modules meanwhile.
    """
    dtype: torch.dtype = transformer.proj_out.weight.dtype  # type: ignore[assignment, union-attr]
    changed: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, part in parts.items():
            # Around the trained adapter, not inside: a DoRA reads the weight of the layer that it holds.
            parent, _, own = name.rpartition(".")
            owner = transformer.get_submodule(parent)
            layer: nn.Module = getattr(owner, own)
            setattr(owner, own, _Changed(layer, part, strength, device, dtype))
            changed.append((owner, own, layer))
        yield
    finally:
        for owner, own, layer in changed:
            setattr(owner, own, layer)


class _Changed(nn.Module):
    """A linear layer, with or without a trained adapter, plus a weight change: x [..., in] to y [..., out]."""

    def __init__(
        self, layer: nn.Module, part: AdapterPart, strength: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer = layer
        self._scale = part.scale * strength
        self._is_kronecker = isinstance(part, Kronecker)
        self._matrices = [matrix.to(device, dtype) for matrix in _matrices(part)]

    @property
    def weight(self) -> Tensor:
        """That of the layer, which other code asks for its dtype."""
        weight: Any = self.layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self._matrices
        if not self._is_kronecker:
            return self.layer(x) + self._scale * functional.linear(functional.linear(x, others[0]), first)
        inner = x.unflatten(-1, (first.shape[1], -1))
        for matrix in reversed(others):
            inner = functional.linear(inner, matrix)
        return self.layer(x) + self._scale * (first @ inner).flatten(-2)


def _matrices(part: AdapterPart) -> tuple[Tensor, ...]:
    return (part.up, part.down) if isinstance(part, LowRank) else (part.first, *part.second)
