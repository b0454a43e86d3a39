"""A job file: read it, pair its folders, encode its datasets, and plan its memory and time."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .conditioning.encode import check_references, encode_planned, plan_dataset
from .conditioning.encoded import EncodedDataset
from .conditioning.encoders import Encoders
from .conditioning.encoding_plan import PlannedDataset
from .conditioning.mix import MixPart, mix_encoded, plan_mix
from .config import DEMO_MODEL, DatasetConfig, DatasetPartConfig, JobConfig, from_json
from .data.pairing import EditDataset, pair_folders
from .device import pick_device
from .disk import disk_errors
from .errors import ConfigError, DatasetError, Interrupted, OutOfMemoryError, Problems, TrainerError
from .events import SILENT, Observer
from .json_text import read_json
from .planning.choose import budget_of
from .planning.disk_space import DiskUse, cache_use, check_disk, disk_in_words
from .planning.encoding import encoding_in_words
from .planning.network import NetworkSize
from .planning.preparation import PreparedModel, check_training, prepare_model
from .planning.report import planned_in_words, time_before_encoding
from .planning.start import RunData, check_run
from .planning.workload import workload_of_pairs
from .presets import with_preset
from .qwen_image.base_model import BaseModel
from .ranks import SINGLE_PROCESS, Ranks
from .settings import changed
from .text import brief
from .written_path import control_problem, written_path

_MODEL_FILES = ("transformer_file", "text_encoder_file", "vae_file", "tokenizer")

_OF_SIMPLETUNER = ("model_family", "data_backend_config")  # settings by which its config.json is recognised

T = TypeVar("T")
PairedPart = tuple[DatasetPartConfig, EditDataset]
PlannedPart = tuple[DatasetPartConfig, PlannedDataset]


def load_job(path: Path, changes: Sequence[str] = (), *, preset: str = "") -> JobConfig:
    """Read a job file. `changes` (`name=value`) override its settings, and it overrides those of `preset`.

    Relative paths are relative to the file's folder.

    Raises:
        ConfigError: the file can't be read, isn't JSON or has a wrong setting.
    """
    try:
        values = read_json(path)
    except ConfigError as error:
        is_change = re.match(r"[a-z_]+(\.[a-z_]+)*=", str(path)) and path.suffix != ".json"
        raise ConfigError(f"{error} To change a setting, write --set {path}.") if is_change else error from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain an object with named settings, got {brief(values)}.")
    values = typing.cast("dict[str, Any]", values)
    if not values.keys().isdisjoint(_OF_SIMPLETUNER):
        raise ConfigError(
            f"{path} is a configuration of SimpleTuner. Convert it: python -m trainer_core import-simpletuner {path}"
        )
    values = changed(with_preset(values, preset) if preset else values, changes)
    return resolve_job(from_json(JobConfig, values), path.parent)


def resolve_job(job: JobConfig, folder: Path) -> JobConfig:
    """The job with its relative paths resolved against `folder`.

    Raises:
        ConfigError: a path contains control characters, or names an unknown user; lists all.
    """
    problems = Problems()

    def resolved_path(setting: str, name: str) -> str:
        if control := control_problem(name):
            problems.add(ConfigError(f"{setting} {control}."))
            return name
        path = problems.attempt(lambda: written_path(name, folder), setting) if name else None
        return name if path is None else str(path)

    def resolved(dataset: DatasetConfig, where: str) -> DatasetConfig:
        resolved_path(f"{where}.captions.caption_file", dataset.captions.caption_file)  # relative to target_dir
        return dataclasses.replace(
            dataset,
            target_dir=resolved_path(f"{where}.target_dir", dataset.target_dir),
            reference_dirs=tuple(resolved_path(f"{where}.reference_dirs", name) for name in dataset.reference_dirs),
            mask_dir=resolved_path(f"{where}.mask_dir", dataset.mask_dir),
        )

    model = job.model
    base = model.base if model.base == DEMO_MODEL else resolved_path("model.base", model.base)
    files = {name: resolved_path(f"model.{name}", getattr(model, name)) for name in _MODEL_FILES}
    frozen = tuple(
        dataclasses.replace(lora, file=resolved_path("model.frozen_loras", lora.file)) for lora in model.frozen_loras
    )
    few_steps = resolved_path("validation.validation_lora", job.validation.validation_lora)
    cache_dir = resolved_path("cache_dir", job.cache_dir)
    kept = resolved_path("model.quantised_cache_dir", model.quantised_cache_dir) or str(Path(cache_dir) / "quantised")
    found = dataclasses.replace(
        job,
        model=dataclasses.replace(model, base=base, quantised_cache_dir=kept, frozen_loras=frozen, **files),
        validation=dataclasses.replace(job.validation, validation_lora=few_steps),
        lora=dataclasses.replace(job.lora, init_lora=resolved_path("lora.init_lora", job.lora.init_lora)),
        dataset=resolved(job.dataset, "dataset") if job.dataset else None,
        datasets=tuple(
            dataclasses.replace(part, dataset=resolved(part.dataset, f"datasets.{part.id}.dataset"))
            for part in job.datasets
        ),
        cache_dir=cache_dir,
        run_dir=resolved_path("run_dir", job.run_dir),
    )
    problems.raise_all()
    return found


def pair_job(job: JobConfig, observer: Observer = SILENT) -> list[PairedPart]:
    """Each dataset of the job with its pairs.

    Raises:
        DatasetError: lists the problems of all datasets.
        ConfigError: a pair has more references than the flavour takes.
        JobError: several of these.
    """
    problems = Problems()
    paired = _paired(job, observer, problems)
    for part, dataset in paired:
        problems.attempt(lambda part=part, dataset=dataset: check_references(dataset, job.model, part.encoding))
    problems.raise_all()
    return paired


def _paired(job: JobConfig, observer: Observer, problems: Problems) -> list[PairedPart]:
    """Each dataset that can be paired. Adds the problems of the others, together."""
    paired: list[PairedPart] = []
    listed: list[str] = []
    notes: list[str] = []
    for part in job.parts():
        try:
            with disk_errors(Path(part.dataset.target_dir)):
                dataset = pair_folders(part.dataset, observer, checked_dir=Path(job.cache_dir) / "checked")
        except Interrupted:
            raise
        except TrainerError as error:
            if not job.datasets:
                problems.add(error)
            listed += [f"{part.id}: {each}" for each in getattr(error, "problems", ()) or (error,)]
            notes += [f"{part.id}: {each}" for each in getattr(error, "notes", ())]
        else:
            paired.append((part, dataset))
    if listed and job.datasets:
        problems.add(DatasetError(f"The datasets have {len(listed)} problems. Fix them and run again:", listed, notes))
    return paired


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedJob:
    """What the checks of a job found. What could not be made because of `problems` is missing.

    `planned`: the datasets, with what the cache lacks. `disk`: what will be written. `notes`: sentences about tight
    disk space, pairs without references, and validation pictures that can't be measured.
    """

    problems: Problems
    paired: Sequence[PairedPart]
    planned: Sequence[PlannedPart]
    model: PreparedModel | None
    disk: Sequence[DiskUse] = ()
    notes: Sequence[str] = ()

    def raise_problems(self) -> None:
        """Raise the problem if there is one, or a JobError that lists them."""
        self.problems.raise_all()


def check_job(
    job: JobConfig,
    observer: Observer = SILENT,
    ranks: Ranks = SINGLE_PROCESS,
    *,
    trains_here: bool = True,
    continue_kept: bool = False,
) -> CheckedJob:
    """Find all that encoding and training would refuse, from settings, headers and folders.

    The commands check, plan, encode and train call this before any time is spent. It writes only the results of the
    picture check. With `trains_here` False it leaves out what matters only where the training runs: its device, its
    packages and its run folder.

    Raises:
        Interrupted: the observer asked to stop. All other errors are collected in `problems`.
    """
    problems, base, config = Problems(), BaseModel(job.model), job.train_config("-")
    model = _attempt(problems, job, lambda: (check_training if trains_here else prepare_model)(config, base))
    paired = _paired(job, observer, problems)
    planned = _planned(job, paired, problems, partial(plan_dataset, base=base, ranks=ranks, observer=observer))
    checked = CheckedJob(problems=problems, paired=paired, planned=planned, model=model)
    if len(planned) < len(job.parts()):
        return checked
    together = _attempt(problems, job, lambda: planned_datasets(job, planned))
    if together is None:
        return checked
    every, (encoded, held_out) = [dataset for _, dataset in planned], together
    data = RunData(trained=trained_parts(job, planned), every=every, encoded=encoded, held_out=held_out)
    here = {"continue_kept": continue_kept, "trains_here": trains_here}
    found = check_run(problems, config, data, model=lambda: model, **here)
    return replace(checked, disk=found.disk, notes=found.notes)


def _planned(
    job: JobConfig, paired: Sequence[PairedPart], problems: Problems, plan: Callable[..., PlannedDataset]
) -> list[PlannedPart]:
    """Each dataset that can be planned. Adds the problems of the others. `plan` is `plan_dataset` with the other
    arguments."""
    planned: list[PlannedPart] = []
    for part, dataset in paired:
        plan_part = partial(plan, dataset, encoding=part.encoding, cache_dir=Path(job.cache_dir))
        if found := _attempt(problems, job, plan_part, part.id if job.datasets else ""):
            planned.append((part, found))
    return planned


def _attempt(problems: Problems, job: JobConfig, check: Callable[[], T], where: str = "") -> T | None:
    """The result of `check`, or None if it fails, also because of the disk."""

    def explained() -> T:
        with disk_errors(Path(job.cache_dir)):
            return check()

    return problems.attempt(explained, where)


def encode_job(
    job: JobConfig, observer: Observer = SILENT, ranks: Ranks = SINGLE_PROCESS
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """The encoded training dataset, and the validation dataset that `eval_dataset_id` names. `ranks` share the work.

    Raises:
        DatasetError, ConfigError, ModelFileError, DiskError, Interrupted: see `encode_dataset`.
        JobError: lists all problems, if there are several.
    """
    checked = check_job(job, observer, ranks, trains_here=False)
    checked.raise_problems()
    return encode_parts(job, checked.planned, observer)


def plan_parts(
    job: JobConfig, paired: Sequence[PairedPart], encoders: Encoders | None = None, observer: Observer = SILENT
) -> list[PlannedPart]:
    """Each dataset with what the cache lacks. `encoders` replaces the base model's encoders.

    Raises:
        ConfigError, DatasetError, ModelFileError, DiskError: see `plan_dataset` and `check_disk`.
        JobError: lists the problems of all datasets, if there are several.
        Interrupted: the observer asked to stop.
    """
    problems, base = Problems(), BaseModel(job.model)
    plan = partial(plan_dataset, base=base, encoders=encoders, observer=observer)
    planned = _planned(job, paired, problems, plan)
    problems.raise_all()
    planned_datasets(job, planned)
    check_disk(cache_use([dataset for _, dataset in planned]))
    return planned


def encode_parts(
    job: JobConfig, planned: Sequence[PlannedPart], observer: Observer = SILENT
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """`encode_job` for datasets that are already planned."""
    with disk_errors(Path(job.cache_dir)):
        parts = [(part, encode_planned(dataset, observer)) for part, dataset in planned]
        return _together(job, parts, mix_encoded)


def trained_parts(job: JobConfig, planned: Sequence[PlannedPart]) -> list[PlannedDataset]:
    """The datasets with pairs that are trained, not only validated."""
    return [found for part, found in planned if part.id not in job.eval_dataset_id and part.probability > 0]


def planned_datasets(job: JobConfig, planned: Sequence[PlannedPart]) -> tuple[EncodedDataset, EncodedDataset | None]:
    """What `encode_parts` will return. The files of these datasets may not be written yet.

    Raises:
        ConfigError, DatasetError: see `plan_mix`.
    """
    return _together(job, [(part, dataset.encoded()) for part, dataset in planned], plan_mix)


def _together(
    job: JobConfig, parts: Sequence[tuple[DatasetPartConfig, EncodedDataset]], mix: Callable[..., EncodedDataset]
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """The training dataset and the validation dataset of a job. `mix` is `mix_encoded` or `plan_mix`."""
    if not job.datasets:
        return parts[0][1], None
    kinds: dict[bool, list[MixPart]] = {False: [], True: []}
    for part, encoded in parts:
        turns = MixPart(
            encoded=encoded,
            repeats=part.repeats,
            probability=part.probability,
            is_regularisation=part.is_regularisation_data,
            timestep_sampling_offset=part.timestep_sampling_offset,
        )
        kinds[part.id in job.eval_dataset_id].append(turns)
    cache_dir = Path(job.cache_dir)
    validation = mix(kinds[True], cache_dir, validation_only=True) if kinds[True] else None
    return mix(kinds[False], cache_dir), validation


def time_of_job(job: JobConfig, planned: Sequence[PlannedPart], network: NetworkSize) -> str:
    """How long encoding and training take together; "" if all is encoded, or if this device can't be measured."""
    work = workload_of_pairs([dataset for _, dataset in planned], job.batching, job.validation)
    if not any(work.encoding):
        return ""
    device, processes = pick_device(job.model.device), planned[0][1].ranks.on_machine
    budget = budget_of(device, job.memory.vram_gib, processes=processes)
    return time_before_encoding(job.train_config("plan"), network, work, budget, device)


