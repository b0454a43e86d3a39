"""What the training loop reads of a pair. C latent channels, H W latent sides, L prompt tokens, D prompt width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class ReferenceFile(NamedTuple):
    """A reference that is encoded on the fly: its file, the file's SHA-256, and what is seen of it, as View has it."""

    path: str
    content: str
    view: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair under one of its captions: `target_latents` [C, H, W], a [C, h, w] per reference, and
    `prompt_embeds` [L, D] at true length, so there is no mask. `loss_weights` [1, H, W] of mean 1, None where all count
    alike. All float32 on the CPU, latents normalised."""

    key: str
    target_latents: Tensor
    reference_latents: tuple[Tensor, ...]
    prompt_embeds: Tensor
    loss_weights: Tensor | None = None
