"""The pack's own socket types and their values: frozen dataclasses, never networks.

Saved workflows contain the type names, so the names never change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    EmaConfig,
    JobConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    PreservationConfig,
    RolloutConfig,
    SizeConfig,
    ValidationConfig,
)

if TYPE_CHECKING:
    from ..trainer_core.job import PairedPart

Model = io.Custom("QWEN_EDIT_MODEL")  # ModelConfig
Dataset = io.Custom("QWEN_EDIT_DATASET")  # EditDataset
Encoded = io.Custom("QWEN_EDIT_ENCODED")  # EncodedDataset
CaptionSettings = io.Custom("QWEN_EDIT_CAPTION_SETTINGS")  # CaptionConfig
SizeSettings = io.Custom("QWEN_EDIT_SIZE_SETTINGS")  # SizeConfig
ReferenceSettings = io.Custom("QWEN_EDIT_REFERENCE_SETTINGS")  # ReferencesSeen
LoraSettings = io.Custom("QWEN_EDIT_LORA_SETTINGS")  # LoraConfig
OptimizerSettings = io.Custom("QWEN_EDIT_OPTIMIZER_SETTINGS")  # OptimizerConfig
TrainingSettings = io.Custom("QWEN_EDIT_TRAINING_SETTINGS")  # LoopSettings
RolloutSettings = io.Custom("QWEN_EDIT_ROLLOUT_SETTINGS")  # RolloutConfig
MemorySettings = io.Custom("QWEN_EDIT_MEMORY_SETTINGS")  # MemoryConfig
EmaSettings = io.Custom("QWEN_EDIT_EMA_SETTINGS")  # EmaConfig
PreservationSettings = io.Custom("QWEN_EDIT_PRESERVATION_SETTINGS")  # PreservationGiven
ValidationSettings = io.Custom("QWEN_EDIT_VALIDATION_SETTINGS")  # ValidationConfig
Run = io.Custom("QWEN_EDIT_RUN")  # FinishedRun
Imported = io.Custom("QWEN_EDIT_IMPORTED")  # ImportedJob
MoreSettings = io.Custom("QWEN_EDIT_MORE_SETTINGS")  # MoreSettingsGiven


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencesSeen:
    """Output of the reference settings node: conditioning type by folder, and arguments of EncodingConfig."""

    conditioning_types: tuple[Any, ...] = ("auto", "auto", "auto")
    encoding: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Output of the training settings node."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    gradient_checkpointing: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PreservationGiven:
    """Output of the preservation settings node: for the training, and the prompts to encode."""

    config: PreservationConfig = field(default_factory=PreservationConfig)
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AutomaticModel(ModelConfig):
    """A model whose precision the node has chosen for this machine's card. A preset may choose another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreSettingsGiven:
    """Output of the node for more settings. None, 0 and an empty text: what the preset has."""

    lora_settings: LoraConfig | None = None
    optimizer_settings: OptimizerConfig | None = None
    training_settings: LoopSettings | None = None
    validation_settings: ValidationConfig | None = None
    memory_settings: MemoryConfig | None = None
    ema_settings: EmaConfig | None = None
    rollout_settings: RolloutConfig | None = None
    size_settings: SizeConfig | None = None
    reference_settings: ReferencesSeen | None = None
    preservation_settings: PreservationGiven | None = None
    clip: Any = None
    resolution: int = 0
    num_eval_images: int | None = None
    validation_negative_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedJob:
    """An imported SimpleTuner job: its settings, and its datasets with their pairs."""

    job: JobConfig
    paired: tuple[PairedPart, ...]

    def __repr__(self) -> str:
        return f"ImportedJob({', '.join(part.id for part, _ in self.paired)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that exported a LoRA."""

    run_dir: Path
    lora_file: Path
    steps: int

    def __repr__(self) -> str:
        return f"FinishedRun({self.run_dir.name}, {self.steps} steps)"


def value_class(kind: str) -> type | None:
    """The class of a socket type's values; None for ComfyUI's types that this pack only hands on."""
    import torch

    from ..trainer_core import config
    from ..trainer_core.conditioning.encoded import EncodedDataset
    from ..trainer_core.data.pairing import EditDataset

    classes: dict[str, type] = {
        "QWEN_EDIT_MODEL": config.ModelConfig,
        "QWEN_EDIT_DATASET": EditDataset,
        "QWEN_EDIT_ENCODED": EncodedDataset,
        "QWEN_EDIT_CAPTION_SETTINGS": config.CaptionConfig,
        "QWEN_EDIT_SIZE_SETTINGS": config.SizeConfig,
        "QWEN_EDIT_REFERENCE_SETTINGS": ReferencesSeen,
        "QWEN_EDIT_LORA_SETTINGS": config.LoraConfig,
        "QWEN_EDIT_OPTIMIZER_SETTINGS": config.OptimizerConfig,
        "QWEN_EDIT_TRAINING_SETTINGS": LoopSettings,
        "QWEN_EDIT_ROLLOUT_SETTINGS": config.RolloutConfig,
        "QWEN_EDIT_MEMORY_SETTINGS": config.MemoryConfig,
        "QWEN_EDIT_EMA_SETTINGS": config.EmaConfig,
        "QWEN_EDIT_PRESERVATION_SETTINGS": PreservationGiven,
        "QWEN_EDIT_VALIDATION_SETTINGS": config.ValidationConfig,
        "QWEN_EDIT_RUN": FinishedRun,
        "QWEN_EDIT_IMPORTED": ImportedJob,
        "QWEN_EDIT_MORE_SETTINGS": MoreSettingsGiven,
        "IMAGE": torch.Tensor,
        "LOSS_MAP": dict,
    }
    return classes.get(kind)
