"""Pairs of different sizes, and their velocities and adapter gradients in one forward pass or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.adapter_gradients import with_adapter
from trainer_core.adapters.master_weights import master_weights
from trainer_core.config import MemoryConfig, ModelConfig, TrainConfig
from trainer_core.memory.compilation import Compilation
from trainer_core.memory.placement import apply_memory, blocks_on_host, stream_blocks
from trainer_core.qwen_image.base_model import BaseModel, compute_dtype
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

# Target, references and prompt tokens. Two pairs have equal pictures, and some references have odd sides.
SIZES = (
    ((12, 12), ((8, 12),), 20),
    ((6, 16), ((7, 9), (12, 4)), 9),
    ((12, 12), ((8, 12),), 31),
    ((10, 4), (), 14),
)
SIGMAS = torch.tensor([0.2, 0.7, 0.4, 0.9])


def pairs(device: torch.device) -> tuple[list[Tensor], list[Condition]]:
    """Latents and conditions for a narrow model, the same at each call."""
    draws, latents, conditions = stream(0, "packed"), [], []
    for target, references, tokens in SIZES:
        pictures = [torch.randn(1, 16, *size, generator=draws) for size in (target, *references)]
        latents.append(pictures[0].to(device))
        prompt = torch.randn(1, tokens, 128, generator=draws)
        conditions.append(Condition(tuple(pictures[1:]), prompt).to(device))
    return latents, conditions


def one_by_one(
    transformer: Any, latents: Sequence[Tensor], sigmas: Tensor, conditions: Sequence[Condition]
) -> list[Tensor]:
    """What `predict_velocities` returns, with a forward pass for each pair."""
    inputs = zip(latents, sigmas.split(1), conditions, strict=True)
    return [predict_velocity(transformer, *each) for each in inputs]


def velocities_and_gradients(
    model: ModelConfig,
    predict: Callable[..., list[Tensor]],
    policy: str,
    memory: MemoryConfig | None,
    *,
    compiled: bool = False,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Velocities of the pairs, and the adapter's gradients by name. Without `memory`, nothing is recomputed."""
    base, device = BaseModel(model), torch.device(model.device)
    config = TrainConfig(
        run_dir="-",
        encoded="-",
        model=model,
        memory=memory or MemoryConfig(),
        gradient_checkpointing=memory is not None,
    )
    on_host = blocks_on_host(config.memory, base.num_blocks, checkpointing=config.gradient_checkpointing)
    transformer = load_transformer(base, device, on_host=on_host)
    streamed = stream_blocks(transformer, on_host, device, config.memory)
    if policy == "comfyui":
        follow_comfyui(transformer)
    weights = master_weights(with_adapter(transformer), compute_dtype(model))
    apply_memory(transformer, streamed, device, config)
    if compiled:
        Compilation(list(transformer.transformer_blocks)).start()
    latents, conditions = pairs(device)
    velocities = predict(transformer, latents, SIGMAS.to(device), conditions)
    torch.stack([(each.float() - 1).square().mean() for each in velocities]).sum().backward()
    gradients = {name: each.grad for name, each in weights.masters.items() if each.grad is not None}
    return [each.detach() for each in velocities], gradients
