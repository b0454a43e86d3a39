"""Rectified flow: draw the noise level, add the noise, compute the loss of the predicted velocity.

sigma is the noise level in [0, 1]; 1 is pure noise. latents_sigma = (1 - sigma) latents + sigma noise, and the
network predicts velocity = noise - latents (Liu et al., "Flow Straight and Fast", 2022; Esser et al., "Scaling
Rectified Flow Transformers", 2024).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import NoiseConfig
from ..qwen_image.latents import token_shape
from ..qwen_image.sampling import QWEN_SCHEDULE, dynamic_shift
from ..qwen_image.types import NoisyLatents
from ..rng import stream

SIGMA_BUCKETS = 5
Penalty = Callable[[Tensor], Tensor]  # elementwise function of the error


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Multiply the odds σ / (1 - σ) of noise levels by `shift`: s σ / (1 + (s - 1) σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_for(num_tokens: int, noise: NoiseConfig) -> float:
    """The shift for a picture with `num_tokens` target tokens."""
    if not noise.flow_schedule_auto_shift:
        return noise.flow_schedule_shift
    return math.exp(dynamic_shift(num_tokens, QWEN_SCHEDULE))


def with_offset(noise: NoiseConfig, offset: float) -> NoiseConfig:
    """The noise settings for a pair with this timestep_sampling_offset: σ = sigmoid(mean + std · (normal + offset))."""
    return dataclasses.replace(noise, logit_mean=noise.logit_mean + noise.logit_std * offset) if offset else noise


def draw_sigma(
    noise: NoiseConfig, num_tokens: int, generator: torch.Generator, part: int = 0, parts: int = 1
) -> Tensor:
    """One noise level [] in (0, 1), from stratum `part` of `parts` equally likely strata of the distribution."""
    if noise.sigma_distribution == "logit_normal" and parts == 1:
        sigma = torch.sigmoid(noise.logit_mean + noise.logit_std * torch.randn((), generator=generator))
    else:
        sigma = sigma_of_quantile((part + torch.rand((), generator=generator)) / parts, noise)
    return shift_sigma(sigma, shift_for(num_tokens, noise))


def sigma_of_quantile(quantile: Tensor, noise: NoiseConfig) -> Tensor:
    """Quantile function of the noise levels before the shift. `quantile` is uniform in (0, 1).

    logit-normal, mode and cosmap follow Esser et al. 2024 (arXiv 2403.03206), section 3.1. cosmap has the density
    2 / (pi (1 - 2 σ + 2 σ²)), which diffusers applies as a loss weight to uniform levels instead.
    """
    u = quantile.clamp(1e-6, 1 - 1e-6)
    if noise.sigma_distribution == "logit_normal":
        return torch.sigmoid(noise.logit_mean + noise.logit_std * torch.special.ndtri(u))
    if noise.sigma_distribution == "mode":
        return 1 - u - noise.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    if noise.sigma_distribution == "cosmap":
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    return u


def add_noise(
    latents_BCHW: Tensor, noise: NoiseConfig, seed: int, indices: Sequence[int], step_turns: range | None = None
) -> NoisyLatents:
    """Noisy latents for training. A pair's sigma and noise depend only on (seed, its index), not on the device.

    With stratified_sigmas and `step_turns`, the draw indices of the step, each index gets its own stratum of sigma.
    """
    _, rows, columns = token_shape(latents_BCHW)
    parts = _parts(seed, indices, step_turns if noise.stratified_sigmas else None)
    sigmas = [
        draw_sigma(noise, rows * columns, stream(seed, "sigma", index), *part)
        for index, part in zip(indices, parts, strict=True)
    ]
    noises = [torch.randn(latents_BCHW.shape[1:], generator=stream(seed, "noise", index)) for index in indices]
    device = latents_BCHW.device
    return noisy_latents(latents_BCHW, torch.stack(sigmas).to(device), torch.stack(noises).to(device))


def _parts(seed: int, indices: Sequence[int], step_turns: range | None) -> list[tuple[int, int]]:
    """(part, parts) for each index. The order is shuffled in every step, so that no position is tied to a stratum."""
    if step_turns is None:
        return [(0, 1)] * len(indices)
    count = len(step_turns)
    order = torch.randperm(count, generator=stream(seed, "strata", step_turns.start)).tolist()
    return [(order[index - step_turns.start], count) for index in indices]


def noisy_latents(latents_BCHW: Tensor, sigma_B: Tensor, noise_BCHW: Tensor) -> NoisyLatents:
    """The point at noise level sigma on the line from latents to noise, and the target velocity noise - latents."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return NoisyLatents((1 - sigma) * latents_BCHW + sigma * noise_BCHW, sigma_B, noise_BCHW - latents_BCHW)


def velocity_loss(
    velocity_BCHW: Tensor, target_BCHW: Tensor, weights_B1HW: Tensor | None = None, penalty: Penalty = torch.square
) -> Tensor:
    """Mean penalty of the error per pair [B], in float32. `weights_B1HW` has mean 1 per pair."""
    counted = penalty(velocity_BCHW.float() - target_BCHW.float())
    if weights_B1HW is not None:
        counted = counted * weights_B1HW
    return counted.mean(dim=(1, 2, 3))


def penalty_at(sigma_B: Tensor, noise: NoiseConfig) -> Penalty:
    """The penalty at these noise levels: the squared error e², or pseudo-Huber of width c.

    huber is 2c (sqrt(e² + c²) - c), about e² for small errors. smooth_l1 is 2 (sqrt(e² + c²) - c), about 2|e| for large
    ones. Computed as e² / (sqrt(e² + c²) + c), which keeps small errors precise.
    """
    if noise.loss_type == "l2":
        return torch.square
    width = huber_width(sigma_B, noise).view(-1, 1, 1, 1)
    factor = 2 * width if noise.loss_type == "huber" else 2.0

    def penalty(error: Tensor) -> Tensor:
        square = error.square()
        return factor * square / (torch.sqrt(square + width.square()) + width)

    return penalty


def huber_width(sigma_B: Tensor, noise: NoiseConfig) -> Tensor:
    """Width c [B] of the penalty. snr raises it from c to 1 with the noise, exponential lowers it from 1 to c.

    snr is SimpleTuner's for flow models: (1 - c) / (1 + s)² + c with s² = (1 - σ) / (σ + 0.0001).
    """
    if noise.huber_schedule == "snr":
        ratio = ((1 - sigma_B) / (sigma_B + 1e-4)).sqrt()
        return (1 - noise.huber_c) / (1 + ratio).square() + noise.huber_c
    if noise.huber_schedule == "exponential":
        return noise.huber_c**sigma_B
    return torch.full_like(sigma_B, noise.huber_c)


def loss_by_sigma(losses: Sequence[float], sigmas: Sequence[float]) -> dict[str, float]:
    """Mean loss per fifth of the noise range, because a flow's loss depends mostly on sigma."""
    buckets: dict[str, list[float]] = {}
    for loss, sigma in zip(losses, sigmas, strict=True):
        low = min(int(sigma * SIGMA_BUCKETS), SIGMA_BUCKETS - 1) / SIGMA_BUCKETS
        buckets.setdefault(f"{low:.1f}-{low + 1 / SIGMA_BUCKETS:.1f}", []).append(loss)
    return {name: sum(values) / len(values) for name, values in sorted(buckets.items())}