def plan_job(job: JobConfig, vram_gib: float = 0.0, observer: Observer = SILENT) -> tuple[str, bool]:
    """A report on the memory and disk space that the job needs, and whether it can run on this machine, or on a card
    of `vram_gib`.

    Reads only the pictures' headers and estimates the prompts' lengths.

    Raises:
        DatasetError, ConfigError, ModelFileError, JobError: the job has problems because of which it can't be planned.
    """
    other_card = vram_gib or job.memory.vram_gib
    checked = check_job(job, observer, trains_here=not other_card)
    if checked.model is None or len(checked.planned) < len(job.parts()):
        checked.raise_problems()
    assert checked.model is not None
    base, planned = checked.model.base, [dataset for _, dataset in checked.planned]
    work = workload_of_pairs(planned, job.batching, job.validation)
    device = pick_device(job.model.device)
    budget = budget_of(device, other_card)
    text, fits = planned_in_words(
        job.train_config("plan"), checked.model.size, work, budget, None if other_card else device
    )
    more = [disk_in_words(checked.disk)]
    if any(work.encoding):
        encoding, can_be_encoded = encoding_in_words(base, work.encoding.largest_picture, budget)
        more, fits = [encoding, *more], fits and can_be_encoded
    others = [error for error in checked.problems.errors if not isinstance(error, OutOfMemoryError)]  # `text` has it
    more += [*checked.notes, *map(str, others)]
    return "\n\n".join([text, *filter(None, more)]), fits and not checked.problems.errors
