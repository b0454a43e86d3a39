"""Combines the model, a preset and the settings that people add into the configuration of a run, for the short path."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..trainer_core.config import (
    DEMO_MODEL,
    BaseModelPrecision,
    EncodingConfig,
    MixedPrecision,
    ModelConfig,
    TrainConfig,
    encoding_for,
    to_json,
)
from ..trainer_core.errors import Problems
from ..trainer_core.presets import encoding_preset, preset_for, preset_names, read_preset, training_preset
from ..trainer_core.qwen_image.installed import fitting_precision, installed_at
from . import host_folders
from .overrides import SETTINGS_NODES, Override, compared
from .run_names import first_name
from .sockets import AutomaticModel, MoreSettingsGiven, ReferencesSeen
from .train_config import train_config

AUTOMATIC = "automatic"
DEMO_PRESET = "demo"
UNKNOWN_MODEL = ModelConfig(base="-")
"""Stands for a model that is missing or not known yet, to check settings. It counts as a real model, not the demo's."""
NAME_LABEL = "name of the edit"
"""What the page calls run_name in the short path."""
MODEL_NODE, TRAIN_NODE, MORE_NODE = "Qwen Edit Model", "Train Qwen Edit LoRA", "Qwen Edit More Settings"
_SETTINGS = ("lora", "optimizer", "training", "validation", "memory", "ema", "rollout", "preservation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """What a training of the short path does, before its pairs are known. `config.encoded` is "-".

    `preset` is the name of the preset, and `why` says in a sentence why it is this one. `from_preset` holds what the
    preset sets and nothing overrides, by dotted name; `overridden` what a node or widget has set to another value.
    """

    preset: str
    why: str
    model: ModelConfig
    encoding: EncodingConfig
    config: TrainConfig
    from_preset: dict[str, Any]
    overridden: tuple[Override, ...]


def presets_offered() -> list[str]:
    """Choices of the training node: automatic, then all presets."""
    return [AUTOMATIC, *preset_names()]


def compose(
    problems: Problems,
    model: ModelConfig,
    *,
    run_name: str,
    preset: str,
    max_train_steps: int,
    seed: int,
    if_run_exists: str,
    more_settings: MoreSettingsGiven | None = None,
) -> Composed | None:
    """The configuration of a run: the preset, overridden by connected settings, then by the node's own widgets.

    With `max_train_steps` 0 the preset sets the number of steps.

    Adds to `problems` that the run name is not allowed, and that settings contradict each other. In the latter case
    there is no configuration. Without an allowed name, the run folder is `-`.

    Raises:
        ConfigError: there is no such preset.
    """
    more = more_settings or MoreSettingsGiven()
    name = problems.attempt(lambda: first_name(run_name, if_run_exists, f"The {NAME_LABEL}")) or "-"
    preset, why = _chosen(preset, model, more)
    chosen = model
    if isinstance(model, AutomaticModel):
        chosen = plain_model(with_precision(model, preset, _planned_for(more)))
    own: dict[str, Any] = {"run_dir": str(host_folders.runs_dir() / name), "seed": seed}
    if max_train_steps > 0:
        own["max_train_steps"] = max_train_steps
    given = {f"{part}_settings": getattr(more, f"{part}_settings") for part in _SETTINGS}
    set_by = {**SETTINGS_NODES, "model": MODEL_NODE, "encoding": MORE_NODE, "max_train_steps": TRAIN_NODE}
    optimizer = training_preset(preset).optimizer
    if more.optimizer_settings is None and 0 < max_train_steps <= optimizer.lr_warmup_steps:
        # The preset's warm-up is for its own number of steps.
        given["optimizer_settings"] = dataclasses.replace(optimizer, lr_warmup_steps=max_train_steps // 10)
        set_by["optimizer"] = f"max_train_steps of {TRAIN_NODE}"
    config = problems.attempt(partial(train_config, chosen, None, own, lora_name=name, preset=preset, **given))
    if config is None:
        return None
    encoding = _encoding(preset, more, config)
    settings = {**to_json(config), "encoding": to_json(encoding)}
    held, overridden = compared(preset, settings, set_by)
    return Composed(
        preset=preset,
        why=why,
        model=chosen,
        encoding=encoding,
        config=config,
        from_preset=held,
        # An automatic precision follows from the card and the file. Nobody has set it.
        overridden=tuple(each for each in overridden if chosen is model or each.by != MODEL_NODE),
    )


def _chosen(preset: str, model: ModelConfig, more: MoreSettingsGiven) -> tuple[str, str]:
    """The name of the preset, and why it is this one."""
    if preset != AUTOMATIC:
        return preset, f"Preset {preset}, as chosen."
    if is_demo(model):
        return DEMO_PRESET, f"Preset {DEMO_PRESET}, because the model is the demo model."
    gib = _card(model, more)
    name = preset_for(gib)
    if gib is None:
        return name, f"Preset {name}, the smallest, because this computer has no CUDA card."
    return name, f"Preset {name}, because the card has {gib:.0f} GB."


def is_demo(model: ModelConfig) -> bool:
    """Whether this is the demo model."""
    return model.base == DEMO_MODEL and not model.transformer_file


def _card(model: ModelConfig, more: MoreSettingsGiven) -> float | None:
    """Memory in GiB of the card to train on; None without CUDA."""
    from ..trainer_core.device import card_gib

    return _planned_for(more) or card_gib(model.device)


def _planned_for(more: MoreSettingsGiven) -> float | None:
    return (more.memory_settings.vram_gib if more.memory_settings else 0.0) or None


def with_precision(model: AutomaticModel, preset: str = "", card: float | None = None) -> AutomaticModel:
    """The model in the precision of the preset, or that of the card's preset if this one has none.

    Args:
        model: from a node that leaves its precision to us.
        preset: name of a preset; empty: the one for the card.
        card: memory in GiB of the card to train on; None: that of this machine. Without a CUDA card, the weights are
            not quantised.
    """
    from ..trainer_core.device import card_gib

    card = card or card_gib(model.device)
    wanted: BaseModelPrecision = "none"
    mixed: MixedPrecision = "no" if model.device == "cpu" else "bf16"
    if card is not None:
        wanted = {**_model_of(preset_for(card)), **(_model_of(preset) if preset else {})}["base_model_precision"]
        mixed = "bf16"
    place = Path(model.transformer_file) if model.transformer_file else Path(model.base, "transformer")
    found = installed_at(place)
    fitting = fitting_precision(found.stored if found else "plain", wanted)
    return dataclasses.replace(model, base_model_precision=fitting, mixed_precision=mixed)


def plain_model(model: ModelConfig) -> ModelConfig:
    """The same settings, which no preset changes any more."""
    return ModelConfig(**{field.name: getattr(model, field.name) for field in dataclasses.fields(ModelConfig)})


def _model_of(preset: str) -> dict[str, Any]:
    return read_preset(preset)["job"].get("model", {})


def _encoding(preset: str, more: MoreSettingsGiven, config: TrainConfig) -> EncodingConfig:
    given: dict[str, Any] = dict((more.reference_settings or ReferencesSeen()).encoding)
    if more.size_settings is not None:
        given["sizes"] = more.size_settings
    if more.resolution:
        given["resolution"] = more.resolution
    if more.num_eval_images is not None:
        given["num_eval_images"] = more.num_eval_images
    if more.preservation_settings is not None and more.preservation_settings.config.preservation_probability:
        given["preservation_prompts"] = more.preservation_settings.prompts
    if more.validation_negative_prompt:
        given["validation_negative_prompt"] = more.validation_negative_prompt
    return encoding_for(dataclasses.replace(encoding_preset(preset), **given), config)
