"""Euler sampling of the rectified flow with true classifier-free guidance, as in diffusers' Qwen edit pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..events import SILENT, Observer, raise_if_stopped
from .latents import pack, token_shape, unpack
from .transformer import predict_velocity
from .types import Condition

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

# Qwen-Image-Edit's scheduler_config.json, for base models without one.
QWEN_SCHEDULE = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler configured in `folder`, or Qwen-Image-Edit's if there is no configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    path = folder / "scheduler_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return FlowMatchEulerDiscreteScheduler.from_config({**QWEN_SCHEDULE, **stored})


def dynamic_shift(num_tokens: int, config: Mapping[str, Any]) -> float:
    """The schedule's shift mu for a picture of `num_tokens` tokens: linear between the config's two anchor points."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (num_tokens - config["base_image_seq_len"])


def sigma_schedule(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, num_tokens: int) -> Tensor:
    """Noise levels [num_steps + 1] from 1 down to 0."""
    if num_steps == 1:
        return torch.tensor([1.0, 0.0])  # diffusers' terminal shift would divide zero by zero
    sigmas = torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    mu = dynamic_shift(num_tokens, scheduler.config) if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
    return scheduler.sigmas


def guided_velocity(conditional: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Guided velocity [B, C, H, W], rescaled as in Qwen's pipelines: each token keeps the conditional one's norm."""
    combined = negative + guidance * (conditional - negative)
    norms = [pack(velocity).norm(dim=-1, keepdim=True) for velocity in (conditional, combined)]
    ratio = (norms[0] / norms[1]).expand(-1, -1, pack(combined).shape[-1])
    return combined * unpack(ratio, *combined.shape[-2:])


@torch.no_grad()
def sample_latents(  # noqa: PLR0913 - the usual arguments of a sampler
    transformer: QwenImageTransformer2DModel,
    noise_BCHW: Tensor,
    condition: Condition,
    *,
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    guidance: float = 1.0,
    negative: Condition | None = None,
    observer: Observer = SILENT,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from noise [B, C, H, W] to latents of the same shape.

    Guidance needs a `negative` condition and a scale above 1. `on_step` gets the number of finished steps.

    Raises:
        Interrupted: the observer wants to stop.
    """
    _, rows, columns = token_shape(noise_BCHW)
    sigmas = sigma_schedule(scheduler, num_steps, rows * columns)
    latents = noise_BCHW
    for index in range(num_steps):
        raise_if_stopped(observer)
        sigma = sigmas[index].expand(latents.shape[0]).to(latents.device)
        velocity = predict_velocity(transformer, latents, sigma, condition)
        if negative is not None and guidance > 1:
            velocity = guided_velocity(velocity, predict_velocity(transformer, latents, sigma, negative), guidance)
        latents = latents + (sigmas[index + 1] - sigmas[index]).item() * velocity.float()
        if on_step is not None:
            on_step(index + 1)
    return latents
