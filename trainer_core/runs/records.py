"""Reads run.json and the lines of metrics.jsonl, which may be damaged or from someone else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import RunFolderError
from ..events import SampleReport
from ..json_text import read_json

STATE = "run.json"
_MOST_STEPS = 10**9


def read_state(folder: Path, name: str = "") -> dict[str, Any]:
    """The values of a folder's run.json. `name` stands for its path in messages.

    Raises:
        RunFolderError: the file can't be read, or a value has the wrong type.
    """
    name = name or str(folder / STATE)

    def damaged(problem: str) -> RunFolderError:
        return RunFolderError(
            f"{problem} Restore the file from a backup, or choose another name to start a new run. The new run can "
            "start from this run's LoRA: set init_lora to it."
        )

    values = read_json(folder / STATE, name, finite=False, error=damaged)
    wrong = _problem(values)
    if wrong:
        raise damaged(f"{name} is damaged: {wrong}.")
    if not _is_samples(values.get("samples")):
        values["samples"] = None  # only shown
    return dict(values)


def _problem(values: Any) -> str:
    """What is wrong with the values of run.json; empty if nothing is."""
    if not isinstance(values, dict):
        return "it is not an object"
    if "key" not in values:
        return "it has no key"
    wrong = [name for name, fits in _STATE.items() if name in values and not fits(values[name])]
    return f"the value of {wrong[0]} has the wrong type" if wrong else ""


def is_step(value: object) -> TypeGuard[int]:
    """Whether this is a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a number that a float can hold; not infinite, not NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def _is_plain_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and Path(value).name == value and "\\" not in value


def _is_result(value: object) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and _is_plain_name(value.get("lora_file"))
        and ("ema_file" not in value or _is_plain_name(value["ema_file"]))
        and is_step(value.get("steps"))
        and isinstance(value.get("kept"), bool)
        and isinstance(value.get("export"), dict)
    )


def _is_samples(value: object) -> bool:
    """Whether a SampleReport can be made of it. Older versions recorded fewer values, so not all are needed."""
    if value is None:
        return True
    if not isinstance(value, dict) or not value.keys() <= set(SampleReport.__slots__):
        return False
    figures = (each for name, each in value.items() if name not in ("step", "grid_file", "unmeasured"))
    return (
        is_step(value.get("step"))
        and _is_plain_name(value.get("grid_file"))
        and isinstance(value.get("unmeasured", ""), str)
        and all(map(_is_figure, figures))
        and value.keys() >= {"psnr_base", "psnr_lora", "psnr_vae"}
    )


def _is_figure(value: object) -> bool:
    """Whether this is None or fits into a float. Infinity and NaN count, because results can have these values."""
    return value is None or isinstance(value, float) or is_number(value)


_STATE: dict[str, Callable[[object], bool]] = {
    "key": lambda value: isinstance(value, dict),
    "state": lambda value: value in ("started", "paused", "kept", "finished"),
    "steps": is_step,
    "saved": is_step,
    "validated": is_step,
    "seconds": is_number,
    "result": _is_result,
}


def read_row(line: bytes) -> dict[str, Any] | None:
    """The report of a step from a line of metrics.jsonl; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if is_row(row) else None


def is_row(row: object) -> bool:
    """Whether this is the report of a step: figures by name, and an object of figures under loss_by_sigma."""
    if not isinstance(row, dict) or not is_step(row.get("step")) or not is_number(row.get("loss")):
        return False
    by_sigma = row.get("loss_by_sigma", {})
    figures = [each for name, each in row.items() if name != "loss_by_sigma"]
    return isinstance(by_sigma, dict) and all(map(_is_figure, [*figures, *by_sigma.values()]))
