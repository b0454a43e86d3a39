"""The loop adds little to the network's own work and leaks nothing. benchmarks/loop.py measures its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.loop_cost import count_operators, encode, measure_memory, train_config
from trainer_core.config import ModelConfig

STEPS, LOOK_EVERY = 60, 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> tuple[Path, ModelConfig]:
    """A folder and a narrow base model."""
    return tmp_path_factory.mktemp("overhead"), model


def test_a_step_of_the_loop_does_little_more_than_the_network(base: tuple[Path, ModelConfig]):
    """Counted in operators, because times depend on the machine's load."""
    folder, model = base
    encoded, _ = encode(folder / "overhead", model, resolution=160, pairs=4)
    steps, bare = count_operators(train_config(folder / "overhead/run", encoded, model, 12))
    assert len(steps) > 1 and len(set(steps)) == 1, "every step does the same"
    assert steps[0] <= bare, "our forward pass saves more operators than the loop adds"


def test_nothing_grows_from_step_to_step(base: tuple[Path, ModelConfig]):
    folder, model = base
    encoded, _ = encode(folder / "memory", model, resolution=64, pairs=4)
    looks = measure_memory(train_config(folder / "memory/run", encoded, model, STEPS), LOOK_EVERY)
    settled = looks[1:]
    assert len(settled) == STEPS // LOOK_EVERY - 1
    counts = [look.tensors for look in settled]  # fewer are fine: tests that ran before may leave some for a while
    assert counts == sorted(counts, reverse=True)
    assert settled[-1].objects - settled[0].objects < STEPS, "fewer than one new object per step"
    assert settled[-1].resident_bytes - settled[0].resident_bytes < 16 * 2**20
