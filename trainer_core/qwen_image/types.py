"""What the transformer is told. B batch, C latent channels (16), H W latent sides, L prompt tokens, D prompt width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Condition:
    """All the network knows besides the noisy latents.

    `reference_latents`: one [B, C, h, w] per reference, normalised. `prompt_embeds` [B, L, D]. `prompt_mask` [B, L]
    is true for real tokens and None when all are.
    """

    reference_latents: tuple[Tensor, ...]
    prompt_embeds: Tensor
    prompt_mask: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        """The same on a device."""
        mask = None if self.prompt_mask is None else self.prompt_mask.to(device)
        references = tuple(latents.to(device, non_blocking=True) for latents in self.reference_latents)
        return Condition(references, self.prompt_embeds.to(device, non_blocking=True), mask)

    def of_pair(self, row: int) -> Condition:
        """That of one pair of the batch."""
        one = slice(row, row + 1)
        mask = None if self.prompt_mask is None else self.prompt_mask[one]
        return Condition(tuple(latents[one] for latents in self.reference_latents), self.prompt_embeds[one], mask)


@dataclass(frozen=True, slots=True)
class NoisyLatents:
    """Training input: `latents` [B, C, H, W] at noise level `sigma` [B], and the `target_velocity` to predict there."""

    latents: Tensor
    sigma: Tensor
    target_velocity: Tensor
