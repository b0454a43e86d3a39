"""Float32 master weights of the adapter, and the copies that the network computes with.

The frozen network computes in bfloat16, as it does at inference, so its adapter layers hold bfloat16 copies. The
optimizer updates the float32 masters, and gradients accumulate in float32. In a float32 run, both are the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class MasterWeights:
    """By name: `masters` are trained, saved and exported; `copies` are the network's parameters."""

    masters: dict[str, nn.Parameter]
    copies: dict[str, nn.Parameter]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the network."""
        if self.copies is not self.masters:
            torch._foreach_copy_(list(self.copies.values()), [self.masters[name] for name in self.copies])


def master_weights(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> MasterWeights:
    """Create masters for a network's trainable float32 parameters, and convert these parameters to `dtype`."""
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
    """A copy of a weight for the network: a matrix in `dtype`, a vector in float32.

    Vectors are DoRA's row norms. The network computes small differences of them, for which bfloat16 is too coarse.
    """
    return weight.to(dtype) if weight.ndim > 1 else weight.clone()


def _add_up_in(master: nn.Parameter, copy: nn.Parameter) -> None:
    """Move every gradient of `copy` to `master`, in float32, as soon as it has been computed."""

    # The hook gets `copy` as its argument. Referring to it in a closure would be a cycle that is never freed.
    def move(computed: Tensor) -> None:
        gradient, computed.grad = computed.grad, None
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    copy.register_post_accumulate_grad_hook(move)
