"""Settings of a whole run, and of the file that `python -m trainer_core` reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..settings import check, required, setting, to_json
from .dataset import DatasetConfig, EncodingConfig, PairCheckConfig
from .model import ModelConfig
from .training import (
    BatchingConfig,
    CheckpointConfig,
    ExportConfig,
    LoraConfig,
    NoiseConfig,
    OptimizerConfig,
    ValidationConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    run_dir: str = required("The run folder: configuration, metrics, samples, checkpoints and the LoRA file.")
    encoded: str = required("Manifest of the encoded dataset.")
    validation_encoded: str = setting(
        "", "Manifest of a second encoded dataset to validate on, besides held-out pairs."
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

    def __post_init__(self) -> None:
        check(1 <= self.max_train_steps <= 1_000_000, "max_train_steps", self.max_train_steps, "1 to 1000000")
        check(bool(self.run_dir), "run_dir", self.run_dir, "a folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Everything `python -m trainer_core` needs, in one JSON file. Relative paths start at that file."""

    model: ModelConfig = required("The base model.")
    dataset: DatasetConfig = required("The folders of pictures.")
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
    pair_check: PairCheckConfig = setting(PairCheckConfig(), "Limits of `check`.")

    def encoding_config(self) -> EncodingConfig:
        """The encoding, with the empty caption if the training will ask for it."""
        if self.batching.caption_dropout_probability == 0:
            return self.encoding
        return dataclasses.replace(self.encoding, encode_empty_caption=True)

    def train_config(self, encoded: str) -> TrainConfig:
        """The training part, for the dataset encoded at `encoded`."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} - {"encoded", "validation_encoded"}
        return TrainConfig(encoded=encoded, **{name: getattr(self, name) for name in shared})


def resume_key(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the trained weights. A run folder only goes on under equal ones.

    Validation, checkpoints, export and the device may change on the way; so may the number of steps as long as the
    learning rate does not depend on it.
    """
    key = to_json(config)
    for name in ("run_dir", "validation_encoded", "checkpoints", "validation", "export", "gradient_checkpointing"):
        del key[name]
    if config.optimizer.lr_scheduler == "constant_with_warmup":
        del key["max_train_steps"]
    key["encoded"] = Path(config.encoded).stem  # named by its content
    model = key["model"]
    del model["device"], model["quantize_via"], model["text_encoder_file"], model["vae_file"]
    model["base"], model["tokenizer"] = Path(config.model.base).name, ""
    model["transformer_file"] = Path(config.model.transformer_file).name
    return key
