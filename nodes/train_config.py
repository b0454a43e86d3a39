"""What the training node and the planning node have in common: sockets of settings, and the TrainConfig they make."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import (
    EmaConfig,
    ExportConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from ..trainer_core.presets import preset_names, training_preset
from . import sockets
from .schema import new_input

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset

NO_PRESET = "none"

_SETTINGS = {
    "lora_settings": (sockets.LoraSettings, "Adapter. Default: rank 16."),
    "optimizer_settings": (sockets.OptimizerSettings, "Optimizer. Default: AdamW, 1e-4."),
    "training_settings": (
        sockets.TrainingSettings,
        "Batches, noise, checkpoints, memory. Default: 4 pairs a step, one at a time.",
    ),
    "validation_settings": (
        sockets.ValidationSettings,
        "Pictures on the way. Default: every 250 steps and at the end.",
    ),
    "rollout_settings": (
        sockets.RolloutSettings,
        "Scheduled sampling: training on the model's own samples. Default: off.",
    ),
    "memory_settings": (
        sockets.MemorySettings,
        "What stays on the device and what waits elsewhere. Default: activations are computed again.",
    ),
    "ema_settings": (sockets.EmaSettings, "A running average of the weights, exported beside them. Default: none."),
}


def settings_input(name: str) -> io.Input:
    """The socket of one of the settings nodes."""
    socket, tooltip = _SETTINGS[name]
    return new_input(socket, name, optional=True, tooltip=tooltip)


def validation_input() -> io.Input:
    """The socket of a dataset of its own to validate on."""
    return new_input(
        sockets.Encoded,
        "validation_encoded",
        optional=True,
        tooltip="A second encoded dataset, whose held-out pairs are validated on instead of the first one's.",
    )


def imported_input() -> io.Input:
    """The socket of an imported configuration."""
    return new_input(
        sockets.Imported,
        "imported",
        optional=True,
        tooltip="All settings of an imported configuration; a settings node that is connected counts instead.",
    )


def preset_input() -> io.Input:
    """The list of presets."""
    return new_input(
        io.Combo,
        "preset",
        optional=True,
        options=[NO_PRESET, *preset_names()],
        default=NO_PRESET,
        tooltip="Settings that go together. A connected settings node or import counts instead of its part of the "
        "preset, and this node's own widgets always count; resolution and precision are set at their nodes.",
    )


def train_config(
    model: ModelConfig,
    encoded: EncodedDataset,
    own: dict[str, Any],
    *,
    lora_name: str,
    trigger_words: str = "",
    lora_settings: LoraConfig | None = None,
    optimizer_settings: OptimizerConfig | None = None,
    training_settings: sockets.LoopSettings | None = None,
    validation_settings: ValidationConfig | None = None,
    validation_encoded: EncodedDataset | None = None,
    imported: sockets.ImportedJob | None = None,
    rollout_settings: RolloutConfig | None = None,
    preset: str = NO_PRESET,
    memory_settings: MemoryConfig | None = None,
    ema_settings: EmaConfig | None = None,
) -> TrainConfig:
    """Preset or import, with what is connected in the place of its part, and the node's `own` settings.

    Raises:
        ConfigError: settings that do not go together.
    """
    base = TrainConfig(run_dir="-", encoded="-") if preset == NO_PRESET else training_preset(preset)
    if imported is not None:
        base = imported.job.train_config("-")
    connected = {
        "lora": lora_settings,
        "optimizer": optimizer_settings,
        "validation": validation_settings,
        "rollout": rollout_settings,
        "memory": memory_settings,
        "ema": ema_settings,
    }
    sections = {key: section for key, section in connected.items() if section is not None}
    if training_settings is not None:
        sections |= {field.name: getattr(training_settings, field.name) for field in fields(training_settings)}
    return replace(
        base,
        encoded=str(encoded.manifest),
        validation_encoded=str(validation_encoded.manifest) if validation_encoded is not None else "",
        model=model,
        export=ExportConfig(lora_name=lora_name, trigger_words=trigger_words or base.export.trigger_words),
        **own,
        **sections,
    )
