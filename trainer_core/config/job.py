"""Settings of a whole run, and of the file that `python -m trainer_core` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk import MAX_NAME_BYTES
from ..errors import ConfigError
from ..settings import Limits, Settings, check, merged, required, setting, to_json, unused_fields
from .caption_drafts import CaptionDraftConfig
from .dataset import DatasetConfig, DatasetPartConfig, EncodingConfig
from .ema import EmaConfig, check_ema
from .memory import MemoryConfig
from .model import ModelConfig
from .optimizer import ENDLESS, OptimizerConfig, check_warmup
from .pair_check import PairCheckConfig
from .preservation import USUAL_PROMPTS, PreservationConfig
from .training import (
    BatchingConfig,
    CheckpointConfig,
    ExportConfig,
    LoraConfig,
    NoiseConfig,
    RolloutConfig,
)
from .validation import ValidationConfig

_LONGEST_SUFFIX = "-99-ema.safetensors"  # a number if the name is taken, the EMA, and the extension


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings(Settings):
    """Settings that a job file and a TrainConfig have in common."""

    run_dir: str = required(
        "The run folder: configuration, metrics, samples, checkpoints and the LoRA file.",
        Limits(valid=bool, allowed="a folder"),
    )
    model: ModelConfig = setting(ModelConfig(), "The base model.")
    max_train_steps: int = setting(1000, "Number of optimizer steps.", Limits(min=1, max=1_000_000))
    seed: int = setting(
        0, "Seed of all random draws: adapter, order of pairs, noise.", Limits(soft_min=0, soft_max=2**32 - 1)
    )
    gradient_checkpointing: bool = setting(
        True,
        "Recompute activations in the backward pass. Needs less VRAM, but is slower. Applies if memory is manual.",
    )
    lora: LoraConfig = setting(LoraConfig(), "The adapter.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "The optimizer and the learning rate schedule.")
    noise: NoiseConfig = setting(NoiseConfig(), "The noise levels and the loss.")
    batching: BatchingConfig = setting(BatchingConfig(), "The batches.")
    checkpoints: CheckpointConfig = setting(CheckpointConfig(), "The checkpoints.")
    validation: ValidationConfig = setting(ValidationConfig(), "The validation.")
    export: ExportConfig = setting(ExportConfig(), "The LoRA file.")
    rollout: RolloutConfig = setting(RolloutConfig(), "Scheduled sampling.")
    memory: MemoryConfig = setting(MemoryConfig(), "The use of memory.")
    ema: EmaConfig = setting(EmaConfig(), "The moving average of the adapter's weights.")
    preservation: PreservationConfig = setting(PreservationConfig(), "What keeps the base model's other edits.")

    def check_combinations(self) -> None:
        """Checks that the parts work together, and that the LoRA file's name is not too long."""
        name = self.export.lora_name or Path(self.run_dir).name
        named_in = "export.lora_name" if self.export.lora_name else "run_dir"
        longest = MAX_NAME_BYTES - len(_LONGEST_SUFFIX)
        fits = len(name.encode(errors="replace")) <= longest
        allowed = f"at most {longest} bytes long, because the LoRA file gets this name"
        check(fits, named_in, name, allowed)
        check_warmup(self.optimizer, self.max_train_steps)
        check_ema(self.ema, self.optimizer)


