"""What the training loop reads of a pair. C: latent channels; H, W: latent sides; L: prompt tokens; D: prompt width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..qwen_image.types import Condition


class ReferenceFile(NamedTuple):
    """A reference that is encoded on the fly: its path, the file's SHA-256, and its view (see View.from_json)."""

    path: str
    content: str
    view: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair with one of its captions; all tensors are float32 on the CPU, and latents are normalised.

    `target_latents` [C, H, W], `reference_latents` [C, h, w] each, and `prompt_embeds` [L, D] without padding.
    `loss_weights` [1, H, W] have mean 1; None if all are 1. `timestep_sampling_offset` is that of the EncodedEntry.
    `difference` [1, H, W] is the mean difference of the pixels of target and first reference, in 8-bit steps; None if
    it was not encoded.
    """

    key: str
    target_latents: Tensor
    reference_latents: tuple[Tensor, ...]
    prompt_embeds: Tensor
    loss_weights: Tensor | None = None
    timestep_sampling_offset: float = 0.0
    difference: Tensor | None = None

    def condition(self, prompt: Tensor | None = None) -> Condition:
        """The transformer's inputs besides the noisy latents, with this prompt [L, D] in place of the pair's."""
        embeds = self.prompt_embeds if prompt is None else prompt
        return Condition(tuple(latents.unsqueeze(0) for latents in self.reference_latents), embeds.unsqueeze(0))
