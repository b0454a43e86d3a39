"""Latents: normalisation per channel, and packing 2 by 2 into tokens.

Shapes: B batch, C latent channels (16), H and W height and width in latents, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LATENT_CHANNELS = 16
VAE_FACTOR = 8  # pixels per latent along a side
PATCH = 2  # latents per token along a side


def normalise(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise the VAE's latents [..., C, H, W] to zero mean and unit standard deviation per channel."""
    return (latents - _per_channel(mean, latents)) / _per_channel(std, latents)


def denormalise(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalise`."""
    return latents * _per_channel(std, latents) + _per_channel(mean, latents)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def pad_to_patches(latents: Tensor) -> Tensor:
    """Latents [..., H, W] padded to even sides with their first row or column, as ComfyUI does before packing."""
    height, width = latents.shape[-2:]
    if height % PATCH:
        latents = torch.cat([latents, latents[..., :1, :]], dim=-2)
    if width % PATCH:
        latents = torch.cat([latents, latents[..., :1]], dim=-1)
    return latents


def pack(latents_BCHW: Tensor) -> Tensor:
    """Pack latents [B, C, H, W] with even sides into tokens [B, H/2 * W/2, 4 C]."""
    batch, channels, height, width = latents_BCHW.shape
    grid = latents_BCHW.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens [B, N, 4 C] into latents [B, C, height, width]; the inverse of `pack`."""
    batch, _, depth = tokens_BND.shape
    channels = depth // (PATCH * PATCH)
    grid = tokens_BND.view(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def token_shape(latents: Tensor) -> tuple[int, int, int]:
    """(frames, rows, columns) of the tokens for latents [..., H, W], as the rotary embedding needs them."""
    height, width = latents.shape[-2:]
    return 1, -(-height // PATCH), -(-width // PATCH)
