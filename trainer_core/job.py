"""A job file: read it, pair its folders, encode its datasets, and plan its memory and time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from .conditioning.encode import check_references, encode_planned, plan_dataset
from .conditioning.encoded import EncodedDataset
from .conditioning.encoders import Encoders
from .conditioning.encoding_plan import PlannedDataset
from .conditioning.mix import MixPart, mix_encoded
from .config import DEMO_MODEL, DatasetConfig, DatasetPartConfig, JobConfig, from_json
from .data.pairing import EditDataset, pair_folders
from .device import pick_device
from .errors import ConfigError, DatasetError
from .events import SILENT, Observer
from .json_text import read_json
from .planning.choose import budget_of
from .planning.encoding import encoding_in_words
from .planning.network import NetworkSize
from .planning.preparation import prepare_model
from .planning.report import planned_in_words, time_before_encoding
from .planning.workload import workload_of_pairs
from .presets import with_preset
from .qwen_image.base_model import BaseModel
from .ranks import SINGLE_PROCESS, Ranks
from .settings import changed

_MODEL_FILES = ("transformer_file", "text_encoder_file", "vae_file", "tokenizer")

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
    if isinstance(values, dict):
        values = changed(with_preset(values, preset) if preset else values, changes)
    return resolve_job(from_json(JobConfig, values), path.parent)


def resolve_job(job: JobConfig, folder: Path) -> JobConfig:
    """The job with its relative paths resolved against `folder`."""

    def resolved_path(name: str) -> str:
        return str(folder / Path(name).expanduser()) if name else name

    def resolved(dataset: DatasetConfig) -> DatasetConfig:
        return dataclasses.replace(
            dataset,
            target_dir=resolved_path(dataset.target_dir),
            reference_dirs=tuple(map(resolved_path, dataset.reference_dirs)),
            mask_dir=resolved_path(dataset.mask_dir),
        )

    base = job.model.base if job.model.base == DEMO_MODEL else resolved_path(job.model.base)
    files = {name: resolved_path(getattr(job.model, name)) for name in _MODEL_FILES}
    kept = resolved_path(job.model.quantised_cache_dir or str(Path(job.cache_dir) / "quantised"))
    return dataclasses.replace(
        job,
        model=dataclasses.replace(job.model, base=base, quantised_cache_dir=kept, **files),
        lora=dataclasses.replace(job.lora, init_lora=resolved_path(job.lora.init_lora)),
        dataset=resolved(job.dataset) if job.dataset else None,
        datasets=tuple(dataclasses.replace(part, dataset=resolved(part.dataset)) for part in job.datasets),
        cache_dir=resolved_path(job.cache_dir),
        run_dir=resolved_path(job.run_dir),
    )


def pair_job(job: JobConfig, observer: Observer = SILENT) -> list[PairedPart]:
    """Each dataset of the job with its pairs.

    Raises:
        DatasetError: lists the problems of all datasets.
        ConfigError: a pair has more references than the flavour takes.
    """
    paired: list[PairedPart] = []
    problems: list[str] = []
    for part in job.parts():
        try:
            dataset = pair_folders(part.dataset, observer, checked_dir=Path(job.cache_dir) / "checked")
        except DatasetError as error:
            if not job.datasets:
                raise
            problems += [f"{part.id}: {each}" for each in error.problems or (error.summary,)]
        else:
            paired.append((part, dataset))
    if problems:
        raise DatasetError(f"The datasets have {len(problems)} problems. Fix them and run again:", problems)
    for part, dataset in paired:
        check_references(dataset, job.model, part.encoding)
    return paired


def encode_job(
    job: JobConfig, observer: Observer = SILENT, ranks: Ranks = SINGLE_PROCESS, base: BaseModel | None = None
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """The encoded training dataset, and the validation dataset that `eval_dataset_id` names. `ranks` share the work.

    Raises:
        DatasetError, ConfigError, ModelFileError, Interrupted: see `pair_job` and `encode_dataset`.
    """
    return encode_parts(job, plan_parts(job, pair_job(job, observer), ranks=ranks, base=base), observer)


def plan_parts(
    job: JobConfig,
    paired: Sequence[PairedPart],
    encoders: Encoders | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    base: BaseModel | None = None,
) -> list[PlannedPart]:
    """Each dataset with what the cache lacks of it. `encoders` replaces the base model's encoders.

    Raises:
        ConfigError, DatasetError, ModelFileError: see `plan_dataset`.
    """
    cache_dir, base = Path(job.cache_dir), base or BaseModel(job.model)
    return [(part, plan_dataset(dataset, base, part.encoding, cache_dir, encoders, ranks)) for part, dataset in paired]


def encode_parts(
    job: JobConfig, planned: Sequence[PlannedPart], observer: Observer = SILENT
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """`encode_job` for datasets that are already planned."""
    parts: dict[bool, list[MixPart]] = {False: [], True: []}
    for part, dataset in planned:
        turns = MixPart(encoded=encode_planned(dataset, observer), repeats=part.repeats, probability=part.probability)
        parts[part.id in job.eval_dataset_id].append(turns)
    trained, validated = parts[False], parts[True]
    if not job.datasets:
        return trained[0].encoded, None
    cache_dir = Path(job.cache_dir)
    validation = mix_encoded(validated, cache_dir, validation_only=True) if validated else None
    return mix_encoded(trained, cache_dir), validation


def time_of_job(job: JobConfig, planned: Sequence[PlannedPart], network: NetworkSize) -> str:
    """How long encoding and training take together; "" if all is encoded, or if this device can't be measured."""
    work = workload_of_pairs([dataset for _, dataset in planned], job.batching, job.validation)
    if not any(work.encoding):
        return ""
    device, processes = pick_device(job.model.device), planned[0][1].ranks.on_machine
    budget = budget_of(device, job.memory.vram_gib, processes=processes)
    return time_before_encoding(job.train_config("plan"), network, work, budget, device)


def plan_job(job: JobConfig, vram_gib: float = 0.0, observer: Observer = SILENT) -> tuple[str, bool]:
    """A report on the memory that the job needs, and whether it fits on this machine, or on a card of `vram_gib`.

    Reads only the pictures' headers and estimates the prompts' lengths.
    """
    config, base = job.train_config("plan"), BaseModel(job.model)
    planned = plan_parts(job, pair_job(job, observer), base=base)
    work = workload_of_pairs([dataset for _, dataset in planned], job.batching, job.validation)
    device, other_card = pick_device(job.model.device), vram_gib or job.memory.vram_gib
    budget = budget_of(device, other_card)
    size = prepare_model(config, base).size
    text, fits = planned_in_words(config, size, work, budget, None if other_card else device)
    if not any(work.encoding):
        return text, fits
    encoding, can_be_encoded = encoding_in_words(base, work.encoding.largest_picture, budget)
    return f"{text}\n\n{encoding}", fits and can_be_encoded
