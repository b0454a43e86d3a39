"""When the dry step compiles the blocks by itself."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.narrow import planned_size
from trainer_core import dry_step
from trainer_core.config import LoraConfig, MemoryConfig, ModelConfig, TrainConfig
from trainer_core.dry_step import Measured
from trainer_core.geometry import Size
from trainer_core.memory.compilation import Compilation
from trainer_core.planning import duration as planning_duration
from trainer_core.planning.duration import compiled_seconds
from trainer_core.planning.workload import Workload, pair_size

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("has_triton", "saved", "pays", "words"),
    [
        (True, 720, True, "This takes up to a minute and saves about 12 min of the remaining 1 h 0 min"),
        (True, 24, False, "would save about 24 s of the remaining 1 h 0 min"),
        (False, 720, False, "Triton is not installed. It would save about 12 min"),
    ],
)
def test_auto_compiles_where_that_is_possible_and_shortens_the_run(
    has_triton: bool,
    saved: float,
    pays: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(dry_step, "can_compile", lambda _: has_triton)
    assert dry_step._pays(CUDA, 3600, saved) == pays
    assert words in caplog.text


# Steps measured on an H200 (benchmarks/gpu_step_h200_2026-11.md): weights, pixels per side, recomputed blocks, seconds
# uncompiled and compiled.
STEPS = [
    ("int8-quanto", 1024, -1, 1.545, 1.167),
    ("nf4-bnb", 1024, -1, 1.468, 1.181),
    ("int8-quanto", 512, 0, 0.593, 0.235),
    ("nf4-bnb", 512, -1, 1.058, 0.363),
]


@pytest.mark.parametrize(("precision", "side", "recomputed", "uncompiled", "compiled"), STEPS)
def test_the_estimated_saving_is_near_the_measured_one(
    precision: str, side: int, recomputed: int, uncompiled: float, compiled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seconds per operation of a matrix product and of attention forward and backward, and per copied byte, on an H200.
    rates = (1 / 790e12, 1 / 594e12, 1 / 523e12, 1 / 50e9)
    monkeypatch.setattr(planning_duration, "_probes", lambda *_: rates)
    network = planned_size({"num_layers": 60}, ModelConfig(base_model_precision=precision), LoraConfig())
    pair = pair_size(Size(side, side), [Size(side, side)], 230)
    memory = MemoryConfig(memory="manual", gradient_checkpointing_blocks=recomputed)
    config = TrainConfig(run_dir="run", encoded="data", memory=memory)
    estimate = compiled_seconds(config, network, Workload(train=pair, batch=1), CUDA)
    assert dry_step._saved_share(estimate, uncompiled) == pytest.approx(1 - compiled / uncompiled, abs=0.05)


def test_without_an_estimate_little_is_saved() -> None:
    assert dry_step._saved_share(None, 1.0) == dry_step._saved_share(2.0, 1.0) == 0.15


def networks_with(weight: nn.Parameter) -> SimpleNamespace:
    blocks = [nn.Linear(1, 1), nn.Linear(1, 1)]
    return SimpleNamespace(compilation=Compilation(blocks), optimizer=torch.optim.SGD([weight], lr=1))


@pytest.mark.parametrize(
    ("compiled", "taken", "words"), [(3.0, 3.0, ""), (5.0, 4.0, "compiled ones are not faster here")]
)
def test_auto_keeps_compiled_blocks_that_are_faster(
    compiled: float, taken: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An uncompiled step took 4 seconds."""
    networks = networks_with(nn.Parameter(torch.zeros(1)))

    def measure() -> Measured:
        assert networks.compilation.is_active
        return Measured(compiled, 2)

    found = dry_step._compiled_if_faster(networks, measure, Measured(4.0, 1))  # type: ignore[arg-type]
    assert found == Measured(taken, 1 if words else 2)
    assert networks.compilation.is_active == (not words)
    assert words in caplog.text and bool(words) == bool(caplog.text)


def test_auto_keeps_uncompiled_blocks_if_compiled_ones_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    """The dry step is repeated without them. What was measured before is told, not the failed attempt."""
    weight = nn.Parameter(torch.zeros(1))
    networks = networks_with(weight)

    def compute() -> None:
        if networks.compilation.is_active:
            weight.grad = torch.ones(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert weight.grad is None

    def measure() -> Measured:
        networks.compilation.attempt(compute, clean_up=networks.optimizer.zero_grad)
        return Measured(1.0, 2)

    found = dry_step._compiled_if_faster(networks, measure, Measured(4.0, 1))  # type: ignore[arg-type]
    assert found == Measured(4.0, 1)
    assert caplog.text.count("run uncompiled from now on, because compiled ones need more memory than is free") == 1
