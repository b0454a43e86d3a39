"""Rectified flow: the noise level drawn, the noisy latents made, the velocity's error measured.

sigma is the noise level in [0, 1]; 1 is pure noise. latents_sigma = (1 - sigma) latents + sigma noise, and the
network predicts velocity = noise - latents (Liu et al., "Flow Straight and Fast", 2022; Esser et al., "Scaling
Rectified Flow Transformers", 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import NoiseConfig
from ..qwen_image.latents import token_shape
from ..qwen_image.sampling import QWEN_SCHEDULE, dynamic_shift
from ..qwen_image.types import NoisyLatents
from ..rng import stream

SIGMA_BUCKETS = 5


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels up by a factor of the odds: s σ / (1 + (s - 1) σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_for(num_tokens: int, noise: NoiseConfig) -> float:
    """The shift of a picture with `num_tokens` target tokens."""
    if not noise.flow_schedule_auto_shift:
        return noise.flow_schedule_shift
    return math.exp(dynamic_shift(num_tokens, QWEN_SCHEDULE))


def draw_sigma(noise: NoiseConfig, num_tokens: int, generator: torch.Generator) -> Tensor:
    """One noise level [] in (0, 1)."""
    if noise.sigma_distribution == "uniform":
        sigma = torch.rand((), generator=generator)
    else:
        normal = torch.randn((), generator=generator)
        sigma = torch.sigmoid(noise.logit_mean + noise.logit_std * normal)
    return shift_sigma(sigma, shift_for(num_tokens, noise))


def add_noise(latents_BCHW: Tensor, noise: NoiseConfig, seed: int, indices: Sequence[int]) -> NoisyLatents:
    """Noisy latents for training; every pair's draw depends on (seed, its index) alone, on any device."""
    _, rows, columns = token_shape(latents_BCHW)
    sigmas = [draw_sigma(noise, rows * columns, stream(seed, "sigma", index)) for index in indices]
    noises = [torch.randn(latents_BCHW.shape[1:], generator=stream(seed, "noise", index)) for index in indices]
    device = latents_BCHW.device
    return noisy_latents(latents_BCHW, torch.stack(sigmas).to(device), torch.stack(noises).to(device))


def noisy_latents(latents_BCHW: Tensor, sigma_B: Tensor, noise_BCHW: Tensor) -> NoisyLatents:
    """The point at noise level sigma on the straight line from latents to noise, and the line's velocity."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return NoisyLatents((1 - sigma) * latents_BCHW + sigma * noise_BCHW, sigma_B, noise_BCHW - latents_BCHW)


def velocity_loss(velocity_BCHW: Tensor, target_BCHW: Tensor, weights_B1HW: Tensor | None = None) -> Tensor:
    """Mean squared error per pair [B], in float32; weighted by a mask of mean 1 where there is one."""
    error = (velocity_BCHW.float() - target_BCHW.float()).square()
    if weights_B1HW is not None:
        error = error * weights_B1HW
    return error.mean(dim=(1, 2, 3))


def loss_by_sigma(losses: Sequence[float], sigmas: Sequence[float]) -> dict[str, float]:
    """Mean loss per fifth of the noise range, which makes a flow's loss readable: it depends mostly on sigma."""
    buckets: dict[str, list[float]] = {}
    for loss, sigma in zip(losses, sigmas, strict=True):
        low = min(int(sigma * SIGMA_BUCKETS), SIGMA_BUCKETS - 1) / SIGMA_BUCKETS
        buckets.setdefault(f"{low:.1f}-{low + 1 / SIGMA_BUCKETS:.1f}", []).append(loss)
    return {name: sum(values) / len(values) for name, values in sorted(buckets.items())}
