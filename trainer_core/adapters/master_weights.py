"""Adapter weights in float32 beside the copies that the network computes with.

The frozen network computes in bfloat16 as it does at inference. Its adapter layers hold bfloat16 copies; the optimizer
moves the float32 masters, and every gradient is added up in float32. Under float32 arithmetic both are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class MasterWeights:
    """`masters` by name are what is trained, saved and exported; `copies` by the same names are in the network."""

    masters: dict[str, nn.Parameter]
    copies: dict[str, nn.Parameter]

    @torch.no_grad()
    def publish(self) -> None:
        """Bring what changed in the masters into the network."""
        for name, copy in self.copies.items():
            if copy is not self.masters[name]:
                copy.copy_(self.masters[name])


def master_weights(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> MasterWeights:
    """Float32 masters of a network's trainable float32 parameters, which become copies of `dtype`."""
    copies = dict(parameters)
    if dtype == torch.float32:
        return MasterWeights(copies, copies)
    masters = {}
    for name, copy in copies.items():
        masters[name] = nn.Parameter(copy.data)
        copy.data = copy_for_network(copy.data, dtype)
        _add_up_in(masters[name], copy)
    return MasterWeights(masters, copies)


def copy_for_network(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in the network's dtype. Vectors, such as DoRA's lengths, stay in float32: the network takes differences
    of them that bfloat16 could not hold."""
    return weight.to(dtype) if weight.ndim > 1 else weight.clone()


def _add_up_in(master: nn.Parameter, copy: nn.Parameter) -> None:
    """Every gradient of `copy` goes to `master`, in float32, as soon as it is there."""

    def move(computed: Tensor) -> None:  # of `copy`, which the hook must not hold: it would keep itself alive
        gradient, computed.grad = computed.grad, None
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    copy.register_post_accumulate_grad_hook(move)
