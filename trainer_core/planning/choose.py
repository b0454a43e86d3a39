"""Chooses memory settings that make a run fit without changing what it learns, or suggests other changes."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product

import psutil
import torch

from ..config import BaseModelPrecision, ModelConfig, TrainConfig
from ..errors import ConfigError, OutOfMemoryError
from ..geometry import scaled_size
from .duration import Speed, training_seconds
from .network import NetworkSize
from .plan import GIB, MemoryPlan, plan_memory
from .workload import PairSize, Workload, resolution_in_words

# A card whose copies are slow compared with its arithmetic: 100 TFLOP/s with PCIe 4.0 x8. Copies that computation hides
# on this card are also hidden on others.
_TYPICAL = Speed(product=1e-14, attention=1e-14, attention_backward=1e-14, copy=1 / 12e9)
_CUDA_CONTEXT = int(0.6 * GIB)  # device memory that CUDA itself uses
SMALLER_PRECISIONS: tuple[BaseModelPrecision, ...] = ("int8-quanto", "nf4-bnb")
_SMALLER_SIDES = (1024, 768, 512)
_WHERE_RESOLUTION_IS = (
    "resolution is in Encode Edit Pairs or, in graphs without that node, in Qwen Edit More Settings. match_target_res "
    "is in Encode Edit Pairs; most presets turn it on"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory available to a run. `is_shared`: the device uses host memory, as the CPU does."""

    device_bytes: int
    host_bytes: int
    is_shared: bool = False

    def holds(self, plan: MemoryPlan) -> bool:
        """Whether the plan fits with its margin."""
        if self.is_shared:
            return plan.needed_device_bytes + plan.host_peak_bytes <= self.host_bytes
        return self.holds_device(plan) and plan.host_peak_bytes <= self.host_bytes

    def holds_device(self, plan: MemoryPlan) -> bool:
        """Whether the plan's device memory fits with its margin."""
        return self.is_shared or plan.needed_device_bytes <= self.device_bytes

    def beside(self, plan: MemoryPlan) -> str:
        """What the plan needs with its margin, and what is free."""
        device, host = plan.needed_device_bytes / GIB, plan.host_peak_bytes / GIB
        ram = f"{device * self.is_shared + host:.1f} GiB of RAM ({self.host_bytes / GIB:.1f} GiB free)"
        vram = f"{device:.1f} GiB of VRAM ({self.device_bytes / GIB:.1f} GiB free)"
        return ram if self.is_shared else f"{vram} and {ram}"


def budget_of(device: torch.device, vram_gib: float = 0.0, *, processes: int = 1, held_leaves: bool = False) -> Budget:
    """Memory that is free for one of `processes` on this machine. `vram_gib` above 0: for a card of that size instead.

    `held_leaves`: counts this process's own device memory as free, because its models are unloaded before a run.
    """
    host = int(psutil.virtual_memory().available) // processes
    if vram_gib > 0:
        return Budget(max(0, int(vram_gib * GIB) - _CUDA_CONTEXT), host)
    if device.type != "cuda":
        return Budget(host, host, is_shared=True)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - (0 if held_leaves else torch.cuda.memory_allocated(device))
    return Budget(free + unused, host)


def choose_memory(config: TrainConfig, network: NetworkSize, work: Workload, budget: Budget) -> MemoryPlan:
    """The plan that fits and whose steps take least time; its `config` has the memory settings.

    Recomputing a block or its attention takes time. Offloading what it keeps and streaming weights take none as long as
    the copies run beside the computation, so they make room for blocks that are not recomputed.

    Raises:
        OutOfMemoryError: none fits; gives the numbers and the smallest change that would fit.
    """
    tokens = work.train.image_tokens + work.train.text_tokens

    def cost(plan: MemoryPlan) -> tuple[float, int, bool]:
        seconds = training_seconds(plan.config, network, _TYPICAL, tokens, work.batch)
        return seconds, plan.streamed, plan.config.memory.activation_offload

    on_device = list(_fitting_on_device(config, network, work, budget))
    if best := min(filter(budget.holds, on_device), key=cost, default=None):
        return best
    nearest = min(on_device, key=lambda plan: plan.host_peak_bytes, default=None)
    raise OutOfMemoryError(_refusal(nearest or _smallest(config, network, work), budget))


def _fitting_on_device(
    config: TrainConfig, network: NetworkSize, work: Workload, budget: Budget
) -> Iterator[MemoryPlan]:
    """Plans whose device memory fits: for each number of recomputed blocks, with and without offloading and attention
    that is computed again, the one that streams fewest blocks."""
    for recomputed in range(network.num_blocks + 1):
        offloads = (False, True) if recomputed and not budget.is_shared else (False,)
        for offload, attention in product(offloads, (False, True) if recomputed else (False,)):

            def plan(
                streamed: int,
                recomputed: int = recomputed,
                offload: bool = offload,  # noqa: FBT001
                attention: bool = attention,  # noqa: FBT001
            ) -> MemoryPlan:
                changed = _with(config, recomputed, streamed=streamed, offload=offload, attention=attention)
                return plan_memory(changed, network, work)

            most = 0 if budget.is_shared else recomputed
            # Each streamed block needs less device memory, so the plans that fit are at the end.
            streamed = bisect_left(range(most + 1), 1, key=lambda count: int(budget.holds_device(plan(count))))
            if streamed <= most:
                yield plan(streamed)


