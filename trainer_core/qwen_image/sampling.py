"""Euler sampling of the rectified flow with true classifier-free guidance.

Noise levels and guidance are those of diffusers' Qwen edit pipelines, or of ComfyUI's graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Drawing
from ..device import free_bytes
from ..errors import ModelFileError
from ..events import SILENT, Observer, raise_if_stopped
from ..memory.compilation import is_compiled
from ..packages import explained_imports
from ..settings import is_plain
from ..text import brief, shown
from .base_model import BaseModel
from .flavours import FLAVOURS
from .folder import read_json
from .latents import pack, token_shape, unpack
from .positions import follows_comfyui
from .transformer import predict_velocities, predict_velocity
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
# Guidance's two passes share a forward pass if each has at most this many tokens and the blocks are not compiled.
# Measured with benchmarks/sampling.py on an H200, with int8 and one reference: a step takes 0.28 instead of 0.52 s
# with 2278 tokens (512 px), and equally long with 8422 tokens (1024 px), where a single pass keeps the device busy.
# Compiled blocks would gain 0.04 s at 512 px, but be compiled again for the batch, which takes 18 s.
TOGETHER_TOKENS = 4096
FORWARD_WIDTHS = 14  # peak memory of a forward pass without gradients, in widths of the network per token
_COMFYUI_LEVELS = 1000  # noise levels among which ComfyUI's scheduler simple chooses
_USABLE = 0.9  # of free memory, because the peak is an estimate


@dataclass(frozen=True, slots=True)
class ComfySchedule:
    """Sampler euler and scheduler simple of ComfyUI, ModelSamplingAuraFlow with `shift`, and CFGNorm at strength 1."""

    shift: float


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler configured in `folder`, or Qwen-Image-Edit's if there is no configuration.

    Raises:
        ModelFileError: the configuration can't be read, or a value has the wrong type.
    """
    with explained_imports("diffusers"):
        from diffusers import FlowMatchEulerDiscreteScheduler

    path = folder / "scheduler_config.json"
    stored = read_json(path) if path.is_file() else {}
    for name, usual in QWEN_SCHEDULE.items():
        value = stored.get(name, usual)
        fits = is_plain(float, value) if is_plain(float, usual) else type(value) is type(usual)
        if not fits and (name, value) != ("shift_terminal", None):
            raise ModelFileError(
                f"{name} in {shown(path)} must be of the kind of {usual!r}, got {brief(value)}. Download it again."
            )
    return FlowMatchEulerDiscreteScheduler.from_config({**QWEN_SCHEDULE, **stored})


def schedule_of(base: BaseModel, drawing: Drawing) -> FlowMatchEulerDiscreteScheduler | ComfySchedule:
    """The base model's own scheduler, or ComfyUI's.

    Raises:
        ModelFileError: as `load_scheduler`.
    """
    if drawing.schedule == "diffusers":
        return load_scheduler(base.folder.scheduler)
    return ComfySchedule(drawing.shift or FLAVOURS[base.config.flavour].comfyui_shift)


def dynamic_shift(num_tokens: int, config: Mapping[str, Any]) -> float:
    """The schedule's shift mu for a picture of `num_tokens` tokens: linear between the config's two anchor points."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (num_tokens - config["base_image_seq_len"])


def sigma_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler | ComfySchedule, num_steps: int, num_tokens: int
) -> Tensor:
    """Noise levels [num_steps + 1] from 1 down to 0."""
    if isinstance(scheduler, ComfySchedule):
        levels = torch.arange(1, _COMFYUI_LEVELS + 1) / _COMFYUI_LEVELS
        shifted = scheduler.shift * levels / (1 + (scheduler.shift - 1) * levels)
        chosen = [-(1 + int(step * (_COMFYUI_LEVELS / num_steps))) for step in range(num_steps)]
        return torch.cat([shifted[chosen], torch.zeros(1)])
    if num_steps == 1:
        return torch.tensor([1.0, 0.0])  # diffusers' terminal shift would divide zero by zero
    sigmas = torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    mu = dynamic_shift(num_tokens, scheduler.config) if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
    return scheduler.sigmas


def guided_velocity(conditional: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Guided velocity [1, C, H, W], rescaled as in Qwen's pipelines: each token keeps the conditional one's norm."""
    combined = negative + guidance * (conditional - negative)
    norms = [pack(velocity).norm(dim=-1, keepdim=True) for velocity in (conditional, combined)]
    ratio = (norms[0] / norms[1]).expand(-1, -1, pack(combined).shape[-1])
    return combined * unpack(ratio, *combined.shape[-2:])


