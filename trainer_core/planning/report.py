"""A memory plan as text: the run, a table of the phases, RAM, memory settings, and whether it fits."""

from __future__ import annotations

import dataclasses

import torch

from ..config import MemoryConfig, TrainConfig
from ..errors import OutOfMemoryError
from ..qwen_image.flavours import title_of
from ..settings import unused_fields
from .advice import STEP, VALIDATION, memory_advice
from .choose import Budget, choose_memory
from .duration import probed_speed, time_in_words
from .network import NetworkSize
from .plan import GIB, MemoryPlan, plan_memory
from .workload import Workload


def planned_in_words(
    config: TrainConfig, network: NetworkSize, work: Workload, budget: Budget, device: torch.device | None = None
) -> tuple[str, bool]:
    """The report on the memory plan of a run with these settings, and whether it fits.

    `device`: also estimates how long the run takes there, which takes a moment; None for a card that is elsewhere.
    """
    if config.memory.memory == "auto":
        try:
            plan = choose_memory(config, network, work, budget)
        except OutOfMemoryError as error:
            return f"{plan_report(plan_memory(config, network, work), budget)}\n\n{error}", False
        more = (unused_in_words(config), _estimated_time(plan, device))
        return "\n".join(filter(None, (plan_report(plan, budget), *more))), True
    plan = plan_memory(config, network, work)
    text, fits = plan_report(plan, budget), budget.holds(plan)
    if fits:
        text = "\n".join(filter(None, (text, _estimated_time(plan, device))))
    else:
        hint = "With memory set to auto, the trainer chooses memory settings that fit."
        text += f"\n\n{memory_advice(plan, STEP + VALIDATION)} {hint}"
    return text, fits


def time_before_encoding(
    config: TrainConfig, network: NetworkSize, work: Workload, budget: Budget, device: torch.device
) -> str:
    """How long encoding and training take on this device; "" if it can't be measured or no memory settings fit."""
    speed = probed_speed(config, network, work, device)
    if speed is None:
        return ""
    try:
        config = choose_memory(config, network, work, budget).config if config.memory.memory == "auto" else config
    except OutOfMemoryError:  # the run says so itself once it knows the prompts' lengths
        return ""
    return time_in_words(config, network, work, speed)


def unused_in_words(config: TrainConfig) -> str:
    """A sentence that names the memory settings that `memory` auto ignores although they were changed; "" if none."""
    if config.memory.memory != "auto":
        return ""
    given = dataclasses.asdict(config.memory)
    unused = [each for each in unused_fields(MemoryConfig, given) if given[each.name] != each.default]
    changed = [f"{each.name} {_on_off(given[each.name])}" for each in unused]
    if not config.gradient_checkpointing:
        changed.append("gradient_checkpointing off")
    if not changed:
        return ""
    them = "it" if len(changed) == 1 else "them"
    return f"Not used, because memory is auto: {', '.join(changed)}. Set memory to manual to use {them}."


def _estimated_time(plan: MemoryPlan, device: torch.device | None) -> str:
    """How long the run takes on this device, as far as that can be told before anything is loaded."""
    speed = None if device is None else probed_speed(plan.config, plan.network, plan.work, device)
    return "" if speed is None else time_in_words(plan.config, plan.network, plan.work, speed)


def _on_off(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def plan_report(plan: MemoryPlan, budget: Budget | None = None) -> str:
    """The report; sizes are in GiB."""
    table = _device_table(plan, "Memory" if budget is not None and budget.is_shared else "VRAM")
    lines = [*_run(plan), "", *table, "", *_host(plan), "", *_settings(plan)]
    return "\n".join([*lines, *([] if budget is None else ["", verdict(plan, budget)])])


def _run(plan: MemoryPlan) -> list[str]:
    config, pair = plan.config, plan.work.train
    references = "1 reference" if pair.references == 1 else f"{pair.references} references"
    return [
        f"Memory to train {title_of(config.model.flavour)}: base_model_precision {plan.network.precision}, "
        f"rank {config.lora.lora_rank} on {config.lora.lora_targets}, {config.optimizer.optimizer}",
        f"Largest micro-batch: {plan.work.batch} x (target {pair.target.width} x {pair.target.height}, "
        f"{references}: {pair.image_tokens} picture tokens, {pair.text_tokens} prompt tokens)",
    ]


def _device_table(plan: MemoryPlan, what: str) -> list[str]:
    title = f"{what}, GiB"
    names = list(dict.fromkeys(name for phase in plan.device for name in phase.parts))
    left = max(map(len, [title, *names]))
    columns = [phase.name for phase in plan.device]
    rows = ["  ".join([f"{title:<{left}}", *(f"{name:>8}" for name in columns)])]
    for name in names:
        cells = [f"{phase.parts[name] / GIB:8.2f}" if name in phase.parts else " " * 8 for phase in plan.device]
        rows.append("  ".join([f"{name:<{left}}", *cells]).rstrip())
    rows.append("  ".join([f"{'total':<{left}}", *(f"{phase.total_bytes / GIB:8.2f}" for phase in plan.device)]))
    return rows


def _host(plan: MemoryPlan) -> list[str]:
    parts = ", ".join(f"{what} {size / GIB:.2f}" for what, size in plan.host.items())
    return [f"RAM: {plan.host_peak_bytes / GIB:.1f} GiB ({parts})"]


def _settings(plan: MemoryPlan) -> list[str]:
    memory, total = plan.config.memory, plan.network.num_blocks
    return [
        f"gradient_checkpointing {_on_off(plan.recomputed > 0)}, "
        f"gradient_checkpointing_blocks {plan.recomputed} of {total}",
        f"activation_offload {_on_off(memory.activation_offload and plan.recomputed > 0)}, "
        f"recompute_attention {_on_off(memory.recompute_attention and plan.recomputed > 0)}",
        f"blocks_to_stream {plan.streamed} of {total}, compile_blocks {memory.compile_blocks}",
    ]


def verdict(plan: MemoryPlan, budget: Budget) -> str:
    """A sentence that says whether the plan fits, with the numbers."""
    margin = (plan.needed_device_bytes - plan.device_peak_bytes) / GIB
    fits = "fits" if budget.holds(plan) else "does not fit"
    kind = "RAM" if budget.is_shared else "VRAM"
    return f"The run {fits}: it needs {budget.beside(plan)}. {margin:.1f} GiB of the {kind} are a margin."
