"""Pairs of different sizes in one forward pass: velocities and gradients equal those of the pairs one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.adapter_gradients import with_adapter
from trainer_core.config import MemoryConfig, ModelConfig, TrainConfig
from trainer_core.memory.placement import apply_memory, blocks_on_host, stream_blocks
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.qwen_image.transformer import load_transformer, predict_velocities, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

CPU = torch.device("cpu")
# Target, references and prompt tokens. Two pairs have equal pictures, and some references have odd sides.
SIZES = (
    ((12, 12), ((8, 12),), 20),
    ((6, 16), ((7, 9), (12, 4)), 9),
    ((12, 12), ((8, 12),), 31),
    ((10, 4), (), 14),
)
SIGMAS = torch.tensor([0.2, 0.7, 0.4, 0.9])


def pairs() -> tuple[list[Tensor], list[Condition]]:
    draws, latents, conditions = stream(0, "packed"), [], []
    for target, references, tokens in SIZES:
        pictures = [torch.randn(1, 16, *size, generator=draws) for size in (target, *references)]
        latents.append(pictures[0])
        conditions.append(Condition(tuple(pictures[1:]), torch.randn(1, tokens, 128, generator=draws)))
    return latents, conditions


def one_by_one(
    transformer: Any, latents: Sequence[Tensor], sigmas: Tensor, conditions: Sequence[Condition]
) -> list[Tensor]:
    inputs = zip(latents, sigmas.split(1), conditions, strict=True)
    return [predict_velocity(transformer, *each) for each in inputs]


def outcome(
    model: ModelConfig, predict: Callable[..., list[Tensor]], policy: str, memory: MemoryConfig | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Velocities of the pairs, and the adapter's gradients. Without `memory`, nothing is recomputed."""
    base = BaseModel(model)
    config = TrainConfig(
        run_dir="-",
        encoded="-",
        model=model,
        memory=memory or MemoryConfig(),
        gradient_checkpointing=memory is not None,
    )
    on_host = blocks_on_host(config.memory, base.num_blocks, checkpointing=config.gradient_checkpointing)
    transformer = load_transformer(base, CPU, on_host=on_host)
    streamed = stream_blocks(transformer, on_host, CPU, config.memory)
    if policy == "comfyui":
        follow_comfyui(transformer)
    lora = with_adapter(transformer)
    apply_memory(transformer, streamed, CPU, config)
    latents, conditions = pairs()
    velocities = predict(transformer, latents, SIGMAS, conditions)
    torch.stack([(each - 1).square().mean() for each in velocities]).sum().backward()
    gradients = {name: each.grad for name, each in lora.items() if each.grad is not None}
    return [each.detach() for each in velocities], gradients


MEMORY = {
    "kept": None,
    "recomputed": MemoryConfig(memory="manual", gradient_checkpointing_blocks=-1),
    "streamed": MemoryConfig(memory="manual", blocks_to_stream=2, activation_offload=True),
}


@pytest.mark.parametrize("flavour", ["edit-v1", "edit-v3"])
@pytest.mark.parametrize("policy", ["comfyui", "diffusers"])
@pytest.mark.parametrize("memory", MEMORY)
def test_pairs_of_different_sizes_compute_as_if_alone(
    base_of: Callable[[str], ModelConfig], flavour: str, policy: str, memory: str
) -> None:
    """edit-v3 modulates targets and references differently, so each of its pairs has two rows of modulation."""
    velocities, gradients = outcome(base_of(flavour), predict_velocities, policy, MEMORY[memory])
    alone, wanted = outcome(base_of(flavour), one_by_one, policy, MEMORY["kept"])
    assert [each.shape for each in velocities] == [(1, 16, *size) for size, *_ in SIZES]
    for found, each in zip(velocities, alone, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_no_pair_sees_another(base_of: Callable[[str], ModelConfig]) -> None:
    transformer = load_transformer(BaseModel(base_of("edit-v2")), CPU)
    latents, conditions = pairs()
    before = predict_velocities(transformer, latents, SIGMAS, conditions)
    latents[1], other = latents[1] + 1, conditions[3]
    conditions[3] = Condition(other.reference_latents, -other.prompt_embeds)
    after = predict_velocities(transformer, latents, SIGMAS, conditions)
    changed = [not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, True]
