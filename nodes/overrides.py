"""Which settings of a preset a run has, and which ones a node overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..trainer_core.presets import read_preset
from ..trainer_core.text import brief

SETTINGS_NODES = {
    "lora": "Qwen Edit LoRA Settings",
    "optimizer": "Qwen Edit Optimizer Settings",
    "noise": "Qwen Edit Training Settings",
    "batching": "Qwen Edit Training Settings",
    "checkpoints": "Qwen Edit Training Settings",
    "gradient_checkpointing": "Qwen Edit Training Settings",
    "validation": "Qwen Edit Validation Settings",
    "rollout": "Qwen Edit Rollout Settings",
    "memory": "Qwen Edit Memory Settings",
    "ema": "Qwen Edit EMA Settings",
    "preservation": "Qwen Edit Preservation Settings",
}
"""The display name of the node that sets each part of a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A setting that has another value than in the preset. `by` is the display name of the node that has set it.

    The values are JSON values.
    """

    setting: str
    preset_value: Any
    value: Any
    by: str

    def __str__(self) -> str:
        return f"{self.setting} is {brief(self.value)}, set by {self.by}. The preset has {brief(self.preset_value)}."


def compared(
    preset: str, settings: Mapping[str, Any], set_by: Mapping[str, str]
) -> tuple[dict[str, Any], tuple[Override, ...]]:
    """The preset's values that a run has, by dotted name such as `lora.lora_rank`, and those that it has not.

    Args:
        preset: name of the preset.
        settings: the run's settings as JSON values. Parts that are not in it are not compared.
        set_by: display name of the node that sets each part of the settings, for the parts that a node can set.

    Raises:
        ConfigError: there is no such preset.
    """
    final = dict(_leaves(settings))
    held: dict[str, Any] = {}
    overridden: list[Override] = []
    for name, value in _leaves(read_preset(preset)["job"]):
        if name not in final:
            continue
        if final[name] == value:
            held[name] = value
            continue
        setting, by = name.rpartition(".")[2], set_by.get(name.partition(".")[0], "another node")
        overridden.append(Override(setting=setting, preset_value=value, value=final[name], by=by))
    return held, tuple(overridden)


def in_words(preset: str, overridden: Sequence[Override]) -> str:
    """What overrides the preset, a line for each setting; empty if nothing does."""
    lines = [f"Settings that override the preset {preset}:", *(f"- {each}" for each in overridden)]
    return "\n".join(lines) if overridden else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each setting in nested JSON objects."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
