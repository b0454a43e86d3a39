"""A running average of weights."""

from __future__ import annotations

import torch
from torch import nn


class RunningAverage:
    """Exponential average of a network's parameters, quick to follow at first."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = [parameter.detach().clone() for parameter in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network's weights."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in network.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Give the network the averaged weights."""
        for parameter, weight in zip(network.parameters(), self.weights, strict=True):
            parameter.copy_(weight)
