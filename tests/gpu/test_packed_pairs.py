"""Pairs of different sizes in one forward pass on CUDA, in bfloat16: equal to the pairs one by one up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.support.random_base import relative_error
from tests.support.unequal_pairs import one_by_one, velocities_and_gradients
from trainer_core.config import MemoryConfig, ModelConfig
from trainer_core.qwen_image.transformer import predict_velocities

MEMORY = {
    "kept": None,
    "recomputed": MemoryConfig(memory="manual", gradient_checkpointing_blocks=-1),
    "streamed": MemoryConfig(memory="manual", blocks_to_stream=2, activation_offload=True),
}


@pytest.mark.parametrize("flavour", ["edit-v2", "edit-v3"])
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize("memory", MEMORY)
def test_pairs_of_different_sizes_compute_as_if_alone(
    base_of: Callable[[str], ModelConfig], flavour: str, compiled: bool, memory: str
) -> None:
    model = dataclasses.replace(base_of(flavour), device="cuda", mixed_precision="bf16")
    velocities, gradients = velocities_and_gradients(
        model, predict_velocities, "comfyui", MEMORY[memory], compiled=compiled
    )
    alone, wanted = velocities_and_gradients(model, one_by_one, "comfyui", MEMORY["kept"])
    for found, each in zip(velocities, alone, strict=True):
        assert relative_error(found, each) < 0.03
    assert gradients.keys() == wanted.keys() and len(gradients) > 20
    assert {name: error for name in wanted if (error := relative_error(gradients[name], wanted[name])) > 0.1} == {}
