"""The plan of a run at hand: its settings under `memory` auto, and a dry step that shows whether it is right."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from ..conditioning.batches import BatchLoader, RankPlan
from ..conditioning.encoded import EncodedDataset
from ..config import TrainConfig
from ..device import peak_bytes, pick_device
from ..training.step import Networks, rehearse
from .advice import STEP, VALIDATION, memory_advice, memory_errors_explained
from .checks import check_training
from .choose import budget_of, choose_memory
from .network import NetworkSize, network_size
from .plan import GIB, MemoryPlan, plan_memory
from .report import plan_report, verdict
from .workload import Workload, workload_of_encoded

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunMemory:
    """The memory of one run on its device. `processes` share the machine's."""

    config: TrainConfig
    encoded: EncodedDataset
    held_out: EncodedDataset
    processes: int = 1

    def plan(self) -> MemoryPlan:
        """Under the settings as they are."""
        return plan_memory(self.config, *self._sizes())

    def settled(self) -> RunMemory:
        """With the settings to train under: chosen under `memory` auto, otherwise as they are, and then it is said if
        they don't fit. Reads no weights.

        Raises:
            ConfigError, ModelFileError, MissingPackageError: as `check_training`.
            OutOfMemoryError: under auto, if nothing fits.
        """
        check_training(self.config)
        device, card = pick_device(self.config.model.device), self.config.memory.vram_gib
        budget = budget_of(device, card, processes=self.processes)
        if self.config.memory.memory == "manual":
            if not budget.holds(plan := self.plan()):
                _LOG.warning("The plan: %s %s", verdict(plan, budget), memory_advice(plan, STEP + VALIDATION))
            return self
        plan = choose_memory(self.config, *self._sizes(), budget)
        _LOG.info("%s", plan_report(plan, budget))
        return replace(self, config=plan.config)

    def explained(self, phases: tuple[str, ...], during: str, kept: str) -> AbstractContextManager[None]:
        """Errors of too little memory become ours, see `memory_errors_explained`."""
        return memory_errors_explained(self.plan, phases, during, kept)

    def _sizes(self) -> tuple[NetworkSize, Workload]:
        config = self.config
        work = workload_of_encoded(self.encoded, config.batching, config.validation, self.held_out)
        return network_size(config.model, config.lora), work


def largest_batch(plan: RankPlan, encoded: EncodedDataset) -> int:
    """Number of this process's micro-batch with the most numbers in its latents, of about an epoch."""

    def size(number: int) -> int:
        draws = plan[number]
        shapes = encoded.pairs[draws[0].pair].seen(draws[0].reference_set).shapes
        return len(draws) * sum(height * width for _, height, width in shapes)  # type: ignore[misc]

    return max(range(plan.first_epoch()), key=size)


def dry_step(networks: Networks, loader: BatchLoader, memory: RunMemory) -> tuple[int, int] | None:
    """Forward and backward of the largest micro-batch, on CUDA devices, for its memory alone: the run does not change.

    Bytes as planned and as measured, which are logged too. Optimizer state that is not there yet is added to what was
    measured. None on other devices.
    """
    if networks.device.type != "cuda":
        return None
    planned = memory.plan().phase("training")
    assert planned is not None
    torch.cuda.reset_peak_memory_stats(networks.device)
    with memory.explained(STEP, "in a dry step of the largest pairs", "Nothing is lost."):
        rehearse(networks, loader, largest_batch(loader.plan, memory.encoded), memory.config)
    coming = 0 if networks.optimizer.state else planned.parts["optimizer state"]
    measured = peak_bytes(networks.device) + coming
    _LOG.info("Device memory of a step: %.1f GiB, planned %.1f.", measured / GIB, planned.total_bytes / GIB)
    return planned.total_bytes, measured
