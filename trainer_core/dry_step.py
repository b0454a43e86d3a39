"""A step of the largest pairs before the first step: tests the memory, measures the time, and compiles if that pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .conditioning.batches import BatchLoader, largest_batch
from .device import peak_bytes
from .errors import OutOfMemoryError
from .events import SILENT, Observer
from .memory.compilation import can_compile
from .planning.advice import STEP
from .planning.duration import duration, in_words, measured_speed, time_in_words
from .planning.plan import GIB
from .planning.preparation import Preparation
from .training.step import Networks, rehearse

_LOG = logging.getLogger(__name__)
# Measured on an H200 with the full-size transformer: compiling takes 28 to 36 s, and compiled steps take 0.75 to 0.8 of
# the time at 1024 pixels and less at 512 (benchmarks/gpu_step_h200_2026-11.md). A slower processor takes longer.
_COMPILING_SECONDS, _SAVED = 60, 0.2


class Measured(NamedTuple):
    """A micro-batch forward and backward: its seconds, and its peak of device memory in bytes."""

    seconds: float
    peak_bytes: int


def dry_step(
    prepared: Preparation, networks: Networks, loader: BatchLoader, done: int, observer: Observer = SILENT
) -> None:
    """On CUDA, run the largest micro-batch forward and backward, so that too little memory shows up at once.

    Compiles the blocks if `compile_blocks` says so; `auto` compiles if that takes less time than it saves in the steps
    after `done`, and keeps compiled blocks only if they fit into memory and are faster. Logs the memory, and tells the
    log and the observer how long the run takes.

    Raises:
        OutOfMemoryError: the memory does not suffice.
    """
    if networks.device.type != "cuda":
        return
    config = prepared.config
    run = (config, prepared.model.size, prepared.work)
    micro_batch = largest_batch(loader.plan, prepared.encoded)

    def one() -> float:
        began = time.perf_counter()
        networks.compilation.attempt(
            lambda: rehearse(networks, loader, micro_batch, config), clean_up=networks.optimizer.zero_grad
        )
        torch.cuda.synchronize(networks.device)
        return time.perf_counter() - began

    def measure() -> Measured:
        torch.cuda.reset_peak_memory_stats(networks.device)
        with prepared.explain_memory_errors(STEP, "in a dry step of the largest pairs", "Nothing is lost."):
            one()  # slower: libraries choose their kernels, or the blocks are compiled
            return Measured(one(), peak_bytes(networks.device))

    if config.memory.compile_blocks == "on":
        networks.compilation.start()
        measured = measure()
    else:
        measured = measure()
        left = duration(*run, measured_speed(*run, measured.seconds), done=done).total
        if config.memory.compile_blocks == "auto" and _pays(networks.device, left):
            _LOG.info(
                "Compiling the transformer's blocks: takes up to a minute and saves about %s of %s. Set compile_blocks "
                "to off to prevent it.",
                in_words(left * _SAVED),
                in_words(left),
            )
            observer.on_progress("Compiling the transformer's blocks", 0, 0)
            measured = _compiled_if_better(networks, measure, measured)
    _log_memory(prepared, networks, measured.peak_bytes)
    torch.cuda.empty_cache()  # blocks of memory that only the compiler or another size needed
    words = time_in_words(*run, measured_speed(*run, measured.seconds), done=done)
    _LOG.info("%s", words)
    observer.on_progress(words, 0, 0)


def _compiled_if_better(networks: Networks, measure: Callable[[], Measured], uncompiled: Measured) -> Measured:
    """Compile the blocks, and keep that if they then fit into memory and are faster.

    Returns what was measured with the blocks that are kept.
    """
    networks.compilation.start()
    try:
        compiled, drawback = measure(), "compiled ones are not faster here"
    except OutOfMemoryError:
        networks.optimizer.zero_grad()
        compiled, drawback = None, "compiled ones need more memory than is free"
    if compiled is not None and compiled.seconds < uncompiled.seconds:
        return compiled
    if networks.compilation.is_active:
        networks.compilation.stop(drawback)
    return uncompiled


def _pays(device: torch.device, left: float) -> bool:
    """Whether compiling shortens a run that takes `left` more seconds. Logs why not."""
    if not can_compile(device):
        _LOG.info("The blocks are not compiled, because Triton is not installed. Steps would be about a fifth shorter.")
        return False
    if left * _SAVED < _COMPILING_SECONDS:
        _LOG.info("The blocks are not compiled: that takes up to a minute, and only %s are left.", in_words(left))
        return False
    return True


def _log_memory(prepared: Preparation, networks: Networks, peak: int) -> None:
    """Log the planned memory and the measured peak (bytes). Optimizer state that doesn't exist yet is added to it."""
    planned = prepared.memory_plan().phase("training")
    assert planned is not None
    missing = 0 if networks.optimizer.state else planned.parts["optimizer state"]
    _LOG.info("Device memory of a step: %.1f GiB, planned %.1f GiB.", (peak + missing) / GIB, planned.total_bytes / GIB)
