"""Reads what the page shows of a run folder: its state, curve, pictures and settings.

Files in the folder may be missing, damaged or from someone else, so nothing in them is trusted.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import RunFolderError
from ..events import MEASURED
from ..files import is_whole
from ..json_text import read_json
from ..pictures.sample_pictures import INDEX, read_sample_index
from .lock import is_in_use
from .records import STATE, is_number, is_step, read_row, read_state
from .step_loras import best_of, step_loras

MAX_FILE_BYTES = 16 << 20  # of a JSON file; a larger one counts as missing
_MAX_ROWS = 50_000  # rows of the metrics to parse; of a longer file, only every second, third, ... row
_MAX_LINE_BYTES = 1 << 16  # longer lines are damaged
_TAIL_BYTES = 8192  # enough for the last line of the metrics
_VALIDATION_NAMES = tuple(f'"{name}"'.encode() for name in MEASURED)  # rows with one of these are always parsed


def run_folders(runs_dir: Path, limit: int) -> list[Path]:
    """At most `limit` run folders, those whose state changed last first."""
    try:
        changed = {folder: _changed(folder) for folder in runs_dir.iterdir() if not folder.is_symlink()}
    except OSError:  # there is no such folder
        return []
    found = {folder: when for folder, when in changed.items() if when is not None}
    return sorted(found, key=lambda folder: found[folder], reverse=True)[:limit]


def summary(folder: Path) -> dict[str, Any]:
    """State, steps and newest loss of a run. `changed`: seconds since 1970.

    The state is that of run.json, "elsewhere" if another process trains the run, or "damaged", with the `problem`.
    """
    config, last = read_config(folder), _last_row(folder / "metrics.jsonl")
    state, problem = _state_or_problem(folder)
    samples = state.get("samples") or {}
    steps = config.get("max_train_steps")
    return finite(
        {
            "run_name": folder.name,
            "state": "elsewhere" if is_in_use(folder) else "damaged" if problem else state.get("state", "started"),
            "problem": problem,
            "step": last.get("step", 0),
            "num_steps": steps if is_step(steps) else 0,
            "loss": last.get("loss"),
            "learning_rate": last.get("learning_rate"),
            "peak_bytes": last.get("peak_bytes", 0),
            "changed": _changed(folder) or 0,
            "psnr": {name: _number(samples.get(f"psnr_{name}")) for name in ("base", "lora", "ema", "vae")},
            "unmeasured": samples.get("unmeasured", ""),
            "seconds": _number(state.get("seconds")),
            "best_step": _result(state, "best_step"),
            "strength": _number(_result(state, "strength")),
            "kept_step": (state.get("result") or {}).get("steps") if state.get("state") == "kept" else None,
        }
    )


def _result(state: Mapping[str, Any], name: str) -> Any:
    return (state.get("result") or {}).get(name)


def _state_or_problem(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_state(folder, STATE), ""
    except RunFolderError as error:
        return {}, str(error)


def _changed(folder: Path) -> float | None:
    """When the run's state changed, in seconds since 1970; None if the folder is not a run."""
    try:
        status = (folder / STATE).stat()
    except OSError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_mtime


def _number(value: object) -> float | None:
    return value if is_number(value) else None


def curve(folder: Path, points: int) -> dict[str, Any]:
    """The loss averaged over neighbouring steps to at most `points` values, and all validation results.

    `steps` and `learning_rate` are those at the end of each average. `measured` has [step, value] lists by name.
    """
    rows = _rows(folder / "metrics.jsonl")
    measured: dict[str, list[list[float]]] = {}
    for row in rows:
        for name in MEASURED:
            if is_number(row.get(name)):
                measured.setdefault(name, []).append([row["step"], row[name]])
    size = max(1, math.ceil(len(rows) / points))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
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
        if number.isdecimal() and len(number) < 10 and pairs:
            shown = [
                {"caption": each["caption"], "label": each["label"], "columns": list(each["pictures"])}
                for each in pairs
            ]
            found.append({"step": int(number), "version": _version(place / INDEX), "pairs": shown})
    return sorted(found, key=lambda each: each["step"])


def loras(folder: Path) -> list[dict[str, Any]]:
    """Steps whose LoRA is kept, ascending: `step`, `psnr` (dB), `validation_loss`, and whether it is the `best`."""
    found = step_loras(folder / "samples")
    best = best_of(found)
    rows = [
        {"step": each.step, "psnr": each.psnr, "validation_loss": each.loss, "best": each is best} for each in found
    ]
    return [finite(row) for row in rows]


def has_lora(folder: Path) -> bool:
    """Whether the run has exported a LoRA or kept one of a step. Opens no file, because menus ask for every run."""
    return any(any(folder.glob(f"{place}[!.]*.safetensors")) for place in ("", "samples/step-*/"))


def lora_file(folder: Path) -> Path | None:
    """The LoRA that the run exported; None without."""
    result = _state_or_problem(folder)[0].get("result")
    return folder / result["lora_file"] if result and is_whole(folder / result["lora_file"]) else None


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns // 1000
    except OSError:  # deleted meanwhile
        return 0


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
        found = read_json(path, finite=False, max_bytes=MAX_FILE_BYTES, error=RunFolderError)
    except RunFolderError:
        return {}
    return found if isinstance(found, dict) else {}


def _last_row(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    return next((row for row in map(read_row, reversed(lines)) if row), {})


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the metrics. A very long file is thinned out, except for rows with validation results."""
    found = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            every = 1 + size // (_MAX_ROWS * max(1, len(file.readline(_MAX_LINE_BYTES))))
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b"")):
                if number % every == 0 or any(name in line for name in _VALIDATION_NAMES):
                    found.append(read_row(line))
    except OSError:  # missing, or a folder
        pass
    return [row for row in found if row]