def _smallest(config: TrainConfig, network: NetworkSize, work: Workload) -> MemoryPlan:
    """The plan that needs least device memory."""
    smallest = _with(config, network.num_blocks, streamed=network.num_blocks, offload=True, attention=True)
    return plan_memory(smallest, network, work)


def _with(config: TrainConfig, recomputed: int, *, streamed: int, offload: bool, attention: bool) -> TrainConfig:
    """The config with these memory settings. `attention`: recomputed blocks compute it again."""
    memory = dataclasses.replace(
        config.memory,
        gradient_checkpointing_blocks=recomputed,
        activation_offload=offload,
        recompute_attention=attention,
        blocks_to_stream=streamed,
    )
    return dataclasses.replace(config, gradient_checkpointing=recomputed > 0, memory=memory)


def _refusal(plan: MemoryPlan, budget: Budget) -> str:
    nearest = next(_smaller_that_fit(plan, budget), None)
    if nearest:
        advice = f"To make it fit, set {nearest}. If other programs use the memory, close them instead."
    else:
        advice = "No smaller setting makes it fit into what is free. Close other programs and run again."
    needed = f"With the smallest memory settings it still needs {budget.beside(plan)}."
    return f"The run does not fit into memory. {needed} {advice}"


def _smaller_that_fit(plan: MemoryPlan, budget: Budget) -> Iterator[str]:
    for words, (config, network, work) in chain(smaller_trainings(plan), _much_smaller_trainings(plan)):
        if fitting := next(filter(budget.holds, _fitting_on_device(config, network, work, budget)), None):
            needed = f"{fitting.needed_device_bytes / GIB:.1f} GiB of {'RAM' if budget.is_shared else 'VRAM'}"
            place = f". {_WHERE_RESOLUTION_IS}" if "resolution" in words else ""
            yield f"{words}, which needs {needed}{place}"


Training = tuple[TrainConfig, NetworkSize, Workload]


def smaller_trainings(plan: MemoryPlan) -> Iterator[tuple[str, Training]]:
    """Changes of one setting that save memory, as text and run, the smallest change of each setting first."""
    training = plan.config, plan.network, plan.work
    if plan.work.batch > 1:
        yield "train_batch_size 1", _one_at_a_time(training)
    for precision in _smaller_precisions(plan):
        yield _in_words(precision), _in_precision(training, precision)
    for side in _smaller_sides(plan):
        yield resolution_in_words(side, plan.work), _at_resolution(training, side)


def _much_smaller_trainings(plan: MemoryPlan) -> Iterator[tuple[str, Training]]:
    """Combinations of changes that save memory, as `smaller_trainings` gives them."""
    training = _one_at_a_time((plan.config, plan.network, plan.work))
    single = "train_batch_size 1 and " if plan.work.batch > 1 else ""
    for precision in _smaller_precisions(plan)[-1:]:
        smaller, words = _in_precision(training, precision), f"{single}{_in_words(precision)}"
        if single:
            yield words, smaller
        for side in _smaller_sides(plan):
            yield f"{words} and {resolution_in_words(side, plan.work)}", _at_resolution(smaller, side)


def _in_words(precision: BaseModelPrecision) -> str:
    return f"precision {precision} (base_model_precision in settings files)"


def _smaller_precisions(plan: MemoryPlan) -> tuple[BaseModelPrecision, ...]:
    """Precisions that the other settings allow and that save more than a tenth of the weights' memory."""

    def is_smaller(precision: BaseModelPrecision) -> bool:
        size = dataclasses.replace(plan.network, precision=precision).weight_bytes
        return size < 0.9 * plan.network.weight_bytes

    return tuple(each for each in SMALLER_PRECISIONS if is_smaller(each) and _is_allowed(plan.config.model, each))


def _is_allowed(model: ModelConfig, precision: BaseModelPrecision) -> bool:
    """Whether the model's other settings allow this precision."""
    try:
        dataclasses.replace(model, base_model_precision=precision)
    except ConfigError:
        return False
    return True


def _smaller_sides(plan: MemoryPlan) -> tuple[int, ...]:
    pixels = plan.work.train.target.width * plan.work.train.target.height
    return tuple(side for side in _SMALLER_SIDES if side**2 < 0.9 * pixels)


def _one_at_a_time(training: Training) -> Training:
    """The run with one pair per micro-batch."""
    config, network, work = training
    batching = dataclasses.replace(config.batching, train_batch_size=1)
    return dataclasses.replace(config, batching=batching), network, dataclasses.replace(work, batch=1)


def _in_precision(training: Training, precision: BaseModelPrecision) -> Training:
    """The run with the base model in another precision."""
    config, network, work = training
    model = dataclasses.replace(config.model, base_model_precision=precision)
    return dataclasses.replace(config, model=model), dataclasses.replace(network, precision=precision), work


def _at_resolution(training: Training, side: int) -> Training:
    """The run at another resolution. References shrink by the same factor as targets, or more."""
    config, network, work = training
    validation = None if work.validation is None else _resized(work.validation, side)
    return config, network, dataclasses.replace(work, train=_resized(work.train, side), validation=validation)


def _resized(pair: PairSize, side: int) -> PairSize:
    scale = min(1.0, side / (pair.target.width * pair.target.height) ** 0.5)
    tokens = round(pair.image_tokens * scale**2)
    return dataclasses.replace(pair, target=scaled_size(pair.target, scale, 32), image_tokens=tokens)
