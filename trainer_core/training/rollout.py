"""Scheduled sampling: for some pairs, the model samples the noisy latents itself.

Training uses points exactly on the line between picture and noise. At inference, the model's own errors move the
points off this line ("exposure bias"). A rolled-out pair starts at a higher noise level and is sampled down to its own
level without gradient, in steps of a thousandth of the noise range. The target velocity stays noise - latents.

ReflexFlow (Huang et al. 2025, arXiv 2512.04904) changes the loss of such a pair:

loss = beta2 · mean(weights · penalty(velocity - target)) + beta1 · |unit(velocity) - unit(rolled-out - picture)|²

The second term aligns the velocity with the line from the picture to the rolled-out point. The weights are larger where
drift has changed the prediction: 1 + alpha · change / mean(change), scaled to mean 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RolloutConfig, RolloutSampler
from ..packages import explained_imports
from ..qwen_image.types import NoisyLatents
from ..rng import stream
from .objective import Penalty, velocity_loss

OFFSETS = 1000  # the noise range in units of the offset
HIGHEST = 1 - 1 / OFFSETS  # highest start of a rollout: multistep samplers divide by 1 - sigma

Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity at latents [1, C, H, W] and noise level [1]


@dataclass(frozen=True, slots=True)
class RolledOut:
    """A pair's training input. It was rolled out in `forwards` forward passes, or not if that is 0.

    `exact_velocity` [1, C, H, W] is the prediction at its point on the line; None unless ReflexFlow needs it.
    """

    noisy: NoisyLatents
    exact_velocity: Tensor | None = None
    forwards: int = 0


def rollout_probability(step: int, rollout: RolloutConfig) -> float:
    """Probability that a pair of step `step` (counted from 0) is rolled out."""
    if rollout.scheduled_sampling_max_step_offset == 0 or step < rollout.scheduled_sampling_start_step:
        return 0.0
    if rollout.scheduled_sampling_ramp_steps == 0:
        return rollout.scheduled_sampling_probability
    passed = min(1.0, (step - rollout.scheduled_sampling_start_step) / rollout.scheduled_sampling_ramp_steps)
    if rollout.scheduled_sampling_ramp_shape == "cosine":
        passed = (1 - math.cos(math.pi * passed)) / 2
    start, end = rollout.scheduled_sampling_prob_start, rollout.scheduled_sampling_prob_end
    return start + (end - start) * passed


def draw_offsets(rollout: RolloutConfig, step: int, seed: int, indices: Sequence[int]) -> tuple[int, ...]:
    """How much higher each pair starts, in thousandths of the noise range: 0 (no rollout) to max_step_offset."""
    probability = rollout_probability(step, rollout)
    if probability <= 0:
        return (0,) * len(indices)
    return tuple(_draw_offset(rollout, probability, stream(seed, "rollout", index)) for index in indices)


def _draw_offset(rollout: RolloutConfig, probability: float, generator: torch.Generator) -> int:
    chance, level = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    if chance >= probability:
        return 0
    share = {"uniform": level, "biased_early": level**2, "biased_late": 1 - level**2}
    most = rollout.scheduled_sampling_max_step_offset
    return min(most, int(share[rollout.scheduled_sampling_strategy] * (most + 1)))


def rollout_sigmas(sigma: float, offset: int) -> list[float]:
    """Noise levels from the start of the rollout down to `sigma`, in equal steps of at most about a thousandth."""
    begin = min(sigma + offset / OFFSETS, HIGHEST)
    count = math.ceil((begin - sigma) * OFFSETS - 1e-4)
    return [*(begin + (sigma - begin) * done / count for done in range(count)), sigma]


@torch.no_grad()
def roll_out(velocity: Velocity, noisy: NoisyLatents, offset: int, rollout: RolloutConfig) -> RolledOut:
    """Replace a pair's latents by latents that the model samples, from `offset` thousandths of the noise range higher.

    With offset 0 they stay.
    """
    sigma = float(noisy.sigma) if offset else 0.0
    sigmas = rollout_sigmas(sigma, offset)
    if len(sigmas) == 1:
        return RolledOut(noisy)
    forwards, exact = 0, None

    def counted(point: Tensor, level: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return velocity(point, level).float()

    if rollout.scheduled_sampling_reflexflow and rollout.scheduled_sampling_reflexflow_alpha > 0:
        exact = counted(noisy.latents, noisy.sigma)
    begin = noisy.latents + (sigmas[0] - sigma) * noisy.target_velocity
    sampler, order = rollout.scheduled_sampling_sampler, rollout.scheduled_sampling_order
    sampled = integrate(counted, begin, sigmas, sampler, order)
    return RolledOut(NoisyLatents(sampled, noisy.sigma, noisy.target_velocity), exact, forwards)


def integrate(
    velocity: Velocity, latents: Tensor, sigmas: Sequence[float], sampler: RolloutSampler, order: int = 2
) -> Tensor:
    """Integrate the velocity from the first noise level to the last. `order` applies to unipc and dpm."""
    if sampler == "rk4":
        return _runge_kutta(velocity, latents, sigmas)
    scheduler = _scheduler(sampler, order)
    scheduler.set_timesteps(len(sigmas) - 1)
    # Replace its own noise levels, which end at 0. float64, because it subtracts logarithms of nearly equal levels.
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = scheduler.sigmas[:-1] * OFFSETS
    scheduler.set_begin_index(0)
    for sigma, timestep in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        predicted = velocity(latents, _level(sigma, latents))
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def _scheduler(sampler: RolloutSampler, order: int):  # noqa: ANN202 - three classes of diffusers without a common type
    """A scheduler of diffusers for flow matching that does not lower its order in the last steps."""
    with explained_imports("diffusers"):
        from diffusers import (
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            UniPCMultistepScheduler,
        )

    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    kind = {"unipc": UniPCMultistepScheduler, "dpm": DPMSolverMultistepScheduler}[sampler]
    return kind(
        solver_order=order,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )


def _runge_kutta(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The classical fourth-order Runge-Kutta method: four forward passes per step."""
    for begin, end in itertools.pairwise(sigmas):
        span, middle = end - begin, _level((begin + end) / 2, latents)
        first = velocity(latents, _level(begin, latents))
        second = velocity(latents + span / 2 * first, middle)
        third = velocity(latents + span / 2 * second, middle)
        fourth = velocity(latents + span * third, _level(end, latents))
        latents = latents + span / 6 * (first + 2 * second + 2 * third + fourth)
    return latents


