"""The weights that a frozen linear layer multiplies with in its forward and in its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer_core.config import BaseModelPrecision
from trainer_core.precision.frozen_linear import FrozenLinear
from trainer_core.precision.quantise import converter
from trainer_core.rng import stream


def quantised_layer(
    precision: BaseModelPrecision, columns: int, rows: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> FrozenLinear:
    """A layer with random weights [rows, columns], made on the CPU and quantised on the device."""
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = (torch.randn(rows, columns, generator=stream(0, "both passes")) / columns**0.5).to(dtype)
    convert = converter(precision)
    assert convert is not None
    return convert(layer.requires_grad_(False), torch.device(device))


def weights_of_both_passes(layer: FrozenLinear, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """The weights [out, in] of the forward pass and of the backward pass, read with identity matrices."""
    device = layer.weight.device
    x = torch.eye(layer.in_features, dtype=dtype, device=device).requires_grad_()
    forward = layer(x).detach().T
    x = torch.zeros(layer.out_features, layer.in_features, dtype=dtype, device=device).requires_grad_()
    layer(x).backward(torch.eye(layer.out_features, dtype=dtype, device=device))
    assert x.grad is not None
    return forward, x.grad
