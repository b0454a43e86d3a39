"""What to do when memory runs out: the settings that save most by the memory plan."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..device import release_memory
from ..errors import OutOfMemoryError
from ..geometry import Size
from .choose import smaller_trainings
from .plan import GIB, MemoryPlan, plan_memory
from .workload import with_target

_LOG = logging.getLogger(__name__)
_MAX_ADVICE = 3
STEP, VALIDATION = ("training",), ("sampling", "decoding")  # phases of the plan


def memory_advice(plan: MemoryPlan, phases: tuple[str, ...]) -> str:
    """A sentence with the three settings that save most in the largest of these phases."""
    before = _largest(plan, phases)
    savings: dict[str, tuple[int, str]] = {}
    for words, after in _changes(plan):
        saved = before - _largest(after, phases)
        if saved > 0:
            savings.setdefault(words.split()[0], (saved, words))
    best = sorted(savings.values(), reverse=True)[:_MAX_ADVICE]
    if not best:
        return "No other setting saves memory here."
    return "What helps most: " + ", ".join(f"{words} saves {saved / GIB:.1f} GiB" for saved, words in best) + "."


def _largest(plan: MemoryPlan, phases: tuple[str, ...]) -> int:
    return max((phase.total_bytes for phase in plan.device if phase.name in phases), default=0)


def _changes(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes of one setting as text, each with its plan, without those that the other settings exclude."""
    config, network, work = plan.config, plan.network, plan.work

    def planned(words: str, **changes: object) -> tuple[str, MemoryPlan]:
        memory = dataclasses.replace(config.memory, gradient_checkpointing_blocks=-1, **changes)  # type: ignore[arg-type]
        changed = dataclasses.replace(config, gradient_checkpointing=True, memory=memory)
        return words, plan_memory(changed, network, work)

    if plan.recomputed < network.num_blocks:
        yield planned("gradient_checkpointing_blocks -1" if plan.recomputed else "gradient_checkpointing on")
    else:
        streamed = min(network.num_blocks, plan.streamed + network.num_blocks // 3)
        yield planned("activation_offload on", activation_offload=True)
        yield planned("recompute_attention on", recompute_attention=True)
        yield planned(f"blocks_to_stream {streamed}", blocks_to_stream=streamed)
    for side in (768, 512):
        if work.validation is not None and work.validation.target.width * work.validation.target.height > side**2:
            smaller = with_target(work.validation, Size(side, side))
            words = f"validation_resolution {side}x{side}"
            yield words, plan_memory(config, network, dataclasses.replace(work, validation=smaller))
    for words, training in smaller_trainings(plan):
        yield words, plan_memory(*training)
    if config.lora.lora_rank > 1:
        rank = config.lora.lora_rank // 2
        halved = tuple(_half_rank(shape) for shape in network.adapter_shapes)
        smaller = dataclasses.replace(network, adapter_shapes=halved)
        lora = dataclasses.replace(config.lora, lora_rank=rank)
        yield f"lora_rank {rank}", plan_memory(dataclasses.replace(config, lora=lora), smaller, work)


def _half_rank(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an adapter weight at half the rank, which is a matrix's smaller side; a DoRA's vector stays."""
    if len(shape) == 1:
        return shape
    rank = min(shape)
    return tuple(rank // 2 if side == rank else side for side in shape)


@contextmanager
def memory_errors_explained(
    plan_of: Callable[[], MemoryPlan], phases: tuple[str, ...], during: str, kept: str
) -> Iterator[None]:
    """Raise torch's out-of-memory error as ours, with `during` (which work), `kept` (what is saved) and advice.

    Frees the memory of the failed work first. Calls `plan_of` only after an error.

    Raises:
        OutOfMemoryError: the work ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed work
        release_memory()
        raise OutOfMemoryError(f"Out of memory {during}. {kept} {_advice(plan_of, phases)}".rstrip()) from error


def _advice(plan_of: Callable[[], MemoryPlan], phases: tuple[str, ...]) -> str:
    """The advice; empty if planning fails, because the out-of-memory error matters more."""
    try:
        return memory_advice(plan_of(), phases)
    except Exception:  # noqa: BLE001 - no error may replace the out-of-memory error
        _LOG.warning("No advice: the memory plan failed.", exc_info=True)
        return ""
