"""A step of the largest pairs before the first one: tests the memory, measures the time, and decides what makes steps
faster: compiled blocks and CUDA graphs."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .conditioning.batches import BatchLoader
from .config import MatmulPrecision, MemoryConfig, TrainConfig
from .device import peak_bytes
from .events import SILENT, Observer
from .memory.compilation import can_compile, start_compiler
from .memory.step_graphs import allocator_allows_graphs
from .planning.advice import STEP
from .planning.choose import budget_of
from .planning.duration import compiled_seconds, duration, in_words, measured_speed, probed_speed, time_in_words
from .planning.plan import GIB, plan_memory
from .planning.preparation import Preparation
from .planning.workload import largest_draws
from .training.step import Networks, attempt, rehearse

_LOG = logging.getLogger(__name__)
# Measured on an H200 with the full-size transformer (benchmarks/gpu_step_h200_2026-11.md): compiling takes 15 to 53 s,
# longer on a slower processor. It saves 0.08 of a step's time at 1024 pixels, and 0.21 at 512, with CUDA graphs.
_COMPILING_SECONDS, _LEAST_SAVED = 60, 0.08
# Capturing takes about as long as five steps, once for each size of pictures and prompts.
_CAPTURING_SECONDS, _LEAST_FASTER = 60, 0.95  # the shortest run that it is tried in; and the time of a step, relatively
_ALL_LAUNCHED = 0.97  # share of a step's time
_FASTER = (
    "Steps wait for the processor. Start ComfyUI with --disable-cuda-malloc to make them faster: CUDA graphs need it."
)
_WRONG = 0.5  # relative error of gradients that compiled blocks and CUDA graphs must not have
_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


class Measured(NamedTuple):
    """A micro-batch forward and backward: its seconds, its peak of device memory in bytes, the adapter's gradients in
    one block, and the seconds until the processor had launched all kernels."""

    seconds: float
    peak_bytes: int
    gradients: dict[str, Tensor]
    launched: float = 0.0


def start_compiler_early(prepared: Preparation, device: torch.device, done: int) -> None:
    """Start the compiler's processes if the blocks will probably be compiled, so that they are ready after loading.

    `done`: the number of finished steps.
    """
    wish = prepared.config.memory.compile_blocks
    if wish == "off" or not can_compile(device):
        return
    if wish == "on" or _expected_saving(prepared, device, done) >= _COMPILING_SECONDS:
        start_compiler()


def _expected_saving(prepared: Preparation, device: torch.device, done: int) -> float:
    """An estimate of the seconds that compiled blocks save in the steps after `done`; 0 if there is none."""
    totals = []
    for compiled in ("off", "on"):
        memory = dataclasses.replace(prepared.config.memory, compile_blocks=compiled)
        run = dataclasses.replace(prepared.config, memory=memory), prepared.model.size, prepared.work
        speed = probed_speed(*run, device)
        totals.append(duration(*run, speed, done=done).total if speed else 0.0)
    return totals[0] - totals[1]


def dry_step(
    prepared: Preparation,
    networks: Networks,
    loader: BatchLoader,
    done: int,
    observer: Observer = SILENT,
    products: MatmulPrecision = "auto",
) -> None:
    """On CUDA, run the largest micro-batch forward and backward, so that too little memory shows up at once.

    Tries CUDA graphs if they fit beside ordinary steps. Then compiles the blocks if `compile_blocks` says so; `auto`
    compiles if that takes less time than it saves in the steps after `done`, and keeps compiled blocks only if they fit
    into memory and are faster. Logs the memory, and tells the observer how long the run takes. `products`: the run's
    choice, for the estimates.

    Raises:
        OutOfMemoryError: the memory does not suffice.
    """
    if networks.device.type != "cuda":
        return
    config = prepared.config
    chosen = dataclasses.replace(config, model=dataclasses.replace(config.model, matmul_precision=products))
    run = (chosen, prepared.model.size, prepared.work)
    measure = partial(_measured, prepared, networks, loader)
    measured, wish = measure(), config.memory.compile_blocks
    left = duration(*run, measured_speed(*run, measured.seconds), done=done).total
    if left >= _CAPTURING_SECONDS and not observer.should_stop():
        if reason := no_graphs_because(prepared, networks.device):
            _LOG.info("Steps run without CUDA graphs, because %s.", reason)
        else:
            measured = _graphs_if_faster(networks, measure, measured)
    if wish != "off" and not observer.should_stop():
        left = duration(*run, measured_speed(*run, measured.seconds), done=done).total
        saved = left * _saved_share(compiled_seconds(*run, networks.device), measured.seconds)
        if wish == "on" or _pays(networks.device, left, saved):
            observer.on_progress("Compiling the transformer's blocks", 0, 1)
            measured = _compiled_if_right(networks, measure, measured, config)
    _log_memory(prepared, networks, measured.peak_bytes + networks.graphs.held_bytes)
    torch.cuda.empty_cache()  # gives back what only compiling, or only uncompiled blocks, needed
    speed = measured_speed(*run, measured.seconds, probed_speed(*run, networks.device))
    is_long = left >= _CAPTURING_SECONDS
    advice = f" {_FASTER}" if is_long and _would_gain_from_graphs(prepared, networks.device, measured) else ""
    observer.on_note(time_in_words(*run, speed, done=done) + advice)


def _measured(prepared: Preparation, networks: Networks, loader: BatchLoader) -> Measured:
    """The largest micro-batch forward and backward, after passes that may be slower."""
    draws = largest_draws(prepared.encoded, prepared.work)

    def one() -> tuple[dict[str, Tensor], float]:
        gradients = attempt(networks, lambda: rehearse(networks, loader.read(draws), prepared.config))
        launched = time.perf_counter()
        torch.cuda.synchronize(networks.device)
        return gradients, launched

    with prepared.explain_memory_errors(STEP, "in a dry step of the largest pairs", "Nothing is lost."):
        # Slower than the next: libraries choose their kernels, or the blocks are compiled.
        gradients = of_first_block(one()[0])
        if networks.graphs.is_active:
            one()  # captures
        torch.cuda.reset_peak_memory_stats(networks.device)
        began = time.perf_counter()
        _, launched = one()
        seconds = time.perf_counter() - began
        return Measured(seconds, peak_bytes(networks.device), gradients, launched - began)


def _would_gain_from_graphs(prepared: Preparation, device: torch.device, measured: Measured) -> bool:
    """Whether only the allocator keeps steps, which wait for the processor, from being CUDA graphs."""
    if allocator_allows_graphs() or not _waits_for_processor(measured, prepared.config.memory):
        return False
    return not no_graphs_because(prepared, device, any_allocator=True)


def _waits_for_processor(measured: Measured, memory: MemoryConfig) -> bool:
    """Whether the card has run nearly all kernels when the processor has launched the last one.

    A slower card still has about 1,000 of a step's 9,000 kernels to run then, because CUDA queues that many: on an H200
    at 1024 pixels all were launched after 0.91 of the step. Where tensors are copied between host and device, the
    processor waits for them too, so nothing is known.
    """
    has_copies = memory.blocks_to_stream > 0 or memory.activation_offload
    return measured.launched > _ALL_LAUNCHED * measured.seconds and not has_copies


def _saved_share(compiled: float | None, uncompiled: float) -> float:
    """The share of a step's time that compiling saves, from an estimate and a measurement in seconds.

    Compiled steps have fewer small kernels, so small pictures gain most.
    """
    return _LEAST_SAVED if compiled is None else max(_LEAST_SAVED, 1 - compiled / uncompiled)


def _pays(device: torch.device, left: float, saved: float) -> bool:
    """Whether to compile in a run that takes `left` more seconds, of which compiling saves `saved`. Logs why."""
    numbers = in_words(saved), in_words(left)
    if saved < _COMPILING_SECONDS:
        text = "The blocks are not compiled: that takes up to a minute, and would save about %s of the remaining %s."
    elif not can_compile(device):
        text = (
            "The blocks are not compiled, because Triton is not installed. It would save about %s of the remaining %s."
        )
    else:
        text = (
            "Compiling the transformer's blocks. This takes up to a minute and saves about %s of the remaining %s. Set "
            "compile_blocks to off to prevent it."
        )
    _LOG.info(text, *numbers)
    return saved >= _COMPILING_SECONDS and can_compile(device)


def _compiled_if_right(
    networks: Networks, measure: Callable[[], Measured], uncompiled: Measured, config: TrainConfig
) -> Measured:
    """Compile the blocks, and keep them compiled if they work and compute the same gradients. With `compile_blocks`
    `auto`, they must also be faster.

    Returns what was measured with the blocks that are kept.
    """
    networks.compilation.start()
    had_graphs = networks.graphs.is_active
    networks.graphs.forget()
    compiled, reason = measure(), ""
    if wrong := wrong_gradients(compiled.gradients, uncompiled.gradients, dropout=config.lora.lora_dropout > 0):
        reason = f"compiled ones give wrong gradients for {', '.join(wrong)} with torch {torch.__version__}"
    elif compiled.seconds >= uncompiled.seconds and config.memory.compile_blocks != "on":
        reason = "compiled ones are not faster here"
    if networks.compilation.is_active and not reason:
        return compiled
    if networks.compilation.is_active:  # else they failed or did not fit
        networks.compilation.stop(reason)
    networks.graphs.forget()
    if had_graphs:  # they may have stopped with the compiled blocks, but worked before
        networks.graphs.start()
    return uncompiled


def no_graphs_because(prepared: Preparation, device: torch.device, *, any_allocator: bool = False) -> str:
    """Why the run's steps can't be CUDA graphs; empty if they can. `any_allocator`: leave the allocator out.

    Dropout draws new values in every pass. References that are encoded on the fly come from another thread, which
    measures the free memory: it can't tell what graphs hold. For the allocator see `allocator_allows_graphs`.
    """
    config, work = prepared.config, prepared.work
    if config.lora.lora_dropout > 0:
        return "dropout draws new values in every step"
    if work.on_the_fly_pixels:
        return "references are encoded on the fly"
    if not any_allocator and not allocator_allows_graphs():
        return "torch uses CUDA's allocator (start ComfyUI with --disable-cuda-malloc to change that)"
    card = config.memory.vram_gib
    usable = budget_of(device, card).device_bytes + (0 if card > 0 else torch.cuda.memory_allocated(device))
    planned = plan_memory(config, prepared.model.size, work, graphs=True).needed_device_bytes
    if planned > usable:
        return f"they would need {planned / GIB:.1f} GiB of VRAM, and {usable / GIB:.1f} GiB can be used"
    return ""


def _graphs_if_faster(networks: Networks, measure: Callable[[], Measured], ordinary: Measured) -> Measured:
    """Run steps as CUDA graphs if they work, compute the same gradients, and are faster.

    Returns what was measured with the steps that are kept.
    """
    networks.graphs.start()
    replayed = measure()
    if not networks.graphs.is_active:  # they failed or did not fit
        return ordinary
    if wrong := wrong_gradients(replayed.gradients, ordinary.gradients):
        layers = ", ".join(wrong)
        networks.graphs.stop(f"they give wrong gradients for {layers} with torch {torch.__version__}")
        return ordinary
    if replayed.seconds > _LEAST_FASTER * ordinary.seconds:
        networks.graphs.stop()
        _LOG.info("Steps run without CUDA graphs, which save less than a twentieth of their time here.")
        return ordinary
    _LOG.info("Steps run as CUDA graphs: %.2f s instead of %.2f s.", replayed.seconds, ordinary.seconds)
    return replayed


def of_first_block(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the first block that has an adapter, in host memory. All compiled blocks share their code."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, gradient in gradients.items():
        if found := _IN_BLOCK.match(name):
            blocks.setdefault(int(found[1]), {})[name] = gradient
    return {name: gradient.cpu() for name, gradient in blocks[min(blocks)].items()} if blocks else {}


def wrong_gradients(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, dropout: bool = False
) -> tuple[str, ...]:
    """Layers of a block, such as `attn.to_q`, whose gradients differ by half of their norm.

    Rounding in bfloat16 changes them by a few percent. With dropout, other values are dropped in compiled code, so only
    the norms are compared.
    """
    layers: dict[str, list[str]] = {}
    for name in wanted:
        layers.setdefault(_IN_BLOCK.sub("", name).rpartition(".")[0], []).append(name)
    wrong = []
    for layer, names in layers.items():
        ours, theirs = (torch.cat([each[name].flatten() for name in names]) for each in (found, wanted))
        error = (ours.norm() - theirs.norm()).abs() if dropout else (ours - theirs).norm()
        if not error <= _WRONG * theirs.norm():  # also true for NaN
            wrong.append(layer)
    return tuple(wrong)


def _log_memory(prepared: Preparation, networks: Networks, peak: int) -> None:
    """Log the planned memory and the measured peak (bytes). Optimizer state that doesn't exist yet is added to it."""
    planned = prepared.memory_plan().phase("training")
    assert planned is not None
    missing = 0 if networks.optimizer.state else planned.parts["optimizer state"]
    _LOG.info("VRAM of a step: %.1f GiB, planned %.1f GiB.", (peak + missing) / GIB, planned.total_bytes / GIB)
