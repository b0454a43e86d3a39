"""How long a run takes: steps, previews and encoding, from a measured step or a short measurement of the device."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..config import RolloutConfig, TrainConfig
from ..memory.compilation import can_compile
from ..memory.placement import recomputed_blocks
from ..memory.step_graphs import allocator_allows_graphs
from ..text import counted
from ..training.rollout import rollout_probability
from ..training.validation_work import Passes, validation_work
from .network import NetworkSize
from .operations import LINEAR_AGAIN, block_operations, training_operations
from .probes import eight_bit_rate, rates
from .workload import Workload, picture_tokens, resolution_in_words

# Fitted to steps on an H200 at 1024 and 512 pixels with one reference. Uncompiled, then compiled:
_EFFICIENCY = (0.72, 0.79)  # fraction of the device's measured speed that a step reaches
_LAUNCH = (1.2e-3, 1.0e-3)  # seconds that one block's forward or backward pass takes at least, with CUDA graphs
_LAUNCHED_SINGLY = 2.4e-3  # the same without: the processor's time, compiled or not
# Fraction of the measured speed of a matrix product that encoding reaches. Fitted to 18 pictures of 1024 x 1024 pixels
# in 1.3 s, and to 48 short prompts, each with a reference of 384 x 384 pixels, in 3.3 s: on an H200, without loading.
# There the text encoder is far from the card's limit, so estimates for slower cards are probably too long. Streaming
# its layers took a third to twice as long and is left out.
_VAE, _TEXT_ENCODER = 0.050, 0.086
_OVERLAP = 0.6  # fraction of a step's time during which copies overlap with computation and cost nothing
_SIDES = (1024, 768, 512)
_HALF = 0.55  # a change that leaves at most this fraction of the time is said to halve it
_MANY = 50  # steps of which rollouts are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds per floating point operation: of matrix products, of attention forward and backward, and of encoding with
    the VAE and the text encoder (0 if unknown). `exact_product`: of products without 8-bit numbers, which previews
    have; 0 if all are alike. `launch`: seconds that one pass of a block takes at least. `copy`: seconds per
    byte from host to device memory."""

    product: float
    attention: float
    attention_backward: float
    exact_product: float = 0.0
    vae: float = 0.0
    text_encoder: float = 0.0
    launch: float = 0.0
    copy: float = 0.0
    is_estimate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """What remains of a run, in seconds: `steps` steps of `step` seconds, `previews` for `times` validations of
    `pictures` pictures each, and `encoding` for what the cache lacks."""

    step: float
    steps: int
    previews: float
    times: int
    pictures: int
    encoding: float = 0.0
    is_estimate: bool = False

    @property
    def total(self) -> float:
        """Seconds until the end of the run."""
        return self.step * self.steps + self.previews + self.encoding


def measured_speed(
    config: TrainConfig, network: NetworkSize, work: Workload, seconds: float, probed: Speed | None = None
) -> Speed:
    """The speed at which the largest micro-batch takes so many seconds, forward and backward.

    `probed`: an estimate that tells how much longer exact products take.
    """
    tokens, again = work.tokens, _recomputed(config, network)
    operations = training_operations(
        network.width,
        tokens.image + tokens.text,
        network.num_blocks,
        again,
        attention_again=config.memory.recompute_attention,
    )
    each = seconds / (tokens.batch * operations)
    exact = each * probed.exact_product / probed.product if probed else 0.0
    return Speed(product=each, attention=each, attention_backward=each, exact_product=exact)


@torch.inference_mode(mode=False)  # ComfyUI runs nodes in that mode
@torch.enable_grad()
def probed_speed(config: TrainConfig, network: NetworkSize, work: Workload, device: torch.device) -> Speed | None:
    """An estimate from a matrix product, attention and a copy of this run's sizes, which take a fraction of a second.

    None on other devices than CUDA, and if memory is too short for it.
    """
    if device.type != "cuda":
        return None
    try:
        product, forward, backward, copy = rates(network, work.tokens.image + work.tokens.text, device)
        fast = eight_bit_rate(config.model, network, work.tokens.image, device)
    except torch.OutOfMemoryError:
        return None
    wish = config.memory.compile_blocks
    compiled = wish == "on" or (wish == "auto" and can_compile(device))
    efficiency = _EFFICIENCY[compiled]
    in_8_bits = fast is not None and (fast < product or config.model.matmul_precision == "8bit")
    return Speed(
        product=(fast if in_8_bits and fast else product) / efficiency,
        exact_product=product / efficiency if in_8_bits else 0.0,
        attention=forward / efficiency,
        attention_backward=backward / efficiency,
        vae=product / _VAE,
        text_encoder=product / _TEXT_ENCODER,
        launch=_LAUNCH[compiled] if allocator_allows_graphs() else _LAUNCHED_SINGLY,
        copy=copy,
        is_estimate=True,
    )


