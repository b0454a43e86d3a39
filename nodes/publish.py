"""Publishes a finished run: copies its LoRA to the LoRA folder and collects its figures for the node and /history."""

from __future__ import annotations

import filecmp
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trainer_core.errors import RunFolderError
from ..trainer_core.files import clean_leftovers, written_beside
from . import host_folders, host_lora, host_server

if TYPE_CHECKING:
    from ..trainer_core.run import TrainResult


_RATIOS = ("psnr_base", "psnr_lora", "psnr_ema", "psnr_vae")  # dB, over the sampled validation pairs
_DRIFT = ("drift_shift", "drift_zoom", "drift_colour")  # pixels, percent, colour levels of 255


def place_lora(lora_file: Path, run_name: str, name: str = "") -> str:
    """Copy the file to <LoRA folder>/<run name>/ and return the name under which LoRA loaders list it.

    `name`: of the copy, without extension; empty for that of the file. Never overwrites a different file: the copy then
    gets a number. If an identical file exists, returns its name.
    """
    root = host_folders.lora_dir()
    folder = root / run_name
    folder.mkdir(parents=True, exist_ok=True)
    clean_leftovers(folder)
    target = _place_of(lora_file, folder, name)
    if not target.exists():
        _copy(lora_file, target)
    return str(target.relative_to(root))


def listed_name(lora_file: Path, run_name: str) -> str:
    """The name of the file's copy that `place_lora` made; empty if it is gone."""
    root = host_folders.lora_dir()
    target = _place_of(lora_file, root / run_name, "")
    return str(target.relative_to(root)) if target.exists() else ""


def save_step(run_dir: Path, step: int) -> str:
    """Copy the LoRA of a validated step to the LoRA folder, and its average if there is one, once ComfyUI was found to
    load them. Tells the open pages. Returns the name under which LoRA loaders list it.

    Raises:
        RunFolderError: the step's LoRA is not kept.
        ExportError: ComfyUI would not apply it as it was trained.
    """
    from ..trainer_core.runs.step_loras import EMA, step_loras

    kept = {lora.step: lora for lora in step_loras(run_dir / "samples")}
    if step not in kept:
        steps = ", ".join(map(str, kept)) or "none"
        raise RunFolderError(
            f"The LoRA of step {step} of the run {run_dir.name!r} is not kept. Its kept steps: {steps}."
        )
    names: list[str] = []
    for file in kept[step].files:
        host_lora.check_lora_file(file, host_lora.num_blocks(file))
        suffix = "-ema" if file.name == EMA and len(kept[step].files) > 1 else ""
        names.append(place_lora(file, run_dir.name, f"{run_dir.name}{suffix}-step-{step}"))
    host_server.send_message("qwen_edit_trainer.lora", {"run_name": run_dir.name, "lora_name": names[0]})
    return names[0]


def _place_of(lora_file: Path, folder: Path, name: str) -> Path:
    """The identical copy in the folder, or else the first free name for one."""
    stem = name or lora_file.stem
    target, number = folder / f"{stem}{lora_file.suffix}", 1
    while target.exists() and not filecmp.cmp(lora_file, target, shallow=False):
        number += 1
        target = folder / f"{stem}-{number}{lora_file.suffix}"
    return target


def _copy(source: Path, target: Path) -> None:
    """Copy atomically, so that a loader never sees an incomplete file."""
    with written_beside(target) as partial:
        with partial.open("wb") as out, source.open("rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        partial.chmod(source.stat().st_mode)


def run_ui(
    result: TrainResult,
    lora_name: str,
    ema_name: str | None = None,
    best_name: str | None = None,
    *,
    seconds: float,
    notes: Sequence[str] = (),
) -> dict[str, list[Any]]:
    """The node's UI output, also in /history: figures, lines of text and the grid. Paths are relative to the output
    folder.

    `ema_name` and `best_name` are the listed names of the EMA LoRA and of the best step's; None without. `seconds` is
    the total time of all training steps, including those before an interruption. `notes` follow the text.
    """
    samples = result.samples
    ratios = {name: _finite(getattr(samples, name)) if samples else None for name in (*_RATIOS, *_DRIFT)}
    figures = {
        "run_name": result.run_dir.name,
        "run_dir": host_folders.output_name(result.run_dir),
        "lora_file": host_folders.output_name(host_folders.lora_dir() / lora_name),
        "lora_name": lora_name,
        "ema_file": host_folders.output_name(host_folders.lora_dir() / ema_name) if ema_name else None,
        "ema_lora_name": ema_name,
        "best_lora_name": best_name,
        "strength": result.strength,
        "steps": result.steps_done,
        "stopped": result.stopped.value,
        "seconds": round(seconds, 1),
        "grid_file": host_folders.output_name(samples.grid_file) if samples else None,
        **ratios,
    }
    lines = [f"Saved {lora_name} after {result.steps_done} steps."]
    if ema_name:
        lines.append(f"Saved its EMA {ema_name}.")
    if best_name:
        lines.append(f"The run was better before its end: saved its best step as {best_name}.")
    if result.strength is not None:
        lines.append(f"Use {best_name or lora_name} at strength {result.strength:g}.")
    if samples and (measured := samples.as_text()):
        lines.append(measured)
    if result.lora_file is not None and (note := _readers(result.lora_file)):
        lines.append(note)
    images = [_output_picture(samples.grid_file)] if samples else []
    return {"qwen_edit_run": [figures], "text": ["\n".join([*lines, *notes])], "images": images}


def _readers(lora_file: Path) -> str:
    """A note on which programs can read this type of LoRA. Empty for the plain type."""
    from ..trainer_core.adapters.reader import LORA_TYPE
    from ..trainer_core.adapters.writer import READERS
    from ..trainer_core.files import read_metadata

    return next((note for kind, note in READERS.items() if kind == read_metadata(lora_file).get(LORA_TYPE)), "")


def _finite(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def _output_picture(path: Path) -> dict[str, str]:
    """Reference to a file in the output folder, as ComfyUI's page expects it."""
    name = Path(host_folders.output_name(path))
    return {"filename": name.name, "subfolder": name.parent.as_posix(), "type": "output"}
