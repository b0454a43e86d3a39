"""The losses of a micro-batch's pairs: noise, rollouts, the base model's predictions, and the forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.inject import without_dropout, without_lora
from ..conditioning.batches import Batch, Draw
from ..conditioning.types import EncodedPair
from ..config import TrainConfig
from ..qwen_image.transformer import predict_velocities, predict_velocity
from ..qwen_image.types import Condition
from ..rng import seeded_globally
from .edit_weight import combined_weights
from .objective import add_noise, penalty_at, velocity_loss, with_offset
from .rollout import RolledOut, draw_offsets, reflexflow_loss, roll_out

if TYPE_CHECKING:
    from .step import Networks


@dataclasses.dataclass(frozen=True, slots=True)
class PairLosses:
    """Losses [pairs] of a micro-batch. `weighted` [pairs] is what training minimises. `numbers` [2, pairs] are the
    pairs' noise levels and extra forward passes, of which only the sum is right."""

    losses: Tensor
    weighted: Tensor
    numbers: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Input:
    """A pair's part of a micro-batch on the device. `weights` are its loss weights, None if all are 1. With
    `preserves`, it is trained towards the base model's prediction."""

    latents: Tensor
    condition: Condition
    weights: Tensor | None
    rolled: RolledOut
    preserves: bool

    def towards(self, velocity: Tensor) -> _Input:
        """The same input with another target velocity [1, C, H, W]."""
        noisy = dataclasses.replace(self.rolled.noisy, target_velocity=velocity.float())
        return dataclasses.replace(self, rolled=RolledOut(noisy, forwards=1))


def pair_losses(networks: Networks, batch: Batch, step_turns: range, done: int, config: TrainConfig) -> PairLosses:
    """The losses of a micro-batch's pairs after step `done`. `step_turns` are the turns of the whole step."""
    inputs = [
        _input(networks, pair, draw, step_turns, done, config)
        for draw, pair in zip(batch.draws, batch.pairs, strict=True)
    ]
    if any(each.preserves for each in inputs):
        inputs = _with_base_velocities(networks, inputs)
    latents, sigma = _latents(inputs)
    with _dropout(config, batch.draws[0].index, networks.device):
        conditions = [each.condition for each in inputs]
        velocities = predict_velocities(networks.transformer, latents, sigma, conditions, networks.graphs)
    losses = torch.cat([_loss(velocity, each, config) for velocity, each in zip(velocities, inputs, strict=True)])
    forwards = torch.zeros_like(sigma)
    forwards[0] = sum(each.rolled.forwards for each in inputs)
    weighted = losses
    if any(each.preserves for each in inputs):
        weight = config.preservation.preservation_weight
        weighted = losses * torch.tensor([weight if each.preserves else 1.0 for each in inputs]).to(losses)
    return PairLosses(losses, weighted, torch.stack([sigma, forwards]))


def _input(
    networks: Networks, pair: EncodedPair, draw: Draw, step_turns: range, done: int, config: TrainConfig
) -> _Input:
    """Draw noise for a pair's turn, and roll it out, using the current weights without dropout.

    A turn that preserves is not rolled out, and all of its picture counts alike.
    """
    latents = pair.target_latents.unsqueeze(0).to(networks.device, non_blocking=True)
    condition = pair.condition().to(networks.device)
    noise = with_offset(config.noise, pair.timestep_sampling_offset)
    noisy = add_noise(latents, noise, config.seed, [draw.index], step_turns)
    if draw.preserves:
        return _Input(latents, condition, None, RolledOut(noisy), preserves=True)
    weights = None if pair.loss_weights is None else pair.loss_weights.unsqueeze(0).to(networks.device)
    (offset,) = draw_offsets(config.rollout, done, config.seed, [draw.index])

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return predict_velocity(networks.transformer, latents, sigma, condition)

    with without_dropout(networks.transformer) if offset else nullcontext():
        rolled = roll_out(velocity, noisy, offset, config.rollout)
    difference = None if pair.difference is None else pair.difference.unsqueeze(0).to(networks.device)
    weights = combined_weights(latents, condition.reference_latents, difference, weights, config.noise)
    return _Input(latents, condition, weights, rolled, preserves=False)


def _latents(inputs: Sequence[_Input]) -> tuple[list[Tensor], Tensor]:
    """Noisy latents of each input, and their noise levels [pairs]."""
    return [each.rolled.noisy.latents for each in inputs], torch.cat([each.rolled.noisy.sigma for each in inputs])


@torch.no_grad()
def _with_base_velocities(networks: Networks, inputs: Sequence[_Input]) -> list[_Input]:
    """The inputs; those that preserve have the base model's prediction as their target velocity."""
    preserving = [each for each in inputs if each.preserves]
    conditions = [each.condition for each in preserving]
    with without_lora(networks.transformer), without_dropout(networks.transformer):
        wanted = iter(predict_velocities(networks.transformer, *_latents(preserving), conditions))
    return [each.towards(next(wanted)) if each.preserves else each for each in inputs]


def _loss(velocity: Tensor, pair: _Input, config: TrainConfig) -> Tensor:
    """The loss [1] of a pair's predicted velocity."""
    noisy, weights = pair.rolled.noisy, pair.weights
    penalty = penalty_at(noisy.sigma, config.noise)
    is_rolled_out = pair.rolled.forwards and not pair.preserves
    if not (is_rolled_out and config.rollout.scheduled_sampling_reflexflow):
        return velocity_loss(velocity, noisy.target_velocity, weights, penalty)
    return reflexflow_loss(
        velocity, pair.latents, pair.rolled, weights=weights, penalty=penalty, rollout=config.rollout
    )


def _dropout(config: TrainConfig, index: int, device: torch.device) -> AbstractContextManager[None]:
    if config.lora.lora_dropout == 0:
        return nullcontext()
    return seeded_globally(config.seed, "dropout", index, device)
