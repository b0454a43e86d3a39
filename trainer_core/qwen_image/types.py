"""Inputs of the transformer.

Shapes: C latent channels (16), H and W latent height and width, L prompt tokens, D prompt width. Tensors of one pair
have a batch dimension of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Condition:
    """The transformer's inputs for a pair besides the noisy latents.

    `reference_latents` has one normalised [1, C, h, w] per reference. `prompt_embeds` is [1, L, D].
    """

    reference_latents: tuple[Tensor, ...]
    prompt_embeds: Tensor

    def to(self, device: torch.device) -> Condition:
        """The same condition on a device."""
        references = tuple(latents.to(device, non_blocking=True) for latents in self.reference_latents)
        return Condition(references, self.prompt_embeds.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class NoisyLatents:
    """Training input: `latents` [B, C, H, W] at noise level `sigma` [B], and the `target_velocity` to predict there."""

    latents: Tensor
    sigma: Tensor
    target_velocity: Tensor
