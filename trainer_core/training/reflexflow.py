"""ReflexFlow: what a rolled-out pair's loss says besides (Huang et al. 2025, arXiv 2512.04904).

loss = beta2 · mean(weights · penalty(velocity - target)) + beta1 · |unit(velocity) - unit(rolled-out - picture)|²

The second term turns the velocity so that it leads from the picture to where the rollout has drifted. The weights count
more where the prediction has changed by the drift: 1 + alpha · change / mean(change), brought back to mean 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import RolloutConfig
from .objective import Penalty, velocity_loss
from .rollout import RolledOut


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
    turned = drift(
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


def drift(velocity: Tensor, displacement: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance [B] of the two directions, 0 for equal to 4 for opposite; a mask's zeros don't take part."""
    root = 1.0 if weights is None else weights.sqrt()
    one, other = ((each.float() * root).flatten(1) for each in (velocity, displacement))
    return (_unit(one) - _unit(other)).square().sum(dim=1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
