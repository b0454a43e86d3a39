"""Predictions and adapter gradients of a narrow transformer on one task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import LoraConfig
from trainer_core.qwen_image.transformer import predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

LORA = LoraConfig(lora_rank=4, lora_targets="all")


def task() -> tuple[Tensor, Tensor, Condition, Tensor]:
    """Latents, sigma, condition and target velocity, the same at each call."""
    draws = stream(0, "quantised")
    shapes = ((1, 16, 12, 12), (1, 16, 8, 12), (1, 20, 128), (1, 16, 12, 12))
    latents, reference, prompt, wanted = (torch.randn(shape, generator=draws) for shape in shapes)
    return latents, torch.tensor([0.6]), Condition((reference,), prompt), wanted


def with_adapter(transformer: nn.Module, config: LoraConfig = LORA) -> dict[str, nn.Parameter]:
    """Inject an adapter with non-zero weights, the same for every precision; returns its parameters by name."""
    lora = inject_lora(transformer, plan_adapter(transformer, config), seed=1)
    for name, weight in lora.items():
        if name.endswith("lora_B"):
            weight.data.copy_(torch.randn(weight.shape, generator=stream(0, "quantised", name)) * 0.05)
    return lora


def predict(transformer: nn.Module) -> Tensor:
    """The predicted velocity for the task."""
    latents, sigma, condition, _ = task()
    return predict_velocity(transformer, latents, sigma, condition)


def gradients(transformer: nn.Module, lora: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of the task's loss, by adapter parameter name."""
    (predict(transformer) - task()[-1]).square().mean().backward()
    return {name: weight.grad for name, weight in lora.items() if weight.grad is not None}