def cfg_norm_velocity(conditional: Tensor, negative: Tensor, guidance: float, latents: Tensor, sigma: Tensor) -> Tensor:
    """Guided velocity [1, C, H, W] as with ComfyUI's CFGNorm: the guided picture latents - sigma · velocity has in no
    latent position a larger norm than the conditional one."""
    pictures = [
        latents - sigma * velocity for velocity in (conditional, negative + guidance * (conditional - negative))
    ]
    norms = [picture.norm(dim=1, keepdim=True) for picture in pictures]
    picture = pictures[1] * (norms[0] / (norms[1] + 1e-8)).clamp(0, 1)
    return (latents - picture) / sigma


def guides_together(transformer: QwenImageTransformer2DModel, condition: Condition, latents_1CHW: Tensor) -> bool:
    """Whether guidance's two passes should share a forward pass: on CUDA with uncompiled blocks, with at most
    TOGETHER_TOKENS tokens each, and if memory holds both."""
    if latents_1CHW.device.type != "cuda" or is_compiled(transformer.transformer_blocks[0]):
        return False
    shapes = map(token_shape, (latents_1CHW, *condition.reference_latents))
    tokens = condition.prompt_embeds.shape[1] + sum(rows * columns for _, rows, columns in shapes)
    element_bytes = transformer.proj_out.weight.element_size()
    needed = 2 * tokens * FORWARD_WIDTHS * transformer.inner_dim * element_bytes
    return tokens <= TOGETHER_TOKENS and needed < _USABLE * free_bytes(latents_1CHW.device)


@torch.no_grad()
def sample_latents(  # noqa: PLR0913 - the usual arguments of a sampler
    transformer: QwenImageTransformer2DModel,
    noise_1CHW: Tensor,
    condition: Condition,
    *,
    scheduler: FlowMatchEulerDiscreteScheduler | ComfySchedule,
    num_steps: int,
    guidance: float = 1.0,
    negative: Condition | None = None,
    together: bool | None = None,
    observer: Observer = SILENT,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from noise [1, C, H, W] to latents of the same shape (float32).

    If the transformer follows ComfyUI, guidance and latents are computed in float32, as ComfyUI's samplers do.
    Otherwise they are computed and rounded in the network's dtype, as in diffusers' pipelines.

    Guidance needs a `negative` condition and a scale above 1. `together`: whether its two passes share a forward pass
    until memory runs out; None asks `guides_together`. `on_step` gets the number of finished steps. No step waits for
    the device.

    Raises:
        Interrupted: the observer wants to stop.
    """
    _, rows, columns = token_shape(noise_1CHW)
    schedule = sigma_schedule(scheduler, num_steps, rows * columns)
    dtype = torch.float32 if follows_comfyui(transformer) else transformer.proj_out.weight.dtype
    lengths, sigmas = (each.to(noise_1CHW.device) for each in (schedule.diff(), schedule))
    negative = negative if guidance > 1 else None
    if together is None:
        together = guides_together(transformer, condition, noise_1CHW)
    conditions = (condition,) if negative is None else (condition, negative)
    together = together and len(conditions) == 2
    latents = noise_1CHW.to(dtype)
    for index in range(num_steps):
        raise_if_stopped(observer)
        sigma, velocities = sigmas[index].expand(1), None
        if together:
            try:
                velocities = predict_velocities(transformer, (latents, latents), sigma.expand(2), conditions)
            except torch.OutOfMemoryError:
                together = False  # one after the other from now on
        if velocities is None:
            velocities = [predict_velocity(transformer, latents, sigma, each) for each in conditions]
        first, *others = (each.to(dtype) for each in velocities)
        if not others:
            velocity = first
        elif isinstance(scheduler, ComfySchedule):
            velocity = cfg_norm_velocity(first, *others, guidance, latents, sigmas[index])
        else:
            velocity = guided_velocity(first, *others, guidance)
        latents = (latents.float() + lengths[index] * velocity).to(dtype)
        if on_step is not None:
            on_step(index + 1)
    return latents.float()
