"""Pairs of different sizes in one forward pass: velocities and gradients equal those of the pairs one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.unequal_pairs import SIGMAS, SIZES, one_by_one, pairs, velocities_and_gradients
from trainer_core.config import MemoryConfig, ModelConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer, predict_velocities
from trainer_core.qwen_image.types import Condition

CPU = torch.device("cpu")
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
    velocities, gradients = velocities_and_gradients(base_of(flavour), predict_velocities, policy, MEMORY[memory])
    alone, wanted = velocities_and_gradients(base_of(flavour), one_by_one, policy, MEMORY["kept"])
    assert [each.shape for each in velocities] == [(1, 16, *size) for size, *_ in SIZES]
    for found, each in zip(velocities, alone, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_no_pair_sees_another(base_of: Callable[[str], ModelConfig]) -> None:
    transformer = load_transformer(BaseModel(base_of("edit-v2")), CPU)
    latents, conditions = pairs(CPU)
    before = predict_velocities(transformer, latents, SIGMAS, conditions)
    latents[1], other = latents[1] + 1, conditions[3]
    conditions[3] = Condition(other.reference_latents, -other.prompt_embeds)
    after = predict_velocities(transformer, latents, SIGMAS, conditions)
    changed = [not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, True]
