"""How long a run takes, by arithmetic that is written out here once more, and what the sentence says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.support.narrow import planned_size
from trainer_core.config import (
    BatchingConfig,
    LoraConfig,
    MatmulPrecision,
    MemoryConfig,
    ModelConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.device import seconds_on_device
from trainer_core.geometry import Size
from trainer_core.planning import duration as planning_duration
from trainer_core.planning import probes
from trainer_core.planning.choose import Budget
from trainer_core.planning.duration import (
    Speed,
    duration,
    measured_speed,
    probed_speed,
    time_in_words,
    training_seconds,
)
from trainer_core.planning.network import NetworkSize
from trainer_core.planning.operations import training_operations
from trainer_core.planning.report import planned_in_words
from trainer_core.planning.workload import (
    ATTENTION,
    CONVOLUTION,
    LANGUAGE_MODEL,
    VISION_TOWER,
    EncodingWork,
    Workload,
    pair_size,
)
from trainer_core.training.validation_work import Passes

TEXT = 230
LARGE, SMALL = Size(1024, 1024), Size(512, 512)
PAIR = pair_size(LARGE, [LARGE], TEXT)
SIZES = (Passes(8192, TEXT, 6), Passes(2048, TEXT, 2))
WORK = Workload(train=PAIR, batch=1, validation=PAIR, training=SIZES)
SHOWN = dataclasses.replace(WORK, held_out=(Passes(8192, TEXT, 3),), pictures=(Passes(8192, TEXT, 2),))
WIDTH, BLOCKS = 3072, 60


def network_of(precision: str = "int8-quanto") -> NetworkSize:
    return planned_size({"num_layers": BLOCKS}, ModelConfig(base_model_precision=precision), LoraConfig())


@pytest.fixture(scope="module")
def network() -> NetworkSize:
    """Qwen-Image at its full size, in int8."""
    return network_of()


def config_of(**changes: object) -> TrainConfig:
    given: dict[str, object] = {"memory": MemoryConfig(memory="manual", compile_blocks="on"), "max_train_steps": 1000}
    return TrainConfig(run_dir="run", encoded="data", **{**given, **changes})


def forward_operations(tokens: int) -> int:
    return BLOCKS * (2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH)


def seconds_of(text: str) -> float:
    """The duration that a text such as "3 h 10 min" or "4.9 s" names, in seconds."""
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (h|min|s)\b", text))


def test_a_steps_operations_are_those_of_its_matrix_products() -> None:
    """Counted by torch on a narrow block: forward, gradients of the inputs, and a second forward if recomputed."""
    from torch.utils.flop_counter import FlopCounterMode

    width, heads, tokens = 256, 4, 96
    linears = [torch.nn.Linear(width, width * wide, bias=False).requires_grad_(False) for wide in (3, 1, 4)]
    back = torch.nn.Linear(4 * width, width, bias=False).requires_grad_(False)

    def block(x: torch.Tensor, *, again: bool = False) -> torch.Tensor:
        q, k, v = (part.view(1, tokens, heads, -1).transpose(1, 2) for part in linears[0](x).chunk(3, dim=-1))
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        inner = linears[2](linears[1](attended.transpose(1, 2).reshape(1, tokens, width)))
        return inner if again else back(inner)

    x = torch.randn(1, tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        block(x).sum().backward()
    assert counted.get_total_flops() == training_operations(width, tokens, num_blocks=1, recomputed=0)
    with FlopCounterMode(display=False) as again, torch.no_grad():
        block(x, again=True)
    recomputed = training_operations(width, tokens, 1, 1, attention_again=True)
    assert again.get_total_flops() == recomputed - training_operations(width, tokens, 1, 0)
    attention = recomputed - training_operations(width, tokens, 1, 1)
    assert attention == 2 * 2 * tokens**2 * width


def test_the_measured_micro_batch_takes_what_was_measured(network: NetworkSize) -> None:
    pairs = dataclasses.replace(WORK, batch=2)
    speed = measured_speed(config_of(), network, pairs, 3.0)
    assert 2 * training_seconds(config_of(), network, speed, 8192 + TEXT) == pytest.approx(3.0)


def test_a_step_is_the_mean_of_all_sizes(network: NetworkSize) -> None:
    config = config_of(batching=BatchingConfig(gradient_accumulation_steps=4))
    speed = measured_speed(config, network, WORK, 1.2)
    ratio = training_operations(WIDTH, 2048 + TEXT, BLOCKS, BLOCKS) / training_operations(
        WIDTH, 8192 + TEXT, BLOCKS, BLOCKS
    )
    whole = duration(config, network, WORK, speed)
    assert whole.step == pytest.approx(4 * 1.2 * (6 + 2 * ratio) / 8)
    assert (whole.steps, whole.previews, whole.total) == (1000, 0, pytest.approx(1000 * whole.step))
    batched = dataclasses.replace(config, batching=BatchingConfig(train_batch_size=4, gradient_accumulation_steps=1))
    pairs = dataclasses.replace(WORK, batch=4)
    speed = measured_speed(batched, network, pairs, 4.8)  # 6 + 2 pairs are 2 micro-batches
    assert duration(batched, network, pairs, speed).step == pytest.approx(1.2 * (6 + 2 * ratio) / 2)


def test_previews_are_the_forward_passes_of_all_validations(network: NetworkSize) -> None:
    validation = ValidationConfig(validation_step_interval=250, validation_num_inference_steps=30)
    config = config_of(validation=dataclasses.replace(validation, strength_sweep="none"))
    speed = measured_speed(config, network, SHOWN, 1.2)
    rate = training_operations(WIDTH, 8192 + TEXT, BLOCKS, BLOCKS) / 1.2
    drawing = 2 * 30 * 2  # pictures, steps, guidance
    whole = duration(config, network, SHOWN, speed)
    assert (whole.times, whole.pictures) == (4, 2)
    passes = drawing + 4 * (drawing + 3 * 4)  # the base model's pictures once; losses of 3 pairs at 4 noise levels
    assert whole.previews == pytest.approx(passes * forward_operations(8192 + TEXT) / rate)
    for sweep, more in (("auto", 0), ("pictures", 6 * drawing)):  # so many passes are only drawn if asked for
        compared = config_of(validation=dataclasses.replace(validation, strength_sweep=sweep))
        found = duration(compared, network, SHOWN, speed).previews
        assert found == pytest.approx((passes + more) * forward_operations(8192 + TEXT) / rate)
    later = duration(config, network, SHOWN, speed, done=750)
    assert (later.steps, later.times) == (250, 1)
    assert later.previews == pytest.approx((drawing + 3 * 4) * forward_operations(8192 + TEXT) / rate)


def test_rollouts_add_their_expected_forward_passes(network: NetworkSize) -> None:
    rollout = RolloutConfig(scheduled_sampling_max_step_offset=8, scheduled_sampling_probability=0.5)
    rate = Speed(product=1e-15, attention=1e-15, attention_backward=1e-15)
    one = dataclasses.replace(WORK, training=SIZES[:1])
    config = config_of(batching=BatchingConfig(gradient_accumulation_steps=1))
    plain, rolled = (duration(dataclasses.replace(config, rollout=each), network, one, rate).step
                     for each in (RolloutConfig(), rollout))  # fmt: skip
    assert rolled - plain == pytest.approx(0.5 * 8 / 2 * forward_operations(8192 + TEXT) * 1e-15)


def test_a_step_waits_for_the_slowest_of_arithmetic_launches_and_copies(network: NetworkSize) -> None:
    streamed = config_of(memory=MemoryConfig(memory="manual", blocks_to_stream=30))
    tokens, fast = 2048 + TEXT, Speed(product=1e-18, attention=1e-18, attention_backward=1e-18)
    launched = dataclasses.replace(fast, launch=2e-3)
    assert training_seconds(streamed, network, launched, tokens) == pytest.approx(180 * 2e-3)  # 60 blocks, 3 passes
    copied = dataclasses.replace(launched, copy=1 / 10e9)
    copies = 2 * 30 * network.block_bytes / 10e9  # these run beside 0.6 of the computation
    assert training_seconds(streamed, network, copied, tokens) == pytest.approx(copies / 0.6)


@pytest.mark.parametrize("bound", [{"launch": 2e-3}, {"copy": 1 / 10e9}], ids=str)
def test_pairs_of_a_micro_batch_share_launches_and_copies_of_weights(
    bound: dict[str, float], network: NetworkSize
) -> None:
    speed = Speed(product=1e-18, attention=1e-18, attention_backward=1e-18, **bound)
    memory = MemoryConfig(memory="manual", blocks_to_stream=30)

    def step(size: int) -> float:
        config = config_of(memory=memory, batching=BatchingConfig(train_batch_size=size))
        pairs = dataclasses.replace(WORK, batch=size, training=(dataclasses.replace(SIZES[0], count=8),))
        return duration(config, network, pairs, speed).step

    assert step(1) > 0 and step(4) == pytest.approx(step(1))


def test_the_sentence_adds_up(network: NetworkSize) -> None:
    config = config_of()
    speed = measured_speed(config, network, SHOWN, 1.2)
    text = time_in_words(config, network, SHOWN, speed)
    told = re.fullmatch(
        r"About (.+): 1,000 steps of (.+), previews (.+) \(4 times 2 pictures\)\. Half the time: .*",
        text,
    )
    assert told is not None, text
    total, step, previews = map(seconds_of, told.groups())
    assert total == pytest.approx(1000 * step + previews, rel=0.02)
    estimate = dataclasses.replace(speed, is_estimate=True, vae=2.0, text_encoder=0.5)
    assert ", estimated: 1,000 steps" in time_in_words(config, network, SHOWN, estimate)
    before = dataclasses.replace(SHOWN, encoding=EncodingWork(vae=200, text_encoder=400))
    assert "(4 times 2 pictures), encoding 10 min. " in time_in_words(config, network, before, estimate)
    added = duration(config, network, before, estimate).total - duration(config, network, SHOWN, estimate).total
    assert added == pytest.approx(600)


def test_changes_are_computed_and_only_the_halving_are_called_that(network: NetworkSize) -> None:
    config = config_of(batching=BatchingConfig(gradient_accumulation_steps=2))
    one = dataclasses.replace(WORK, training=SIZES[:1])
    speed = measured_speed(config, network, one, 1.2)
    text = time_in_words(config, network, one, speed)
    smaller_pictures = r"resolution 768 with match_target_res \(\d+ min\)"
    assert re.search(rf"Half the time: {smaller_pictures} or gradient_accumulation_steps 1 \(20 min\)\.$", text)
    smaller = 4608 + TEXT
    expected = (
        40 * training_operations(WIDTH, smaller, BLOCKS, BLOCKS) / training_operations(WIDTH, 8422, BLOCKS, BLOCKS)
    )
    assert seconds_of(text.split("match_target_res (")[1].split(")")[0]) == pytest.approx(60 * expected, abs=31)
    single = dataclasses.replace(config, batching=BatchingConfig(gradient_accumulation_steps=1))
    at_512 = pair_size(SMALL, [SMALL], TEXT)
    low = Workload(train=at_512, batch=1, training=(Passes(2048, TEXT, 1),))
    compiled = time_in_words(single, network, low, measured_speed(single, network, low, 0.4))
    assert compiled == "About 7 min: 1,000 steps of 0.40 s."


def test_references_that_are_larger_than_the_target_are_named(network: NetworkSize) -> None:
    pair = pair_size(SMALL, [LARGE], TEXT)
    work = Workload(train=pair, batch=1, training=(Passes(pair.image_tokens, TEXT, 4),))
    speed = measured_speed(config_of(), network, work, 1.0)
    assert "Half the time: match_target_res on (" in time_in_words(config_of(), network, work, speed)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0421, "0.04 s"), (4.94, "4.9 s"), (59.6, "60 s"), (100, "2 min"), (3599, "1 h 0 min"), (11400, "3 h 10 min")],
)
def test_durations_in_words(network: NetworkSize, seconds: float, words: str) -> None:
    config = config_of(max_train_steps=1, batching=BatchingConfig(gradient_accumulation_steps=1))
    one = dataclasses.replace(WORK, training=SIZES[:1])
    assert f"1 step of {words}" in time_in_words(config, network, one, measured_speed(config, network, one, seconds))


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, rates: list[float] | None = None) -> None:
    """Makes the measurement of a CUDA device run on the CPU, or give these rates."""
    original = planning_duration.rates
    monkeypatch.setattr(planning_duration, "eight_bit_rate", lambda *_: None)
    monkeypatch.setattr(planning_duration, "allocator_allows_graphs", lambda: True)
    monkeypatch.setattr(probes, "seconds_on_device", lambda _, call: float(call() is not None))
    monkeypatch.setattr(
        planning_duration, "rates", lambda network, tokens, _: rates or original(network, tokens, torch.device("cpu"))
    )


@pytest.mark.parametrize("has_triton", [True, False])
def test_an_estimate_is_what_was_measured_by_the_efficiency(
    network: NetworkSize, has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_cpu(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(planning_duration, "can_compile", lambda _: has_triton)
    speeds = {}
    for wish in ("on", "off", "auto"):
        config = config_of(memory=MemoryConfig(memory="manual", compile_blocks=wish))
        speed = probed_speed(config, network, SHOWN, torch.device("cuda"))
        assert speed is not None and speed.is_estimate and speed.copy == 4.0
        assert speed.product > 1, "the device's measured speed is not reached"
        assert (speed.attention, speed.attention_backward) == pytest.approx((2 * speed.product, 3 * speed.product))
        speeds[wish] = speed
    assert speeds["on"].product < speeds["off"].product and speeds["on"].launch < speeds["off"].launch
    assert speeds["auto"] == speeds["on" if has_triton else "off"]
    assert speeds["on"].vae == speeds["off"].vae and speeds["on"].text_encoder == speeds["off"].text_encoder


def test_steps_launch_their_kernels_where_they_cannot_be_graphs(
    network: NetworkSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 blocks at 512 pixels took 0.34 to 0.64 s on an H200 that waited for its processor."""
    on_the_cpu(monkeypatch, [1 / 790e12] * 4)
    monkeypatch.setattr(planning_duration, "allocator_allows_graphs", lambda: False)
    speed = probed_speed(config_of(), network, SHOWN, torch.device("cuda"))
    assert speed is not None
    assert 0.34 < training_seconds(config_of(), network, speed, 2278) < 0.64


