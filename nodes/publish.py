"""What came of a run: its LoRA where LoRA loaders list it, and its figures for the node and for scripts."""

from __future__ import annotations

import filecmp
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import host_folders

if TYPE_CHECKING:
    from ..trainer_core.run import TrainResult


_RATIOS = ("psnr_base", "psnr_lora", "psnr_ema", "psnr_vae")  # dB, over the held-out pairs that were drawn
_DRIFT = ("drift_shift", "drift_zoom", "drift_colour")  # pixels, percent, of 255


def place_lora(lora_file: Path, run_name: str) -> str:
    """Copy the file to <LoRA folder>/<run name>/ and return its name in the lists of LoRA loaders.

    An equal file that lies there already is it; another one is never overwritten, the copy gets a number.
    """
    root = host_folders.lora_dir()
    folder = root / run_name
    folder.mkdir(parents=True, exist_ok=True)
    target, number = folder / lora_file.name, 1
    while target.exists() and not filecmp.cmp(lora_file, target, shallow=False):
        number += 1
        target = folder / f"{lora_file.stem}-{number}{lora_file.suffix}"
    if not target.exists():
        _copy(lora_file, target)
    return str(target.relative_to(root))


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all: a loader never sees half a file."""
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as out, source.open("rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        Path(partial).chmod(source.stat().st_mode)
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)


def run_ui(result: TrainResult, lora_name: str, ema_name: str | None = None, *, seconds: float) -> dict[str, list[Any]]:
    """For the node and /history: figures, a line of text, the grid. Paths start at ComfyUI's output folder.

    `ema_name` is that of the running average in the lists, None without one. `seconds` are those of the training
    steps, over all parts of an interrupted run.
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
        "steps": result.steps_done,
        "stopped": result.stopped.value,
        "seconds": round(seconds, 1),
        "grid_file": host_folders.output_name(samples.grid_file) if samples else None,
        **ratios,
    }
    measured = samples.as_text() if samples else ""
    text = f"{lora_name}: {result.steps_done} steps" + (f"; held-out pairs: {measured}" if measured else "")
    images = [_output_picture(samples.grid_file)] if samples else []
    if ema_name:
        text += f". Its running average is {ema_name}"
    if result.lora_file is not None and (note := _readers(result.lora_file)):
        text += f". {note}"
    return {"qwen_edit_run": [figures], "text": [text], "images": images}


def _readers(lora_file: Path) -> str:
    """What people have to know about the file's kind."""
    from ..trainer_core.adapters.writer import LORA_TYPE, READERS
    from ..trainer_core.files import read_metadata

    return next((note for kind, note in READERS.items() if kind == read_metadata(lora_file).get(LORA_TYPE)), "")


def _finite(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def _output_picture(path: Path) -> dict[str, str]:
    """How ComfyUI's pages ask for a file of the output folder."""
    name = Path(host_folders.output_name(path))
    return {"filename": name.name, "subfolder": name.parent.as_posix(), "type": "output"}