def encoding_for(encoding: EncodingConfig, training: TrainingSettings) -> EncodingConfig:
    """The encoding, with the prompts that this training needs besides the captions."""
    if training.batching.caption_dropout_probability > 0:
        encoding = dataclasses.replace(encoding, encode_empty_caption=True)
    if training.noise.needs_pixels:
        encoding = dataclasses.replace(encoding, encode_pixel_difference=True)
    if training.preservation.preservation_probability > 0 and not encoding.preservation_prompts:
        encoding = dataclasses.replace(encoding, preservation_prompts=USUAL_PROMPTS)
    return encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(TrainingSettings):
    """One training run."""

    encoded: str = required("Manifest of the encoded dataset.")
    validation_encoded: str = setting(
        "", "Manifest of a second encoded dataset. If given, its held-out pairs are validated instead."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig(TrainingSettings):
    """Everything that `python -m trainer_core` needs, in one JSON file. Relative paths start at its folder."""

    model: ModelConfig = required("The base model.")
    dataset: DatasetConfig | None = setting(None, "The folders of pictures.", unless="datasets")
    cache_dir: str = required("Folder of the encoded pairs.")
    encoding: EncodingConfig = setting(EncodingConfig(), "The encoding.")
    pair_check: PairCheckConfig = setting(PairCheckConfig(), "Limits of the `check` command.")
    caption_drafts: CaptionDraftConfig = setting(CaptionDraftConfig(), "Settings of the `caption` command.")
    datasets: tuple[DatasetPartConfig, ...] = setting((), "Several datasets in one run, instead of `dataset`.")
    eval_dataset_id: tuple[str, ...] = setting(
        (),
        "Ids of those `datasets` that are only validated and not trained. No pairs of the other datasets "
        "are held out then.",
    )

    def check_combinations(self) -> None:
        """Checks `dataset` or `datasets`: one of them is given, ids are unique, and a dataset is left to train on."""
        if bool(self.datasets) == (self.dataset is not None):
            given = "both" if self.datasets else "neither"
            raise ConfigError(f"Exactly one of dataset and datasets must be given, got {given}.")
        ids = [part.id for part in self.datasets]
        for each in ids:
            check(ids.count(each) == 1, "datasets", each, "a list in which each dataset has an id of its own")
        for each in self.eval_dataset_id:
            check(each in ids, "eval_dataset_id", each, f"an id in `datasets` ({', '.join(ids) or 'there are none'})")
        trained = not ids or set(ids) > set(self.eval_dataset_id)
        allowed = "a list that leaves a dataset to train on"
        check(trained, "eval_dataset_id", list(self.eval_dataset_id), allowed)
        TrainingSettings.check_combinations(self)

    @staticmethod
    def prepare_json(values: dict[str, Any]) -> dict[str, Any]:
        """Fills the encoding of each dataset from `encoding`. Drops `$schema`, which only editors read."""
        values, shared = dict(values), values.get("encoding", {})
        values.pop("$schema", None)
        parts = values.get("datasets")
        if isinstance(parts, list) and isinstance(shared, dict):
            common = {"encoding": shared} if shared else {}
            values["datasets"] = [merged(common, part) if isinstance(part, dict) else part for part in parts]
        return values

    def parts(self) -> tuple[DatasetPartConfig, ...]:
        """The datasets to encode. `dataset` gets the id "dataset".

        Their encoding includes all that the training needs besides the captions, and holds out pairs as eval_dataset_id
        says. No regularisation data is held out otherwise.
        """
        if self.dataset is not None:
            return (DatasetPartConfig(id="dataset", dataset=self.dataset, encoding=self._encoding(self.encoding)),)
        return tuple(dataclasses.replace(part, encoding=self._encoding(part.encoding, part)) for part in self.datasets)

    def _encoding(self, encoding: EncodingConfig, part: DatasetPartConfig | None = None) -> EncodingConfig:
        encoding = encoding_for(encoding, self)
        if part is not None and part.is_regularisation_data:  # which preserves with its own captions
            encoding = dataclasses.replace(encoding, preservation_prompts=())
        if part is None or not (self.eval_dataset_id or part.is_regularisation_data):
            return encoding
        count = -1 if part.id in self.eval_dataset_id else 0
        return dataclasses.replace(encoding, num_eval_images=count, train_eval_images=False)

    def train_config(self, encoded: str, validation_encoded: str = "") -> TrainConfig:
        """The training settings, for datasets with these manifests."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainingSettings)}
        return TrainConfig(encoded=encoded, validation_encoded=validation_encoded, **shared)


# Model settings that don't change the trained weights, or that are part of the encoded dataset's name already.
_NOT_OF_WEIGHTS = (
    "device",
    "quantize_via",
    "text_encoder_file",
    "text_encoder_precision",
    "vae_file",
    "quantised_cache_gb",
    "quantised_cache_dir",
)


def resume_key(config: TrainConfig, num_ranks: int = 1) -> dict[str, Any]:
    """The settings that determine the trained weights. A run resumes only if its key is equal.

    Validation, checkpoints, export, memory and device may change between starts. So may the number of steps, if the
    learning rate does not depend on it, and the number of processes (`num_ranks`) that share a step's micro-batches.
    """
    key = to_json(config)
    key["batching"]["gradient_accumulation_steps"] *= num_ranks
    for name in (
        "run_dir",
        "validation_encoded",
        "checkpoints",
        "validation",
        "export",
        "gradient_checkpointing",
        "memory",
    ):
        del key[name]
    if config.optimizer.lr_scheduler in ENDLESS:
        del key["max_train_steps"]
    _reduce_ema(key)
    key["encoded"] = Path(config.encoded).stem.split("-")[0]  # a hash of the training data
    model = key["model"]
    for name in _NOT_OF_WEIGHTS:
        del model[name]
    model["base"], model["tokenizer"] = Path(config.model.base).name, ""
    model["transformer_file"] = Path(config.model.transformer_file).name
    for lora in model["frozen_loras"]:
        lora["file"] = Path(lora["file"]).name
    key["lora"]["init_lora"] = Path(config.lora.init_lora).name
    return key


def completed_key(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored resume key of an older version, with defaults for the settings that it did not have."""
    average = EmaConfig(use_ema="ema" in stored)
    return merged(resume_key(TrainConfig(run_dir="-", encoded="-", ema=average)), dict(stored))


def unused_settings(key: Mapping[str, Any]) -> set[str]:
    """Dotted names of the settings that change nothing beside the other ones in a resume key."""
    found = set[str]()
    for part in dataclasses.fields(TrainConfig):
        values = key.get(part.name)
        if isinstance(part.default, Settings) and isinstance(values, dict):
            found |= {f"{part.name}.{each.name}" for each in unused_fields(part.default, values)}
    return found


def _reduce_ema(key: dict[str, Any]) -> None:
    """Keeps only the EMA settings that determine the average, or none if EMA is off."""
    ema = key.pop("ema")
    if ema["use_ema"]:
        key["ema"] = {name: ema[name] for name in ("use_ema", "ema_decay", "ema_update_interval")}
