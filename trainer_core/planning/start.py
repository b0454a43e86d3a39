"""What is known of a run before anything is encoded or loaded: all that it would refuse, its memory, time and disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..conditioning.encoded import EncodedDataset
from ..conditioning.encoding_plan import PlannedDataset
from ..config import TrainConfig
from ..disk import disk_errors
from ..errors import Problems
from ..qwen_image.base_model import BaseModel
from ..runs.folder import RunFolder
from ..runs.result import check_start
from .choose import Budget, choose_memory
from .disk_space import DiskUse, cache_use, check_disk, run_use
from .duration import Speed, duration, until_first_pictures
from .network import NetworkSize
from .plan import MemoryPlan, plan_memory
from .preparation import PreparedModel, check_datasets, check_memory, check_training, unmeasured, without_references
from .workload import Workload, workload_of_pairs

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The datasets of a run, as planned.

    `trained` have pairs that are trained, `every` also those whose pairs are only validated. `encoded` and `held_out`
    are what the run will get, `held_out` only if it is another one. `encoded` is None if the run also gets datasets
    that are not known yet.
    """

    trained: Sequence[PlannedDataset]
    every: Sequence[PlannedDataset]
    encoded: EncodedDataset | None
    held_out: EncodedDataset | None = None

    def named_in(self, config: TrainConfig) -> TrainConfig:
        """The configuration with these datasets."""
        if self.encoded is None:
            return config
        held = str(self.held_out.manifest) if self.held_out else ""
        return replace(config, encoded=str(self.encoded.manifest), validation_encoded=held)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """What `check_run` found besides problems.

    `is_finished`: there is nothing left to train. `disk`: what will be written. `notes`: sentences about tight disk
    space, pairs without references, and validation pictures that can't be measured. `model` is None if it has problems.
    """

    is_finished: bool
    model: PreparedModel | None
    disk: Sequence[DiskUse] = ()
    notes: Sequence[str] = ()


def check_run(
    problems: Problems,
    config: TrainConfig,
    data: RunData,
    *,
    model: Callable[[], PreparedModel | None] | None = None,
    continue_kept: bool = False,
    trains_here: bool = True,
    held_leaves: bool = False,
) -> CheckedRun:
    """Add all problems that encoding and training would have with these datasets. Writes nothing.

    Args:
        problems: gets the errors.
        config: settings of the run. Its datasets are those in `data`.
        data: the datasets.
        model: gives the base model, or None if its problems are known already. Default: it is checked here, unless the
            run is finished.
        continue_kept: also goes on with a run that was ended early and kept.
        trains_here: False leaves out what matters only where the training runs: device, packages and run folder.
        held_leaves: as in `budget_of`.
    """

    def attempt(check: Callable[[], T]) -> T | None:
        def explained() -> T:
            with disk_errors(data.every[0].cache_dir):
                return check()

        return problems.attempt(explained)

    config, ranks = data.named_in(config), data.every[0].ranks
    notes: list[str] = []
    if data.encoded is not None:
        encoded, held_out = data.encoded, data.held_out or data.encoded
        if trains_here:
            attempt(lambda: check_datasets(config, encoded, held_out))
        notes += filter(None, [without_references(encoded), unmeasured(held_out, config.validation)])
    is_finished = trains_here and bool(attempt(lambda: _is_finished(config, data, continue_kept=continue_kept)))
    prepared = None
    if model is not None:
        prepared = model()
    elif not is_finished:
        prepared = attempt(lambda: check_training(config, BaseModel(config.model)))
    uses = cache_use(data.every) if ranks.leads else []
    if trains_here and not is_finished and prepared is not None and any(part.pairs for part in data.trained):
        is_all = data.encoded is not None and data.held_out is None and len(data.every) == 1
        fits = partial(check_memory, config, prepared.size, data.trained, ranks.on_machine)
        attempt(partial(fits, is_all=is_all, held_leaves=held_leaves))
        if ranks.leads:  # the other processes of a distributed run leave the sum to the leader
            work = workload_of_pairs(data.every, config.batching, config.validation)
            uses.append(run_use(config, prepared.size, work))
    notes += attempt(lambda: check_disk(uses)) or ()
    return CheckedRun(is_finished=is_finished, model=prepared, disk=uses, notes=notes)


def _is_finished(config: TrainConfig, data: RunData, *, continue_kept: bool) -> bool:
    if data.encoded is None:
        return bool(RunFolder(Path(config.run_dir)).state().get("result"))
    return check_start(config, data.encoded, continue_kept=continue_kept, num_ranks=data.every[0].ranks.size)


def check_before_encoding(config: TrainConfig, data: RunData, *, continue_kept: bool = False) -> None:
    """Check all that training would refuse after these datasets have been encoded for it.

    Raises:
        TrainerError: see `check_training`, `check_datasets`, `check_start`, `check_memory` and `check_disk`.
        JobError: several of these.
    """
    problems = Problems()
    check_run(problems, config, data, continue_kept=continue_kept)
    problems.raise_all()


def pairs_to_encode(parts: Sequence[PlannedDataset]) -> int:
    """How many pairs the cache lacks, wholly or in part."""
    number = 0
    for part in parts:
        lacking = {planned.pair.key for planned, _ in part.missing.prompts}
        lacking |= {planned.pair.key for planned in (*part.missing.masks.values(), *part.missing.differences.values())}
        every = {planned.pair.key: planned for planned in (*part.pairs, *part.validation_pairs)}
        tasks = {key: {task.key for task in planned.latent_tasks()} for key, planned in every.items()}
        number += len(lacking | {key for key, keys in tasks.items() if not keys.isdisjoint(part.missing.latents)})
    return number


def steps_done(config: TrainConfig) -> int:
    """Steps that the run in this folder has done already; 0 without a run."""
    return RunFolder(Path(config.run_dir)).steps_done()


def foreseen_plan(config: TrainConfig, network: NetworkSize, work: Workload, budget: Budget) -> MemoryPlan:
    """The memory plan that the run will choose. With `memory` manual the plan may not fit.

    Raises:
        OutOfMemoryError: `memory` is auto and no settings fit.
    """
    if config.memory.memory == "manual":
        return plan_memory(config, network, work)
    return choose_memory(config, network, work, budget)


class Outlook(NamedTuple):
    """Seconds until the end of a run and until its first pictures; None if the device's speed is not known.

    `first_pictures` is also None if no pictures are made.
    """

    seconds: float | None = None
    first_pictures: float | None = None


def outlook(plan: MemoryPlan, speed: Speed | None, *, done: int = 0) -> Outlook:
    """The outlook of a run with this plan that has done so many steps already. `speed`: None if it isn't known."""
    if speed is None:
        return Outlook()
    run = plan.config, plan.network, plan.work, speed
    return Outlook(duration(*run, done=done).total, until_first_pictures(*run, done=done))
