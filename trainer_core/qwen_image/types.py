"""Inputs of the transformer.

Shapes: B batch, C latent channels (16), H and W latent height and width, L prompt tokens, D prompt width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Condition:
    """The transformer's inputs besides the noisy latents.

    `reference_latents` has one normalised [B, C, h, w] per reference. `prompt_embeds` is [B, L, D]. `prompt_mask`
    [B, L] is True for real tokens, which come first, or None if there is no padding. The mask stays in host memory,
    because lengths are read from it.
    """

    reference_latents: tuple[Tensor, ...]
    prompt_embeds: Tensor
    prompt_mask: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        """The same condition on a device."""
        references = tuple(latents.to(device, non_blocking=True) for latents in self.reference_latents)
        return Condition(references, self.prompt_embeds.to(device, non_blocking=True), self.prompt_mask)

    def beside(self, other: Condition) -> Condition:
        """The pairs of both conditions as one batch. Pads the shorter prompts at the end and masks the padding."""
        conditions, sizes = (self, other), [each.prompt_embeds.shape[:2] for each in (self, other)]
        longest = max(length for _, length in sizes)
        prompts = [
            functional.pad(each.prompt_embeds, (0, 0, 0, longest - length))
            for each, (_, length) in zip(conditions, sizes, strict=True)
        ]
        mask = None
        if sizes[0][1] != sizes[1][1] or any(each.prompt_mask is not None for each in conditions):
            real = [
                torch.ones(size, dtype=torch.bool) if each.prompt_mask is None else each.prompt_mask
                for each, size in zip(conditions, sizes, strict=True)
            ]
            mask = torch.cat([functional.pad(each, (0, longest - each.shape[1])) for each in real])
        references = zip(self.reference_latents, other.reference_latents, strict=True)
        return Condition(tuple(map(torch.cat, references)), torch.cat(prompts), mask)

    def of_pair(self, row: int) -> Condition:
        """The condition of one pair of the batch, as a batch of 1."""
        one = slice(row, row + 1)
        mask = None if self.prompt_mask is None else self.prompt_mask[one]
        return Condition(tuple(latents[one] for latents in self.reference_latents), self.prompt_embeds[one], mask)


@dataclass(frozen=True, slots=True)
class NoisyLatents:
    """Training input: `latents` [B, C, H, W] at noise level `sigma` [B], and the `target_velocity` to predict there."""

    latents: Tensor
    sigma: Tensor
    target_velocity: Tensor