def _level(sigma: float, latents: Tensor) -> Tensor:
    return torch.full((1,), sigma, dtype=torch.float32, device=latents.device)


def reflexflow_loss(
    velocity: Tensor,
    latents: Tensor,
    rolled: RolledOut,
    *,
    weights: Tensor | None,
    penalty: Penalty,
    rollout: RolloutConfig,
) -> Tensor:
    """ReflexFlow's loss [1] of a rolled-out pair. `latents` are the target picture's."""
    counted = compensation(velocity.detach(), rolled, rollout.scheduled_sampling_reflexflow_alpha)
    counted = counted if weights is None else counted * weights
    loss = velocity_loss(velocity, rolled.noisy.target_velocity, counted, penalty)
    turned = direction_error(velocity, rolled.noisy.latents - latents, weights)
    beta1, beta2 = rollout.scheduled_sampling_reflexflow_beta1, rollout.scheduled_sampling_reflexflow_beta2
    return beta2 * loss + beta1 * turned


def compensation(velocity: Tensor, rolled: RolledOut, alpha: float) -> Tensor:
    """Weights [1, C, H, W] of mean 1, larger where the rollout has changed the prediction."""
    if rolled.exact_velocity is None:
        return torch.ones(velocity.shape, device=velocity.device)
    change = (rolled.exact_velocity - velocity.float()).abs()
    mean = change.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return (1 + alpha * change / mean) / (1 + alpha * (change.mean(dim=(1, 2, 3), keepdim=True) / mean))


def direction_error(velocity: Tensor, displacement: Tensor, weights: Tensor | None = None) -> Tensor:
    """Scale both by sqrt(weights), then return the squared distance [B] of their unit vectors: 0 (parallel) to 4."""
    root = 1.0 if weights is None else weights.sqrt()
    one, other = ((each.float() * root).flatten(1) for each in (velocity, displacement))
    return (_unit(one) - _unit(other)).square().sum(dim=1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
