"""Reads what the page shows of a run folder: its state, curve, pictures and settings.

Files in the folder may be missing, damaged or from someone else, so nothing in them is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ..events import MEASURED
from ..pictures.sample_pictures import INDEX, read_sample_index

MAX_FILE_BYTES = 16 << 20  # of a JSON file; a larger one counts as missing
_MAX_ROWS = 50_000  # rows of the metrics to parse; of a longer file, only every second, third, ... row
_TAIL_BYTES = 8192  # enough for the last line of the metrics
_VALIDATION_NAMES = tuple(f'"{name}"'.encode() for name in MEASURED)  # rows with one of these are always parsed


def run_folders(runs_dir: Path, limit: int) -> list[Path]:
    """At most `limit` run folders, those whose state changed last first."""
    if not runs_dir.is_dir():
        return []
    found = [folder for folder in runs_dir.iterdir() if (folder / "run.json").is_file() and not folder.is_symlink()]
    return sorted(found, key=lambda folder: (folder / "run.json").stat().st_mtime, reverse=True)[:limit]


def summary(folder: Path) -> dict[str, Any]:
    """State, steps and newest loss of a run. `changed`: seconds since 1970."""
    state, config, last = _read_object(folder / "run.json"), read_config(folder), _last_row(folder / "metrics.jsonl")
    samples = state.get("samples") or {}
    return finite(
        {
            "run_name": folder.name,
            "state": state.get("state", "started"),
            "step": last.get("step", 0),
            "num_steps": config.get("max_train_steps", 0),
            "loss": last.get("loss"),
            "learning_rate": last.get("learning_rate"),
            "peak_bytes": last.get("peak_bytes", 0),
            "changed": (folder / "run.json").stat().st_mtime,
            "psnr": {name: samples.get(f"psnr_{name}") for name in ("base", "lora", "ema", "vae")},
        }
    )


def curve(folder: Path, points: int) -> dict[str, Any]:
    """The loss averaged over neighbouring steps to at most `points` values, and all validation results.

    `steps` and `learning_rate` are those at the end of each average. `measured` has [step, value] lists by name.
    """
    rows = _rows(folder / "metrics.jsonl")
    measured: dict[str, list[list[float]]] = {}
    for row in rows:
        for name in MEASURED:
            if _is_number(row.get(name)):
                measured.setdefault(name, []).append([row["step"], row[name]])
    steps = [row for row in rows if _is_number(row.get("loss"))]
    size = max(1, math.ceil(len(steps) / points))
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    return {
        "steps": [group[-1]["step"] for group in groups],
        "loss": [sum(row["loss"] for row in group) / len(group) for group in groups],
        "learning_rate": [finite(group[-1].get("learning_rate")) for group in groups],
        "measured": measured,
    }


def samples(folder: Path) -> list[dict[str, Any]]:
    """Steps with validation pictures, ascending: `step`, `version` (changes with the pictures), `pairs`."""
    found = []
    for place in (folder / "samples").glob("step-*/"):
        number, pairs = place.name.removeprefix("step-"), read_sample_index(place)
        if number.isdecimal() and pairs:
            shown = [
                {"caption": each["caption"], "label": each["label"], "columns": list(each["pictures"])}
                for each in pairs
            ]
            found.append({"step": int(number), "version": (place / INDEX).stat().st_mtime_ns // 1000, "pairs": shown})
    return sorted(found, key=lambda each: each["step"])


def picture_name(folder: Path, step: int, pair: int, column: str) -> str:
    """The path of one picture, relative to the run folder. Empty if that step has no such picture."""
    place = f"samples/step-{step:06d}"
    pairs = read_sample_index(folder / place)
    name = pairs[pair]["pictures"].get(column) if 0 <= pair < len(pairs) else None
    return f"{place}/{name}" if name else ""


def read_config(folder: Path) -> dict[str, Any]:
    """All settings of the last start. Paths are shortened to their last part."""
    return _without_folders(_read_object(folder / "config.json"))


def read_graph(folder: Path) -> dict[str, Any]:
    """The ComfyUI graph that started the run; empty if none was saved."""
    return _read_object(folder / "graph.json")


def finite(value: Any) -> Any:
    """The value with None in place of infinities and NaNs, which the page's JSON can't have."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, str) and (Path(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name  # splits at both kinds of slashes
    return finite(value)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_row(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    return next((row for row in map(_row, reversed(lines)) if row), {})


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the metrics. A very long file is thinned out, except for rows with validation results."""
    if not path.is_file():
        return []
    found = []
    with path.open("rb") as file:
        every = 1 + path.stat().st_size // (_MAX_ROWS * max(1, len(file.readline())))
        file.seek(0)
        for number, line in enumerate(file):
            if number % every == 0 or any(name in line for name in _VALIDATION_NAMES):
                found.append(_row(line))
    return [row for row in found if row]


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
