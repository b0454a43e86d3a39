"""What to do when memory ran out: the settings that save most, by the plan's own numbers."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...config import MemoryConfig
from ...device import release_memory
from ...errors import OutOfMemoryError
from ...geometry import Size
from .choose import smaller_trainings
from .plan import GIB, MemoryPlan, plan_memory
from .workload import with_target

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
    config, network, work = plan.config, plan.network, plan.work
    everything = dataclasses.replace(config.memory, gradient_checkpointing_blocks=-1)

    def planned(memory: MemoryConfig, **changes: object) -> MemoryPlan:
        changed = dataclasses.replace(config, gradient_checkpointing=True, memory=memory, **changes)  # type: ignore[arg-type]
        return plan_memory(changed, network, work)

    if plan.recomputed < network.num_blocks:
        words = "gradient_checkpointing_blocks -1" if plan.recomputed else "gradient_checkpointing on"
        yield words, planned(everything)
    else:
        streamed = min(network.num_blocks, plan.streamed + network.num_blocks // 3)
        yield "activation_offload on", planned(dataclasses.replace(everything, activation_offload=True))
        yield f"blocks_to_stream {streamed}", planned(dataclasses.replace(everything, blocks_to_stream=streamed))
    for side in (768, 512):
        if work.validation is not None and work.validation.target.width * work.validation.target.height > side**2:
            smaller = with_target(work.validation, Size(side, side))
            words = f"validation_resolution {side}x{side}"
            yield words, plan_memory(config, network, dataclasses.replace(work, validation=smaller))
    for words, training in smaller_trainings(plan):
        yield words, plan_memory(*training)
    if config.lora.lora_rank > 1:
        rank = config.lora.lora_rank // 2
        smaller = dataclasses.replace(network, adapter_weights=network.adapter_weights // 2)
        lora = dataclasses.replace(config.lora, lora_rank=rank)
        yield f"lora_rank {rank}", plan_memory(dataclasses.replace(config, lora=lora), smaller, work)


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
        advice = memory_advice(plan_of(), phases)
        raise OutOfMemoryError(f"Out of memory {during}. {kept} {advice}") from error
