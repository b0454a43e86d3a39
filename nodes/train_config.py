"""Shared by the training and planning nodes: inputs for settings, and the TrainConfig made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import (
    EmaConfig,
    ExportConfig,
    LayerPrefix,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
    to_json,
)
from ..trainer_core.presets import encoding_preset, preset_names, training_preset
from . import sockets
from .overrides import SETTINGS_NODES, Override, compared
from .schema import new_input

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset

NO_PRESET = "none"

_SETTINGS = {
    "lora_settings": (sockets.LoraSettings, "Adapter settings. Default: rank 16."),
    "optimizer_settings": (sockets.OptimizerSettings, "Optimizer settings. Default: AdamW at 1e-4."),
    "training_settings": (
        sockets.TrainingSettings,
        "Batches, noise, loss and checkpoints. Default: 4 pairs per step, one at a time.",
    ),
    "validation_settings": (
        sockets.ValidationSettings,
        "Samples during training. Default: every 250 steps and at the end.",
    ),
    "rollout_settings": (
        sockets.RolloutSettings,
        "Scheduled sampling: also train on the model's own samples. Default: off.",
    ),
    "memory_settings": (
        sockets.MemorySettings,
        "What stays in VRAM and what is moved to RAM. Default: the fastest settings that fit.",
    ),
    "ema_settings": (
        sockets.EmaSettings,
        "Exponential moving average of the weights, exported as a second LoRA. Default: none.",
    ),
    "preservation_settings": (
        sockets.PreservationSettings,
        "Keeps what the model does with other instructions. Default: off.",
    ),
}


def settings_input(name: str, default: str = "") -> io.Input:
    """Input for one of the settings nodes. `default`: a sentence on what applies without it, if it is not the usual."""
    socket, tooltip = _SETTINGS[name]
    if default:
        tooltip = f"{tooltip.partition(' Default:')[0]} {default}"
    return new_input(socket, name, optional=True, tooltip=tooltip)


def validation_input() -> io.Input:
    """Input for a separate validation dataset."""
    return new_input(
        sockets.Encoded,
        "validation_encoded",
        optional=True,
        tooltip="A second encoded dataset. Validation uses its held-out pairs instead of those from `encoded`.",
    )


def imported_input() -> io.Input:
    """Input for an imported configuration."""
    return new_input(
        sockets.Imported,
        "imported",
        optional=True,
        tooltip="Settings from Import SimpleTuner Config. A connected settings node overrides its part.",
    )


def preset_input() -> io.Input:
    """Widget that lists the presets."""
    return new_input(
        io.Combo,
        "preset",
        optional=True,
        options=[NO_PRESET, *preset_names()],
        default=NO_PRESET,
        tooltip="A recommended set of settings. A connected settings node overrides its part of the preset, an import "
        "replaces the preset, and this node's widgets always apply. Set resolution and precision in their own nodes.",
    )


def train_config(
    model: ModelConfig,
    encoded: EncodedDataset | None,
    own: dict[str, Any],
    *,
    lora_name: str,
    trigger_words: str = "",
    layer_prefix: LayerPrefix = "diffusion_model",
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
    preservation_settings: sockets.PreservationGiven | None = None,
) -> TrainConfig:
    """Combine the settings: import or preset, overridden by connected settings nodes, then by the node's `own` widgets.

    Raises:
        ConfigError: the settings contradict each other.
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
        "preservation": preservation_settings and preservation_settings.config,
    }
    sections = {key: section for key, section in connected.items() if section is not None}
    if training_settings is not None:
        sections |= {field.name: getattr(training_settings, field.name) for field in fields(training_settings)}
    return replace(
        base,
        encoded=str(encoded.manifest) if encoded is not None else "-",
        validation_encoded=str(validation_encoded.manifest) if validation_encoded is not None else "",
        model=model,
        export=ExportConfig(
            lora_name=lora_name,
            trigger_words=trigger_words or base.export.trigger_words,
            layer_prefix=layer_prefix,
        ),
        **own,
        **sections,
    )


def preset_overrides(
    config: TrainConfig, preset: str, encoded: EncodedDataset, node: str, *, is_imported: bool
) -> tuple[Override, ...]:
    """What overrides a preset that is chosen on the node with the display name `node`."""
    if preset == NO_PRESET:
        return ()
    set_by = dict.fromkeys(SETTINGS_NODES, "Import SimpleTuner Config") if is_imported else SETTINGS_NODES
    set_by = {**set_by, "model": "the model node", "encoding": "Encode Edit Pairs", "max_train_steps": node}
    settings = {**to_json(config), "encoding": _encoding_seen(preset, encoded)}
    return compared(preset, settings, set_by)[1]


def _encoding_seen(preset: str, encoded: EncodedDataset) -> dict[str, Any]:
    """The settings of encoded pairs, as far as their sizes tell. Where they fit the preset, it is the preset's.

    Crops and rounding change sizes by some percent.
    """
    from ..trainer_core.qwen_image.flavours import FLAVOURS
    from ..trainer_core.qwen_image.latents import VAE_FACTOR

    every = [*encoded.pairs, *encoded.validation_pairs]
    if not every:
        return {}

    def side_of(shape: Sequence[int]) -> int:
        return round(math.sqrt(shape[1] * shape[2])) * VAE_FACTOR

    wanted, side = encoding_preset(preset), side_of(every[0].shape)
    full = math.sqrt(FLAVOURS[encoded.flavour].reference_area)
    expected = side if wanted.match_target_res else full
    fits = all(_about(side_of(shape), expected) for shape in every[0].reference_shapes)
    return {
        "resolution": wanted.resolution if _about(side, wanted.resolution) else side,
        "match_target_res": wanted.match_target_res if fits else not wanted.match_target_res,
    }


def _about(side: float, wanted: float) -> bool:
    return abs(side - wanted) < wanted / 10
