"""Presets: one JSON file each, with a description (`about`).

`job` has any of the job file's settings. `demo`, if present, completes it to a job on the demo model.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..config import TrainConfig, from_json
from ..errors import ConfigError
from ..settings import did_you_mean, merged
from ..text import brief

_FOLDER = Path(__file__).parent
_PLACES = {"run_dir": "-", "encoded": "-"}
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
    sizes = [int(each[:-2]) for each in names if re.fullmatch(r"\d+gb", each)]
    fitting = [size for size in sizes if size <= int(wanted[1])]
    if fitting:
        return f" For this card, use '{max(fitting)}gb'."
    return f" The smallest preset is for cards with {min(sizes)} GB."


def with_preset(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A job's parsed JSON, with the preset's settings where the job has none."""
    return merged(read_preset(name)["job"], values)


def training_preset(name: str) -> TrainConfig:
    """The preset's training settings; others have their defaults. run_dir, encoded and model are placeholders."""
    job = read_preset(name)["job"]
    return from_json(TrainConfig, {**_PLACES, **{key: job[key] for key in job if key not in _NOT_TRAINING}})