def compiled_seconds(config: TrainConfig, network: NetworkSize, work: Workload, device: torch.device) -> float | None:
    """An estimate of the seconds of the largest micro-batch with compiled blocks, forward and backward.

    None where `probed_speed` is None.
    """
    compiled = dataclasses.replace(config, memory=dataclasses.replace(config.memory, compile_blocks="on"))
    speed, tokens = probed_speed(compiled, network, work, device), work.tokens
    if speed is None:
        return None
    return tokens.batch * training_seconds(compiled, network, speed, tokens.image + tokens.text, tokens.batch)


def _recomputed(config: TrainConfig, network: NetworkSize) -> int:
    return recomputed_blocks(config.memory, network.num_blocks, checkpointing=config.gradient_checkpointing)


def training_seconds(
    config: TrainConfig, network: NetworkSize, speed: Speed, tokens: int, together: float = 1
) -> float:
    """Seconds of a forward and backward pass for each of the pairs that are `together` in a micro-batch.

    They share the copies of streamed weights and the launches of kernels.
    """
    linear, attention = block_operations(network.width, tokens)
    again, blocks = _recomputed(config, network), network.num_blocks
    forward = linear * speed.product + attention * speed.attention
    backward = linear * speed.product + 2 * attention * speed.attention_backward
    copied = 2 * (_streamed_bytes(config, network) / together + _offloaded_bytes(config, network, tokens)) * speed.copy
    launched = (2 * blocks + again) * speed.launch / together
    second = LINEAR_AGAIN * linear * speed.product + config.memory.recompute_attention * attention * speed.attention
    return max(blocks * (forward + backward) + again * second, launched, copied / _OVERLAP)


def forward_seconds(
    config: TrainConfig, network: NetworkSize, speed: Speed, tokens: int, *, is_preview: bool = False
) -> float:
    """Seconds of a forward pass of one pair without gradients. Previews have exact products."""
    linear, attention = block_operations(network.width, tokens)
    product = (speed.exact_product if is_preview else 0) or speed.product
    each = max(linear * product + attention * speed.attention, speed.launch)
    return max(network.num_blocks * each, _streamed_bytes(config, network) * speed.copy)


def _offloaded_bytes(config: TrainConfig, network: NetworkSize, tokens: int) -> int:
    if not config.memory.activation_offload:
        return 0
    kept = 1 if config.memory.recompute_attention else 2  # widths per token: the input, and attention's output
    return _recomputed(config, network) * kept * tokens * network.width * network.element_bytes


def _streamed_bytes(config: TrainConfig, network: NetworkSize) -> int:
    return min(config.memory.blocks_to_stream, network.num_blocks) * network.block_bytes


def duration(config: TrainConfig, network: NetworkSize, work: Workload, speed: Speed, *, done: int = 0) -> Duration:
    """What remains of a run after step `done`."""
    return _duration(config, network, work, speed, done=done, end=config.max_train_steps)


def until_first_pictures(
    config: TrainConfig, network: NetworkSize, work: Workload, speed: Speed, *, done: int = 0
) -> float | None:
    """Seconds until the first validation after step `done` has made its pictures; None if none is left or makes any."""
    interval = config.validation.validation_step_interval or config.max_train_steps
    end = min(done - done % interval + interval, config.max_train_steps)
    found = _duration(config, network, work, speed, done=done, end=end)
    return found.total if found.times and found.pictures else None


def _duration(
    config: TrainConfig, network: NetworkSize, work: Workload, speed: Speed, *, done: int, end: int
) -> Duration:
    """What remains of a run after step `done` if it ends with step `end`."""
    validation = validation_work(
        config.validation,
        config.ema,
        max_train_steps=end,
        held_out=work.held_out,
        pictures=work.pictures,
        done=done,
    )
    previews = sum(
        each.count * forward_seconds(config, network, speed, each.image + each.text, is_preview=True)
        for each in validation.total
    )
    return Duration(
        step=config.batching.gradient_accumulation_steps * _micro_batch(config, network, work, speed),
        steps=max(0, end - done),
        previews=previews,
        times=validation.times,
        pictures=sum(each.count for each in work.pictures),
        encoding=work.encoding.vae * speed.vae + work.encoding.text_encoder * speed.text_encoder,
        is_estimate=speed.is_estimate,
    )


def _micro_batch(config: TrainConfig, network: NetworkSize, work: Workload, speed: Speed) -> float:
    """Mean seconds of a micro-batch, from an epoch's pairs of all sizes."""
    largest = Passes(work.train.image_tokens, work.train.text_tokens, 1)
    forwards, together = _rollout_forwards(config.rollout, config.max_train_steps), config.batching.train_batch_size
    forwards += work.regularised + (1 - work.regularised) * config.preservation.preservation_probability
    seconds, turns = 0.0, 0
    for pairs in work.training or (largest,):
        tokens = pairs.image + pairs.text
        each = training_seconds(config, network, speed, tokens, together)
        each += forwards * forward_seconds(config, network, speed, tokens) if forwards else 0
        seconds += pairs.count * each
        turns += pairs.count
    return together * seconds / turns


