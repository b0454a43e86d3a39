"""What to do when memory ran out: the settings that save most, by the plan's own numbers."""

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
from .choose import if_allowed, smaller_trainings
from .plan import GIB, MemoryPlan, plan_memory
from .workload import with_target

_LOG = logging.getLogger(__name__)
_ADVISED = 3
STEP, VALIDATION = ("training",), ("drawing", "decoding")  # phases of the plan


def memory_advice(plan: MemoryPlan, phases: tuple[str, ...]) -> str:
    """The three settings that make the fullest of these phases smaller by most, in words."""
    before = _fullest(plan, phases)
    savings: dict[str, tuple[int, str]] = {}
    for words, after in _changes(plan):
        saved = before - _fullest(after, phases)
        if saved > 0:
            savings.setdefault(words.split()[0], (saved, words))
    best = sorted(savings.values(), reverse=True)[:_ADVISED]
    if not best:
        return "No setting would save much: this training is as small as it gets."
    return "What helps most: " + ", ".join(f"{words} (saves {saved / GIB:.1f} GiB)" for saved, words in best) + "."


def _fullest(plan: MemoryPlan, phases: tuple[str, ...]) -> int:
    return max((phase.total_bytes for phase in plan.device if phase.name in phases), default=0)


def _changes(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes of one setting in words, each with its plan. Those that the other settings forbid are left out."""
    config, network, work = plan.config, plan.network, plan.work

    def planned(words: str, **changes: object) -> Iterator[tuple[str, MemoryPlan]]:
        memory = dataclasses.replace(config.memory, gradient_checkpointing_blocks=-1, **changes)  # type: ignore[arg-type]
        changed = if_allowed(lambda: dataclasses.replace(config, gradient_checkpointing=True, memory=memory))
        if changed is not None:
            yield words, plan_memory(changed, network, work)

    if plan.recomputed < network.num_blocks:
        yield from planned("gradient_checkpointing_blocks -1" if plan.recomputed else "gradient_checkpointing on")
    else:
        streamed = min(network.num_blocks, plan.streamed + network.num_blocks // 3)
        yield from planned("activation_offload on", activation_offload=True)
        yield from planned(f"blocks_to_stream {streamed}", blocks_to_stream=streamed)
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
    """Of a LoRA matrix, whose smaller side is the rank; a DoRA's vector stays."""
    if len(shape) == 1:
        return shape
    rank = min(shape)
    return tuple(rank // 2 if side == rank else side for side in shape)


@contextmanager
def memory_errors_explained(
    plan_of: Callable[[], MemoryPlan], phases: tuple[str, ...], during: str, kept: str
) -> Iterator[None]:
    """Turn torch's error into ours: what ran out `during` which work, what is `kept`, which settings help.

    What the failed work held is given back. `plan_of` is only called then.

    Raises:
        OutOfMemoryError: there was not enough.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the work that failed
        release_memory()
        raise OutOfMemoryError(f"Out of memory {during}. {kept} {_advice(plan_of, phases)}".rstrip()) from error


def _advice(plan_of: Callable[[], MemoryPlan], phases: tuple[str, ...]) -> str:
    """The advice, or nothing where no plan can be made: then memory ran out all the same, and that is what to say."""
    try:
        return memory_advice(plan_of(), phases)
    except Exception:  # noqa: BLE001 - whatever it is, it must not stand in the place of the error at hand
        _LOG.warning("No advice, because the memory could not be planned.", exc_info=True)
        return ""
