"""Scheduled sampling: now and then a pair's noisy latents are not drawn but sampled by the model itself.

A training sees points that lie exactly between picture and noise, a sampler those that the model's own errors have
moved ("exposure bias"). Here a pair is taken at a higher noise level and sampled down to its own one without gradient,
in steps of a thousandth of the noise range. The velocity to predict stays noise minus latents.

ReflexFlow (Huang et al. 2025, arXiv 2512.04904) changes the loss of such a pair:

loss = beta2 · mean(weights · penalty(velocity - target)) + beta1 · |unit(velocity) - unit(rolled-out - picture)|²

The second term turns the velocity towards where the rollout has drifted. The weights grow where the drift has changed
the prediction: 1 + alpha · change / mean(change), scaled back to mean 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RolloutConfig, RolloutSampler
from ..qwen_image.types import NoisyLatents
from ..rng import stream
from .objective import Penalty, velocity_loss

OFFSETS = 1000  # an offset of this many would be the whole noise range
HIGHEST = 1 - 1 / OFFSETS  # where rollouts begin at most: multistep samplers divide by the share of picture

Velocity = Callable[[Tensor, Tensor], Tensor]  # of latents [1, C, H, W] at noise level [1]
PairVelocity = Callable[[int, Tensor, Tensor], Tensor]  # the same for the pair of that row


@dataclass(frozen=True, slots=True)
class RolledOut:
    """A micro-batch's training input. Pairs in `rows` were sampled; `forwards` were spent on that.

    `exact_velocity` [rows, C, H, W] is what the model says on their exact points, where ReflexFlow asks for it.
    """

    noisy: NoisyLatents
    rows: tuple[int, ...] = ()
    exact_velocity: Tensor | None = None
    forwards: int = 0


def rollout_probability(step: int, rollout: RolloutConfig) -> float:
    """Chance that a pair of step `step` (counted from 0) is rolled out."""
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
    """How far up each pair of a step begins, in thousandths of the noise range: 0 to max_step_offset.

    A pair that is not rolled out has 0, and so has one that drew it."""
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
    """Noise levels from where the rollout begins down to `sigma`, in even steps of a thousandth or a little less."""
    begin = min(sigma + offset / OFFSETS, HIGHEST)
    count = math.ceil((begin - sigma) * OFFSETS - 1e-4)
    return [*(begin + (sigma - begin) * done / count for done in range(count)), sigma]


@torch.no_grad()
def roll_out(velocity: PairVelocity, noisy: NoisyLatents, offsets: Sequence[int], rollout: RolloutConfig) -> RolledOut:
    """Replace the latents of pairs with an offset by what the model samples."""
    latents, rows, exact, forwards = noisy.latents.clone(), [], [], 0
    for row, (sigma, offset) in enumerate(zip(noisy.sigma.tolist(), offsets, strict=True)):
        sigmas = rollout_sigmas(sigma, offset)
        if len(sigmas) == 1:
            continue
        counted = _Counted(velocity, row)
        point, line = noisy.latents[row : row + 1], noisy.target_velocity[row : row + 1]
        if _compares(rollout):
            exact.append(counted(point, noisy.sigma[row : row + 1]))
        begin = point + (sigmas[0] - sigma) * line
        latents[row] = integrate(
            counted, begin, sigmas, rollout.scheduled_sampling_sampler, rollout.scheduled_sampling_order
        )[0]
        rows.append(row)
        forwards += counted.calls
    sampled = NoisyLatents(latents, noisy.sigma, noisy.target_velocity)
    return RolledOut(sampled, tuple(rows), torch.cat(exact) if exact else None, forwards)


def _compares(rollout: RolloutConfig) -> bool:
    return rollout.scheduled_sampling_reflexflow and rollout.scheduled_sampling_reflexflow_alpha > 0


class _Counted:
    """A pair's velocity in float32, and how often it was asked for."""

    def __init__(self, velocity: PairVelocity, row: int) -> None:
        self._velocity, self._row, self.calls = velocity, row, 0

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self._velocity(self._row, latents, sigma).float()


def integrate(
    velocity: Velocity, latents: Tensor, sigmas: Sequence[float], sampler: RolloutSampler, order: int = 2
) -> Tensor:
    """Follow the velocity from the first noise level to the last; `order` is that of unipc and dpm."""
    if sampler == "rk4":
        return _runge_kutta(velocity, latents, sigmas)
    scheduler = _scheduler(sampler, order)
    scheduler.set_timesteps(len(sigmas) - 1)
    # Their own schedules end at zero; ours are handed over whole. Logarithms of near levels want float64.
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = scheduler.sigmas[:-1] * OFFSETS
    scheduler.set_begin_index(0)
    for sigma, timestep in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        predicted = velocity(latents, _level(sigma, latents))
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def _scheduler(sampler: RolloutSampler, order: int):  # noqa: ANN202 - three classes of diffusers without a common type
    """diffusers' sampler for flow matching, at its full order up to the last step."""
    import diffusers

    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}[sampler]
    return kind(
        solver_order=order,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )


def _runge_kutta(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The classical method of order 4, with four forwards a step."""
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
    """Loss per pair [B]; that of pairs that were not rolled out is their plain one. `latents` are the pictures'."""
    target, rows = rolled.noisy.target_velocity, list(rolled.rows)
    counted = compensation(velocity.detach(), rolled, rollout.scheduled_sampling_reflexflow_alpha)
    counted = counted if weights is None else counted * weights
    loss = velocity_loss(velocity, target, counted, penalty)
    turned = direction_error(
        velocity[rows], rolled.noisy.latents[rows] - latents[rows], None if weights is None else weights[rows]
    )
    scaled = rollout.scheduled_sampling_reflexflow_beta2 * loss[rows]
    return loss.index_copy(
        0, torch.tensor(rows, device=loss.device), scaled + rollout.scheduled_sampling_reflexflow_beta1 * turned
    )


def compensation(velocity: Tensor, rolled: RolledOut, alpha: float) -> Tensor:
    """Weights [B, C, H, W] of mean 1 from how far prediction and prediction on the exact point are apart."""
    weights = torch.ones(velocity.shape, device=velocity.device)
    if rolled.exact_velocity is None:
        return weights
    rows = list(rolled.rows)
    change = (rolled.exact_velocity - velocity[rows].float()).abs()
    mean = change.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    weights[rows] = (1 + alpha * change / mean) / (1 + alpha * (change.mean(dim=(1, 2, 3), keepdim=True) / mean))
    return weights


def direction_error(velocity: Tensor, displacement: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance [B] of the two directions, 0 for equal to 4 for opposite; a mask's zeros don't take part."""
    root = 1.0 if weights is None else weights.sqrt()
    one, other = ((each.float() * root).flatten(1) for each in (velocity, displacement))
    return (_unit(one) - _unit(other)).square().sum(dim=1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