def _rollout_forwards(rollout: RolloutConfig, max_train_steps: int) -> float:
    """Expected forward passes of a pair's rollout, as the mean over the run."""
    if not rollout.scheduled_sampling_max_step_offset:
        return 0.0
    steps = range(0, max_train_steps, -(-max_train_steps // _MANY))
    probability = statistics.fmean(rollout_probability(step, rollout) for step in steps)
    share = {"uniform": 1 / 2, "biased_early": 1 / 3, "biased_late": 2 / 3}[rollout.scheduled_sampling_strategy]
    passes = 4 if rollout.scheduled_sampling_sampler == "rk4" else 1
    return probability * share * rollout.scheduled_sampling_max_step_offset * passes


def time_in_words(config: TrainConfig, network: NetworkSize, work: Workload, speed: Speed, *, done: int = 0) -> str:
    """How long the run still takes, and which change of one setting would halve that or saves most. Two sentences."""
    whole = duration(config, network, work, speed, done=done)
    changes = [(words, duration(*run, done=done).total) for words, run in _changes(config, network, work, speed)]
    return " ".join(filter(None, (_told(whole), _advice(whole.total, changes))))


def _told(whole: Duration) -> str:
    parts = [f"{counted(whole.steps, 'step')} of {in_words(whole.step)}"]
    if whole.previews:
        pictures = f"{counted(whole.times, 'time')} {counted(whole.pictures, 'picture')}"
        parts.append(f"previews {in_words(whole.previews)} ({pictures})")
    if whole.encoding:
        parts.append(f"encoding {in_words(whole.encoding)}")
    return f"About {in_words(whole.total)}{', estimated' if whole.is_estimate else ''}: {', '.join(parts)}."


def _advice(total: float, changes: Sequence[tuple[str, float]]) -> str:
    """Up to two changes that halve the time; else the one that saves most, if it saves a tenth."""
    halving = [each for each in changes if each[1] <= _HALF * total][:2]
    if halving:
        return "Half the time: " + " or ".join(f"{words} ({in_words(seconds)})" for words, seconds in halving) + "."
    words, seconds = min(changes, key=lambda each: each[1], default=("", total))
    return f"What saves most: {words} ({in_words(seconds)})." if seconds < 0.9 * total else ""


_Run = tuple[TrainConfig, NetworkSize, Workload, Speed]


def _changes(config: TrainConfig, network: NetworkSize, work: Workload, speed: Speed) -> Iterator[tuple[str, _Run]]:
    """Changes of one setting that save time, with the run that has them. Those that cost least quality come first."""

    def validated(name: str, value: int) -> tuple[str, _Run]:
        validation = dataclasses.replace(config.validation, **{name: value})
        return f"{name} {value}", (dataclasses.replace(config, validation=validation), network, work, speed)

    if work.pictures:
        if interval := config.validation.validation_step_interval:
            yield validated("validation_step_interval", 2 * interval)
        yield validated("validation_num_inference_steps", max(1, config.validation.validation_num_inference_steps // 2))
    pair = work.train
    matched = picture_tokens(pair.target) * (1 + pair.references)
    if matched < 0.9 * pair.image_tokens:
        yield "match_target_res on", (config, network, _scaled(work, matched / pair.image_tokens), speed)
    pixels = pair.target.width * pair.target.height
    if side := next((side for side in _SIDES if side**2 < 0.9 * pixels), 0):
        yield resolution_in_words(side, work), (config, network, _scaled(work, side**2 / pixels), speed)
    if (count := config.batching.gradient_accumulation_steps) > 1:
        batching = dataclasses.replace(config.batching, gradient_accumulation_steps=count // 2)
        yield (
            f"gradient_accumulation_steps {count // 2}",
            (dataclasses.replace(config, batching=batching), network, work, speed),
        )


def _scaled(work: Workload, factor: float) -> Workload:
    """The work with so many times the picture tokens."""

    def scaled(passes: Sequence[Passes]) -> tuple[Passes, ...]:
        return tuple(dataclasses.replace(each, image=round(each.image * factor)) for each in passes)

    train = dataclasses.replace(work.train, image_tokens=round(work.train.image_tokens * factor))
    return dataclasses.replace(
        work,
        train=train,
        training=scaled(work.training),
        held_out=scaled(work.held_out),
        pictures=scaled(work.pictures),
    )


def in_words(seconds: float) -> str:
    """Seconds as "0.42 s", "4.9 s", "50 s", "22 min" or "3 h 10 min"."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
