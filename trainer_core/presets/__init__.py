"""Presets: one JSON file each, with a description (`about`).

`job` has any of the job file's settings. `demo`, if present, completes it to a job on the demo model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import EncodingConfig, TrainConfig, from_json
from ..errors import ConfigError
from ..settings import did_you_mean, merged
from ..text import brief

_FOLDER = Path(__file__).parent
_PLACES = {"run_dir": "-", "encoded": "-"}
_CARD = re.compile(r"(\d+)gb")
_OF_NOMINAL = 0.92  # a card reports less memory than its name says; with ECC up to 7 % less
_NOT_TRAINING = ("model", "dataset", "datasets", "eval_dataset_id", "encoding", "cache_dir", "run_dir", "pair_check")


def preset_names() -> tuple[str, ...]:
    """The names of all presets: examples, then cards by size, then the others."""

    def place(name: str) -> tuple[bool, float, str]:
        card = re.match(r"\d+", name)
        return not name.startswith("qwen_image."), float(card[0]) if card else math.inf, name

    return tuple(sorted((path.stem for path in _FOLDER.glob("*.json")), key=place))


def read_preset(name: str) -> dict[str, Any]:
    """The `about`, `job` and, for an example, `demo` of a preset.

    Raises:
        ConfigError: there is no such preset; lists the existing ones.
    """
    names = preset_names()
    if name not in names:
        hint = _for_card(name, names) or did_you_mean(name, names)
        raise ConfigError(f"There is no preset {brief(name)}. Choose one of {', '.join(names)}.{hint}")
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _for_card(name: str, names: tuple[str, ...]) -> str:
    """The end of an error if `name` is the size of a card, such as 25gb: the preset to use on it. "" otherwise."""
    wanted = re.fullmatch(r"(\d+) *(gi?b?)?", name, re.IGNORECASE)
    if not wanted:
        return ""
    sizes = _card_sizes(names)
    fitting = [size for size in sizes if size <= int(wanted[1])]
    if fitting:
        return f" For this card, use '{max(fitting)}gb'."
    return f" The smallest preset is for cards with {min(sizes)} GB."


def _card_sizes(names: Iterable[str]) -> list[int]:
    """Sizes in GB of the cards that have a preset."""
    return [int(card[1]) for card in map(_CARD.fullmatch, names) if card]


def preset_for(vram_gib: float | None) -> str:
    """The name of the preset for a card that reports `vram_gib` GiB of memory; the smallest one if it is None.

    A smaller card than any preset is for also gets the smallest one: whether a run fits is for the memory plan to say.
    """
    sizes = _card_sizes(preset_names())
    fitting = [size for size in sizes if vram_gib is not None and size * _OF_NOMINAL <= vram_gib]
    return f"{max(fitting, default=min(sizes))}gb"


def with_preset(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A job's parsed JSON, with the preset's settings where the job has none."""
    return merged(read_preset(name)["job"], values)


def training_preset(name: str) -> TrainConfig:
    """The preset's training settings; others have their defaults. run_dir, encoded and model are placeholders."""
    job = read_preset(name)["job"]
    return from_json(TrainConfig, {**_PLACES, **{key: job[key] for key in job if key not in _NOT_TRAINING}})


def encoding_preset(name: str) -> EncodingConfig:
    """The preset's encoding settings; others have their defaults."""
    return from_json(EncodingConfig, read_preset(name)["job"].get("encoding", {}))
