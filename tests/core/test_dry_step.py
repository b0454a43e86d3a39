"""When the dry step compiles the blocks by itself."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.narrow import planned_size
from trainer_core import dry_step
from trainer_core.config import BatchingConfig, LoraConfig, MemoryConfig, ModelConfig, TrainConfig
from trainer_core.config.memory import CompileBlocks
from trainer_core.dry_step import Measured, of_first_block, wrong_gradients
from trainer_core.geometry import Size
from trainer_core.memory.compilation import Compilation
from trainer_core.planning import duration as planning_duration
from trainer_core.planning.duration import compiled_seconds
from trainer_core.planning.workload import Workload, pair_size

CUDA = torch.device("cuda")
# Seconds per operation of a matrix product and of attention forward and backward, and per copied byte, on an H200. The
# planner counts a backward pass of attention as twice the forward pass, the benchmark's table as 2.5 times.
H200 = (1 / 790e12, 1 / 615e12, 1 / 435e12, 1 / 55e9)
H200_AT_512 = (1 / 732e12, 1 / 391e12, 1 / 301e12, 1 / 55e9)


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


@pytest.mark.parametrize(
    ("wish", "has_triton", "side", "left", "starts"),
    [
        ("auto", True, 1024, 2000, True),
        ("auto", True, 1024, 20, False),
        ("auto", True, 512, 1500, True),
        ("auto", True, 512, 20, False),
        ("on", True, 1024, 20, True),
        ("off", True, 1024, 2000, False),
        ("auto", False, 1024, 2000, False),
    ],
)
def test_the_compiler_starts_while_the_model_is_loaded_if_it_will_be_needed(
    wish: CompileBlocks, has_triton: bool, side: int, left: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(dry_step, "start_compiler", lambda: started.append(True))
    monkeypatch.setattr(dry_step, "can_compile", lambda _: has_triton)
    monkeypatch.setattr(planning_duration, "rates", lambda *_: H200)
    monkeypatch.setattr(planning_duration, "eight_bit_rate", lambda *_: None)
    monkeypatch.setattr(planning_duration, "can_compile", lambda _: has_triton)
    monkeypatch.setattr(planning_duration, "allocator_allows_graphs", lambda: True)
    config = dataclasses.replace(
        config_with(wish), max_train_steps=2000, batching=BatchingConfig(gradient_accumulation_steps=4)
    )
    network = planned_size({"num_layers": 60}, config.model, config.lora)
    work = Workload(train=pair_size(Size(side, side), [Size(side, side)], 230), batch=1)
    prepared = SimpleNamespace(config=config, model=SimpleNamespace(size=network), work=work)
    dry_step.start_compiler_early(prepared, CUDA, 2000 - left)  # type: ignore[arg-type]
    assert bool(started) == starts


# Steps measured on an H200 (series G of benchmarks/gpu_step_h200_2026-11.md): weights, products, pixels per side,
# seconds uncompiled and compiled. CUDA graphs: the compiled step in bf16, and both at 512 pixels.
STEPS = [
    ("none", "bf16", 1024, 0.995, 0.918),
    ("int8-quanto", "8bit", 1024, 0.835, 0.738),
    ("int8-quanto", "8bit", 512, 0.223, 0.176),
]


@pytest.mark.parametrize(("precision", "products", "side", "uncompiled", "compiled"), STEPS)
def test_the_estimate_is_near_the_measured_step(
    precision: str, products: str, side: int, uncompiled: float, compiled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_duration, "rates", lambda *_: H200 if side == 1024 else H200_AT_512)
    monkeypatch.setattr(planning_duration, "eight_bit_rate", lambda *_: 1 / 1073e12 if products == "8bit" else None)
    monkeypatch.setattr(planning_duration, "allocator_allows_graphs", lambda: True)
    monkeypatch.setattr(planning_duration, "can_compile", lambda _: False)
    model = ModelConfig(base_model_precision=precision, matmul_precision=products)
    network = planned_size({"num_layers": 60}, model, LoraConfig())
    work = Workload(train=pair_size(Size(side, side), [Size(side, side)], 230), batch=1)
    config = TrainConfig(run_dir="run", encoded="data", model=model, memory=MemoryConfig(memory="manual"))
    estimate = compiled_seconds(config, network, work, CUDA)
    assert estimate == pytest.approx(compiled, rel=0.05)
    speed = planning_duration.probed_speed(config, network, work, CUDA)
    assert speed is not None
    plain = planning_duration.training_seconds(config, network, speed, work.tokens.image + work.tokens.text)
    assert plain == pytest.approx(uncompiled, rel=0.05)
    assert dry_step._saved_share(estimate, uncompiled) == pytest.approx(1 - compiled / uncompiled, abs=0.04)


@pytest.mark.parametrize(
    ("launched", "memory", "waits"),
    [
        (0.99, MemoryConfig(), True),
        (0.91, MemoryConfig(), False),
        (0.99, MemoryConfig(memory="manual", blocks_to_stream=20), False),
        (0.99, MemoryConfig(memory="manual", activation_offload=True), False),
    ],
)
def test_when_a_card_waits_for_the_processor(launched: float, memory: MemoryConfig, waits: bool) -> None:
    assert dry_step._waits_for_processor(Measured(2.0, 1, {}, 2.0 * launched), memory) == waits


def test_without_an_estimate_little_is_saved() -> None:
    assert dry_step._saved_share(None, 1.0) == dry_step._saved_share(2.0, 1.0) == 0.08


def networks_with(weight: nn.Parameter) -> SimpleNamespace:
    graphs = SimpleNamespace(forget=lambda: None, is_active=False)
    return SimpleNamespace(compilation=Compilation([]), optimizer=torch.optim.SGD([weight], lr=1), graphs=graphs)


RIGHT, WRONG = (
    {"transformer_blocks.0.attn.to_q.lora_B": torch.ones(2)},
    {"transformer_blocks.0.attn.to_q.lora_B": torch.zeros(2)},
)


def config_with(compile_blocks: CompileBlocks) -> TrainConfig:
    return TrainConfig(run_dir="run", encoded="data", memory=MemoryConfig(compile_blocks=compile_blocks))


@pytest.mark.parametrize(
    ("wish", "compiled", "kept", "words"),
    [
        ("auto", Measured(3.0, 2, RIGHT), True, ""),
        ("auto", Measured(5.0, 2, RIGHT), False, "compiled ones are not faster here"),
        ("on", Measured(5.0, 2, RIGHT), True, ""),
        ("on", Measured(3.0, 2, WRONG), False, "compiled ones give wrong gradients for attn.to_q with torch"),
    ],
)
def test_compiled_blocks_that_are_right_and_faster_are_kept(
    wish: CompileBlocks, compiled: Measured, kept: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An uncompiled step took 4 seconds."""
    networks, uncompiled = networks_with(nn.Parameter(torch.zeros(1))), Measured(4.0, 1, RIGHT)

    def measure() -> Measured:
        assert networks.compilation.is_active
        return compiled

    found = dry_step._compiled_if_right(networks, measure, uncompiled, config_with(wish))  # type: ignore[arg-type]
    assert found is (compiled if kept else uncompiled)
    assert networks.compilation.is_active == kept
    assert words in caplog.text and bool(words) == bool(caplog.text)


