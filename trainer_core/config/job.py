"""Settings of a whole run, and of the file that `python -m trainer_core` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import check, merged, required, setting, to_json
from .dataset import DatasetConfig, DatasetPartConfig, EncodingConfig, PairCheckConfig
from .ema import EmaConfig, check_ema
from .memory import MemoryConfig, check_streaming
from .model import ModelConfig
from .optimizer import ENDLESS, OptimizerConfig, check_warmup
from .training import (
    BatchingConfig,
    CheckpointConfig,
    ExportConfig,
    LoraConfig,
    NoiseConfig,
    RolloutConfig,
)
from .validation import ValidationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    run_dir: str = required("The run folder: configuration, metrics, samples, checkpoints and the LoRA file.")
    encoded: str = required("Manifest of the encoded dataset.")
    validation_encoded: str = setting(
        "", "Manifest of a second encoded dataset, whose held-out pairs are validated on instead of the first one's."
    )
    max_train_steps: int = setting(1000, "Optimizer steps.")
    seed: int = setting(0, "Of every random draw: adapter, order, noise.")
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass: less memory, more time.")
    model: ModelConfig = setting(ModelConfig(), "The base model.")
    lora: LoraConfig = setting(LoraConfig(), "The adapter.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "The optimizer.")
    noise: NoiseConfig = setting(NoiseConfig(), "The noise levels.")
    batching: BatchingConfig = setting(BatchingConfig(), "The batches.")
    checkpoints: CheckpointConfig = setting(CheckpointConfig(), "The checkpoints.")
    validation: ValidationConfig = setting(ValidationConfig(), "The validation.")
    export: ExportConfig = setting(ExportConfig(), "The LoRA file.")
    rollout: RolloutConfig = setting(RolloutConfig(), "Scheduled sampling.")
    memory: MemoryConfig = setting(MemoryConfig(), "The memory.")
    ema: EmaConfig = setting(EmaConfig(), "The running average of the adapter's weights.")

    def __post_init__(self) -> None:
        check(1 <= self.max_train_steps <= 1_000_000, "max_train_steps", self.max_train_steps, "1 to 1000000")
        check(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        check_warmup(self.optimizer, self.max_train_steps)
        check_streaming(self.memory, self.lora)
        check_ema(self.ema, self.optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Everything `python -m trainer_core` needs, in one JSON file. Relative paths start at that file."""

    model: ModelConfig = required("The base model.")
    dataset: DatasetConfig | None = setting(None, "The folders of pictures.", unless="datasets")
    cache_dir: str = required("Where encoded pairs are kept.")
    run_dir: str = required("The run folder.")
    encoding: EncodingConfig = setting(EncodingConfig(), "The encoding.")
    max_train_steps: int = setting(1000, "Optimizer steps.")
    seed: int = setting(0, "Of every random draw.")
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass.")
    lora: LoraConfig = setting(LoraConfig(), "The adapter.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "The optimizer.")
    noise: NoiseConfig = setting(NoiseConfig(), "The noise levels.")
    batching: BatchingConfig = setting(BatchingConfig(), "The batches.")
    checkpoints: CheckpointConfig = setting(CheckpointConfig(), "The checkpoints.")
    validation: ValidationConfig = setting(ValidationConfig(), "The validation.")
    export: ExportConfig = setting(ExportConfig(), "The LoRA file.")
    memory: MemoryConfig = setting(MemoryConfig(), "The memory.")
    pair_check: PairCheckConfig = setting(PairCheckConfig(), "Limits of `check`.")
    datasets: tuple[DatasetPartConfig, ...] = setting((), "Several datasets in one run, instead of `dataset`.")
    eval_dataset_id: tuple[str, ...] = setting(
        (),
        "Id, or list of ids, of those `datasets` that are validated on and not trained on; nothing else is held out "
        "then.",
    )
    rollout: RolloutConfig = setting(RolloutConfig(), "Scheduled sampling.")
    ema: EmaConfig = setting(EmaConfig(), "The running average of the adapter's weights.")

    def __post_init__(self) -> None:
        if bool(self.datasets) == (self.dataset is not None):
            given = "both" if self.datasets else "neither"
            raise ConfigError(f"dataset and datasets are {given}; allowed is one of them: datasets is for several.")
        ids = [part.id for part in self.datasets]
        for each in ids:
            check(ids.count(each) == 1, "datasets", each, "an id of its own for each dataset")
        for each in self.eval_dataset_id:
            check(each in ids, "eval_dataset_id", each, f"an id of `datasets`: {', '.join(ids) or 'there is none'}")
        trained = not ids or set(ids) > set(self.eval_dataset_id)
        check(trained, "eval_dataset_id", list(self.eval_dataset_id), "to leave a dataset to train on")
        check_warmup(self.optimizer, self.max_train_steps)
        check_streaming(self.memory, self.lora)
        check_ema(self.ema, self.optimizer)

    @staticmethod
    def prepare_json(values: dict[str, Any]) -> dict[str, Any]:
        """What a dataset does not say of its encoding is as in `encoding`; one eval_dataset_id is a list of one."""
        values, shared = dict(values), values.get("encoding", {})
        if isinstance(values.get("eval_dataset_id"), str):
            values["eval_dataset_id"] = [values["eval_dataset_id"]]
        parts = values.get("datasets")
        if isinstance(parts, list) and isinstance(shared, dict):
            common = {"encoding": shared} if shared else {}
            values["datasets"] = [merged(common, part) if isinstance(part, dict) else part for part in parts]
        return values

    def parts(self) -> tuple[DatasetPartConfig, ...]:
        """The datasets to encode: with empty captions if the training asks for them, held out as eval_dataset_id says.

        A single one has the id `dataset`.
        """
        if self.dataset is not None:
            return (DatasetPartConfig(id="dataset", dataset=self.dataset, encoding=self._encoding(self.encoding)),)
        return tuple(
            dataclasses.replace(part, encoding=self._encoding(part.encoding, part.id)) for part in self.datasets
        )

    def _encoding(self, encoding: EncodingConfig, part_id: str = "") -> EncodingConfig:
        if self.batching.caption_dropout_probability > 0:
            encoding = dataclasses.replace(encoding, encode_empty_caption=True)
        if not self.eval_dataset_id:
            return encoding
        return dataclasses.replace(encoding, num_eval_images=-1 if part_id in self.eval_dataset_id else 0)

    def train_config(self, encoded: str, validation_encoded: str = "") -> TrainConfig:
        """The training part, for datasets encoded at these manifests."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} - {"encoded", "validation_encoded"}
        own = {name: getattr(self, name) for name in shared}
        return TrainConfig(encoded=encoded, validation_encoded=validation_encoded, **own)


# Of the model: where and how it is loaded, and what the encoded dataset's name holds already.
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
    """The settings that decide the trained weights. A run folder only goes on under equal ones.

    Validation, checkpoints, export and the device may change on the way; so may the number of steps as long as the
    learning rate does not depend on it, and the number of processes that share out a step's micro-batches.
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
    _keep_what_decides_the_average(key)
    key["encoded"] = Path(config.encoded).stem.split("-")[0]  # named by the content that is trained on
    model = key["model"]
    for name in _NOT_OF_WEIGHTS:
        del model[name]
    model["base"], model["tokenizer"] = Path(config.model.base).name, ""
    model["transformer_file"] = Path(config.model.transformer_file).name
    key["lora"]["init_lora"] = Path(config.lora.init_lora).name
    return key


def completed_key(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A resume key as this version writes it: settings that came after it was stored have their defaults."""
    average = EmaConfig(use_ema="ema" in stored)
    return merged(resume_key(TrainConfig(run_dir="-", encoded="-", ema=average)), dict(stored))


def _keep_what_decides_the_average(key: dict[str, Any]) -> None:
    """Of the EMA's settings those that decide its weights; none where there is none."""
    ema = key.pop("ema")
    if ema["use_ema"]:
        key["ema"] = {name: ema[name] for name in ("use_ema", "ema_decay", "ema_update_interval")}