def test_encoding_takes_what_it_took_on_an_h200(network: NetworkSize, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix products reached 790 TFLOP/s. Eighteen pictures took 1.3 s; 48 prompts with a picture each, 3.3 s."""
    on_the_cpu(monkeypatch, [1 / 790e12] * 4)
    speed = probed_speed(config_of(), network, SHOWN, torch.device("cuda"))
    assert speed is not None
    pixels = 1024 * 1024
    for work, seconds in (
        (EncodingWork(vae=18 * (CONVOLUTION * pixels + ATTENTION * pixels**2)), 1.3),
        (EncodingWork(text_encoder=48 * (VISION_TOWER * 196 + LANGUAGE_MODEL * 279)), 3.3),
    ):
        found = duration(config_of(), network, dataclasses.replace(WORK, encoding=work), speed).encoding
        assert found == pytest.approx(seconds, rel=0.02)


def test_the_device_is_measured_in_the_mode_in_which_comfyui_runs_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference mode, in which attention has no backward pass."""
    on_the_cpu(monkeypatch)
    narrow = planned_size({"num_layers": 2, "num_attention_heads": 2}, ModelConfig(), LoraConfig())
    low = Workload(train=pair_size(Size(64, 64), [], 8), batch=1)
    with torch.inference_mode():
        speed = probed_speed(config_of(), narrow, low, torch.device("cuda"))
    assert speed is not None and speed.attention_backward > 0


def test_the_card_that_computes_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the current one, which is cuda:0 also for a run on cuda:1. It waits until the call is enqueued."""
    current, done = ["cuda:0"], []

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None:
            done.append(f"event on {current[-1]}")

        def synchronize(self) -> None: ...

        def elapsed_time(self, _: Event) -> float:
            return 2000.0

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"{current[-1]} waits"))
    assert seconds_on_device(torch.device("cuda:1"), lambda: done.append("call"), times=3) == 2.0
    assert done == 5 * ["cuda:1 waits", "event on cuda:1", "call", "event on cuda:1"]


@pytest.mark.parametrize(
    ("wish", "fast", "product", "exact"),
    [("auto", 0.5, 0.5, 1.0), ("auto", 2.0, 1.0, 0.0), ("8bit", 2.0, 2.0, 1.0), ("auto", None, 1.0, 0.0)],
)
def test_products_take_what_the_run_will_choose_and_previews_are_exact(
    network: NetworkSize,
    wish: MatmulPrecision,
    fast: float | None,
    product: float,
    exact: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(model=ModelConfig(base_model_precision="int8-quanto", matmul_precision=wish))
    on_the_cpu(monkeypatch, [1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(planning_duration, "eight_bit_rate", lambda *_: fast)
    speed = probed_speed(config, network, SHOWN, torch.device("cuda"))
    assert speed is not None
    assert speed.product / speed.attention == pytest.approx(product)
    assert speed.exact_product / speed.attention == pytest.approx(exact)
    plain = dataclasses.replace(speed, product=speed.attention, exact_product=0.0)
    found, alike = (duration(config, network, SHOWN, each) for each in (speed, plain))
    assert found.previews == alike.previews > 0 and (found.step < alike.step) == (product < 1)
    measured = measured_speed(config, network, SHOWN, 2.0, speed)
    assert measured.exact_product == pytest.approx(measured.product * exact / product)


def test_both_8_bit_products_of_a_layer_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []

    def timed(_: torch.device, call: Callable[[], torch.Tensor]) -> float:
        results.append(call().shape)
        return 3.0

    monkeypatch.setattr(probes, "seconds_on_device", timed)
    model, cpu = ModelConfig(base_model_precision="int8-quanto"), torch.device("cpu")
    size = planned_size({"num_layers": 2, "num_attention_heads": 2}, model, LoraConfig())
    assert probes.eight_bit_rate(model, size, 50, cpu) == pytest.approx(6.0 / (4 * 50 * size.width * 4 * size.width))
    assert results == [(50, 4 * size.width), (50, size.width)]
    assert probes.eight_bit_rate(dataclasses.replace(model, matmul_precision="bf16"), size, 50, cpu) is None
    assert probes.eight_bit_rate(model, dataclasses.replace(size, precision="none"), 50, cpu) is None
    assert probes.eight_bit_rate(model, size, 50, torch.device("mps")) is None


def test_a_card_that_is_full_is_not_measured(network: NetworkSize, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(planning_duration, "rates", full)
    assert probed_speed(config_of(), network, SHOWN, torch.device("cuda")) is None


def test_nothing_is_said_of_seconds_without_cuda(network: NetworkSize) -> None:
    cpu = torch.device("cpu")
    assert probed_speed(config_of(), network, SHOWN, cpu) is None
    text, fits = planned_in_words(config_of(), network, SHOWN, Budget(2**40, 2**40), cpu)
    assert fits and "About" not in text