def test_graphs_that_worked_come_back_if_compiled_ones_fail() -> None:
    """Capturing the compiled passes turned graphs off, and bare compiled steps are slower than uncompiled graphs."""
    networks = networks_with(nn.Parameter(torch.zeros(1)))
    networks.graphs = graphs = SimpleNamespace(is_active=True, forget=lambda: None)
    graphs.start = lambda: setattr(graphs, "is_active", True)

    def measure() -> Measured:
        graphs.is_active = False
        return Measured(9.0, 2, RIGHT)

    uncompiled = Measured(3.0, 1, RIGHT)
    found = dry_step._compiled_if_right(networks, measure, uncompiled, config_with("auto"))  # type: ignore[arg-type]
    assert found is uncompiled and graphs.is_active and not networks.compilation.is_active


def test_gradients_of_one_block_are_compared() -> None:
    names = [f"transformer_blocks.{number}.attn.to_q.lora_{part}" for number in (10, 2, 1) for part in "AB"]
    gradients = {name: torch.ones(1) for name in ("proj_out.lora_A", *names)}
    assert list(of_first_block(gradients)) == names[-2:]
    assert of_first_block({"proj_out.lora_A": torch.ones(1)}) == {}


def test_wrong_gradients_are_named_by_layer() -> None:
    """Rounding and other dropped values are no mistake. A wrong direction, zeros and NaN are."""
    draws = torch.Generator().manual_seed(0)
    layers = ("rounded", "dropped", "zero", "nan", "unused")
    names = {layer: [f"transformer_blocks.3.{layer}.lora_{part}" for part in "AB"] for layer in layers}
    wanted = {name: torch.randn(100, generator=draws) for each in names.values() for name in each}
    found = {name: each.bfloat16().float() for name, each in wanted.items()}
    for number in (0, 1):
        found[names["dropped"][number]] = torch.randn(100, generator=draws)
        found[names["zero"][number]] = torch.zeros(100)
        wanted[names["unused"][number]] = found[names["unused"][number]] = torch.zeros(100)
    found[names["nan"][1]][5] = torch.nan
    assert wrong_gradients(found, wanted) == ("dropped", "zero", "nan")
    assert wrong_gradients(found, wanted, dropout=True) == ("zero", "nan")


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
        return Measured(1.0, 2, {})

    uncompiled = Measured(4.0, 1, {})
    found = dry_step._compiled_if_right(networks, measure, uncompiled, config_with("auto"))  # type: ignore[arg-type]
    assert found is uncompiled
    assert caplog.text.count("run uncompiled from now on, because compiled ones need more VRAM than is free") == 1
