"""The planner: which memory settings it chooses, what it refuses, and what it advises."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from tests.support.full_size_step import Setting, planned_bytes
from tests.support.narrow import planned_size
from trainer_core.config import EmaConfig, MemoryConfig, ModelConfig, TrainConfig
from trainer_core.errors import ConfigError, ModelFileError, OutOfMemoryError
from trainer_core.geometry import Size
from trainer_core.memory.placement import blocks_on_host
from trainer_core.planning.advice import STEP, VALIDATION, memory_advice, memory_errors_explained
from trainer_core.planning.choose import _TYPICAL, Budget, choose_memory
from trainer_core.planning.duration import training_seconds
from trainer_core.planning.network import NetworkSize
from trainer_core.planning.plan import GIB, MemoryPlan, plan_memory
from trainer_core.planning.report import plan_report, planned_in_words, unused_in_words
from trainer_core.planning.workload import Workload, pair_size

PLENTY = 512 * GIB
MEGAPIXEL = pair_size(Size(1024, 1024), [Size(1024, 1024)], 230)
WORK = Workload(train=MEGAPIXEL, batch=1, validation=MEGAPIXEL)


@pytest.fixture(scope="module")
def network() -> NetworkSize:
    """Qwen-Image at its full size, in bf16."""
    config = config_of()
    return planned_size({"num_layers": 60}, config.model, config.lora)


def config_of(**changes: object) -> TrainConfig:
    return TrainConfig(run_dir="run", encoded="data", memory=MemoryConfig(memory="auto"), **changes)


def chosen(network: NetworkSize, precision: str, gib: float, host: int = PLENTY) -> MemoryPlan:
    model = ModelConfig(base_model_precision=precision)
    sized = dataclasses.replace(network, precision=precision)
    return choose_memory(config_of(model=model), sized, WORK, Budget(int(gib * GIB), host))


# (precision, side of target and reference in pixels, memory settings, blocks) -> peak GiB of a step on an H200
# (benchmarks/gpu_step_h200_2026-11.md)
MEASURED = {
    ("none", 1024, "full", 60): 45.08,
    ("int8-quanto", 512, "full,8bit", 60): 21.38,
    ("none", 1024, "full,attention,compile", 20): 14.61,
    ("int8-quanto", 1024, "full,compile", 20): 9.35,
    ("int8-quanto", 512, "none,compile", 20): 9.99,
    ("fp8-quanto", 1024, "full,8bit,compile", 20): 9.73,
}


MEMORY = {
    "": MemoryConfig(),
    "offload": MemoryConfig(activation_offload=True),
    "blocks=40": MemoryConfig(gradient_checkpointing_blocks=40),
    "stream=60": MemoryConfig(blocks_to_stream=60),
}


@pytest.mark.parametrize("measured", list(MEASURED), ids=str)
def test_the_plan_is_within_a_twentieth_of_what_was_measured(measured: tuple[str, int, str, int]) -> None:
    precision, side, memory, layers = measured
    planned = planned_bytes(Setting("ours", precision, side, 1, memory), layers)
    assert planned / GIB == pytest.approx(MEASURED[measured], rel=0.05)


def step_time(plan: MemoryPlan) -> float:
    """The estimated time of a step."""
    return training_seconds(plan.config, plan.network, _TYPICAL, MEGAPIXEL.image_tokens + MEGAPIXEL.text_tokens)


def test_the_fastest_settings_that_fit_are_chosen(network: NetworkSize) -> None:
    sizes = (140, 80, 48, 24, 16, 12, 8)
    plans = [chosen(network, "nf4-bnb", gib) for gib in sizes]
    assert [plan.recomputed for plan in plans] == sorted(plan.recomputed for plan in plans)
    assert [step_time(plan) for plan in plans] == sorted(step_time(plan) for plan in plans)
    assert (plans[0].recomputed, plans[0].streamed) == (0, 0) and not plans[0].config.gradient_checkpointing
    assert not plans[0].config.memory.activation_offload
    for plan, gib in zip(plans, sizes, strict=True):
        assert plan.needed_device_bytes <= gib * GIB
        assert plan.config.model == ModelConfig(base_model_precision="nf4-bnb")  # only memory settings are changed


@pytest.mark.parametrize("gib", [12, 24, 40])
def test_streaming_makes_room_for_blocks_that_are_not_recomputed(network: NetworkSize, gib: int) -> None:
    """The choice is faster than recomputing everything, and any other choice that fits is no faster."""
    plan, budget = chosen(network, "int8-quanto", gib), Budget(gib * GIB, PLENTY)
    assert 0 < plan.recomputed < 60 and plan.streamed > 0
    others = [
        plan_memory(dataclasses.replace(plan.config, memory=memory), plan.network, plan.work)
        for recomputed in (-1, plan.recomputed - 1, plan.recomputed)
        for streamed in (0, plan.streamed - 1, plan.recomputed - 1)
        for memory in [
            MemoryConfig(gradient_checkpointing_blocks=recomputed, blocks_to_stream=streamed, activation_offload=True)
        ]
    ]
    fitting = [each for each in others if budget.holds(each)]
    assert fitting and min(map(step_time, fitting)) >= step_time(plan)


def test_streamed_blocks_are_spread_among_the_recomputed() -> None:
    memory = MemoryConfig(blocks_to_stream=3, gradient_checkpointing_blocks=9)
    assert blocks_on_host(memory, 12, checkpointing=True) == (0, 3, 6)
    with pytest.raises(ConfigError, match="at most the 2 blocks"):
        blocks_on_host(dataclasses.replace(memory, gradient_checkpointing_blocks=2), 12, checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing on"):
        blocks_on_host(memory, 12, checkpointing=False)


def test_host_memory_is_not_exceeded(network: NetworkSize) -> None:
    with pytest.raises(OutOfMemoryError, match="of RAM"):
        chosen(network, "none", 12, host=16 * GIB)
    with pytest.raises(OutOfMemoryError, match=r"needs 1[01]\.\d GiB of VRAM .* and 3\d\.\d GiB of RAM"):
        chosen(network, "none", 12, host=30 * GIB)  # tells the least host memory with which the device suffices
    plan = chosen(network, "none", 12, host=64 * GIB)
    assert plan.streamed > 40 and plan.host_peak_bytes <= 64 * GIB


def test_a_refusal_names_numbers_and_the_nearest_that_fits(network: NetworkSize) -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        chosen(network, "none", 16, host=24 * GIB)
    message = str(refused.value)
    assert re.search(r"needs \d+\.\d GiB of VRAM \(16\.0 GiB free\) and \d+\.\d GiB of RAM \(24\.0 GiB free\)", message)
    assert re.search(r"set precision \S+ \(base_model_precision in settings files\), which needs \d", message)
    with pytest.raises(OutOfMemoryError, match="No smaller setting makes it fit"):
        chosen(network, "none", 1)


def test_shared_memory_is_counted_once(network: NetworkSize) -> None:
    """On the CPU, device memory and host memory are the same memory."""
    small = dataclasses.replace(network, num_blocks=2)
    plan = choose_memory(config_of(), small, WORK, Budget(PLENTY, PLENTY, is_shared=True))
    need = plan.needed_device_bytes + plan.host_peak_bytes
    assert Budget(0, need, is_shared=True).holds(plan) and not Budget(PLENTY, need - 1, is_shared=True).holds(plan)


def test_the_report_says_what_it_is_for_and_whether_it_fits(network: NetworkSize) -> None:
    budget = Budget(24 * GIB, 64 * GIB)
    plan = plan_memory(config_of(), network, WORK)
    text = plan_report(plan, budget)
    assert "1 x (target 1024 x 1024, 1 reference: 8192 picture tokens, 230 prompt tokens)" in text
    assert "does not fit" in text and "frozen weights" in text and "decoding" in text
    assert text.count("\n") < 30 and max(map(len, text.splitlines())) < 200
    assert "The run fits" in plan_report(chosen(network, "nf4-bnb", 24), budget)


def test_settings_that_auto_does_not_use_are_named(network: NetworkSize) -> None:
    given = MemoryConfig(blocks_to_stream=20, activation_offload=True, stream_buffers=3)
    config = dataclasses.replace(config_of(gradient_checkpointing=False), memory=given)
    text, fits = planned_in_words(config, network, WORK, Budget(80 * GIB, PLENTY))
    assert fits and text.splitlines()[-1] == (
        "Not used, because memory is auto: activation_offload on, blocks_to_stream 20, gradient_checkpointing off. "
        "Set memory to manual to use them."
    )
    assert unused_in_words(config_of()) == ""
    assert unused_in_words(dataclasses.replace(config, memory=dataclasses.replace(given, memory="manual"))) == ""


def test_advice_is_the_three_that_save_most(network: NetworkSize) -> None:
    plan = plan_memory(config_of(gradient_checkpointing=False), network, WORK)
    first, *others = re.findall(r"([\w-]+ [\w-]+)(?: \([^)]+\))? saves ([\d.]+) GiB", memory_advice(plan, STEP))
    assert first[0] == "gradient_checkpointing on" and len(others) == 2
    assert [float(saved) for _, saved in others] == sorted((float(saved) for _, saved in others), reverse=True)
    saved = plan.device_peak_bytes - plan_memory(config_of(), network, WORK).device_peak_bytes
    assert float(first[1]) == pytest.approx(saved / GIB, abs=0.06)
    assert "resolution" in memory_advice(plan_memory(config_of(), network, WORK), VALIDATION)


def test_torch_runs_out_and_the_sentence_says_what_to_do(network: NetworkSize) -> None:
    plan = plan_memory(config_of(), network, WORK)

    def work() -> None:
        held = torch.ones(3)
        raise torch.OutOfMemoryError(f"CUDA out of memory {held.shape}")

    with (
        pytest.raises(OutOfMemoryError, match=r"Out of memory in step 7\. All is kept\. What helps most: ") as found,
        memory_errors_explained(lambda: plan, STEP, "in step 7", "All is kept."),
    ):
        work()
    cause = found.value.__cause__
    assert isinstance(cause, torch.OutOfMemoryError)
    frames = [frame for frame in iter_frames(cause) if "held" in frame.f_code.co_varnames]
    assert frames and "held" not in frames[0].f_locals, "the traceback still holds the failed work's tensors"


def test_what_other_settings_forbid_is_not_advised(network: NetworkSize) -> None:
    """Quantised activations need an 8-bit base model."""
    config = config_of(model=ModelConfig(base_model_precision="int8-quanto", quantize_activations=True))
    sized = dataclasses.replace(network, precision="int8-quanto")
    advice = memory_advice(plan_memory(config, sized, WORK), STEP)
    assert "What helps most: " in advice and "base_model_precision" not in advice
    with pytest.raises(OutOfMemoryError, match="still needs") as refused:
        choose_memory(config, sized, WORK, Budget(2 * GIB, PLENTY))
    assert "nf4-bnb" not in str(refused.value)


def test_out_of_memory_stays_that_where_no_advice_can_be_had() -> None:
    def plan_of() -> MemoryPlan:
        raise ModelFileError("The file is gone.")

    with (
        pytest.raises(OutOfMemoryError, match=r"^Out of memory in step 7\. All is kept\.$"),
        memory_errors_explained(plan_of, STEP, "in step 7", "All is kept."),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def iter_frames(error: BaseException):
    trace = error.__traceback__
    while trace:
        yield trace.tb_frame
        trace = trace.tb_next


@pytest.mark.parametrize(("place", "on_host", "on_device"), [("cpu", 1, 0), ("accelerator", 0, 1)])
def test_a_running_average_counts_where_it_lies(network: NetworkSize, place: str, on_host: int, on_device: int) -> None:
    plain = plan_memory(config_of(), network, WORK)
    averaged = plan_memory(config_of(ema=EmaConfig(use_ema=True, ema_device=place)), network, WORK)
    size = 4 * network.adapter_weights
    assert averaged.host_peak_bytes - plain.host_peak_bytes == on_host * size
    assert averaged.device_peak_bytes - plain.device_peak_bytes == on_device * size


@pytest.mark.parametrize("side", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("precision", ["none", "nf4-bnb"])
def test_no_run_is_refused_because_of_decoding(network: NetworkSize, precision: str, side: int) -> None:
    """Decoding in tiles needs less than a step or sampling, even where all weights are streamed."""
    pair = pair_size(Size(side, side), [Size(side, side)], 230)
    config = dataclasses.replace(config_of(), memory=MEMORY["stream=60"])
    sized = dataclasses.replace(network, precision=precision)
    plan = plan_memory(config, sized, Workload(train=pair, batch=1, validation=pair))
    decoding = plan.phase("decoding")
    assert decoding is not None
    assert decoding.total_bytes < max(each.total_bytes for each in plan.device if each is not decoding)


@pytest.mark.parametrize("memory", list(MEMORY))
def test_graphs_keep_the_memory_of_a_step_beside_ordinary_ones(network: NetworkSize, memory: str) -> None:
    config = dataclasses.replace(config_of(), memory=MEMORY[memory])
    plain, graphed = (plan_memory(config, network, WORK, graphs=each).phase("training") for each in (False, True))
    assert plain is not None and graphed is not None
    held = graphed.parts["CUDA graphs"]
    in_passes = ("kept by recomputed blocks", "activations", "backward pass", "latents and embeddings")
    needed = sum(graphed.parts[part] for part in in_passes)
    assert needed < held < needed + GIB
    assert graphed.parts["gradients"] == 4 * network.adapter_weights
    assert graphed.total_bytes >= plain.total_bytes + held
