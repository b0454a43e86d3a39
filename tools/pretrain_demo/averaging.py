"""A running average of a network's weights."""

from __future__ import annotations

import torch
from torch import nn


class RunningAverage:
    """An exponential moving average of a network's parameters. Its decay grows over the first updates to `decay`."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = [parameter.detach().clone() for parameter in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network's current weights."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        current = [parameter.detach() for parameter in network.parameters()]
        torch._foreach_lerp_(self.weights, current, 1 - decay)  # pyright: ignore[reportPrivateUsage]  # no public name

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Copy the averaged weights into the network."""
        for parameter, weight in zip(network.parameters(), self.weights, strict=True):
            parameter.copy_(weight)
