"""The LoRAs of validated steps, kept beside their pictures.

samples/step-000250/lora.safetensors  the trained weights
samples/step-000250/ema.safetensors   their moving average, if it is validated

A file's header says how good its pictures are, so the best step is known without another record.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ..config import PairCheckConfig
from ..files import is_whole, read_metadata
from ..text import reason_of

LORA, EMA = "lora.safetensors", "ema.safetensors"
_PSNR, _LOSS, _DRIFT = (f"qwen_edit_trainer.{name}" for name in ("psnr", "validation_loss", "drift"))
_MEASURED_AS = "qwen_edit_trainer.measured_as"
_PSNR_RANGE = 0.1  # a difference in dB that means little
_FOLDER = re.compile(r"step-([0-9]{1,12})")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLora:
    """The LoRAs of a validated step. `files`: the trained weights, their average, or both in this order.

    `psnr` (dB), `loss` and `drift` are those of the first file's validation; None if they were not measured. `drift` is
    the sum of shift, zoom and colour in units of what the pair checker allows. Only results with equal `measured_as`
    can be compared.
    """

    step: int
    files: tuple[Path, ...]
    psnr: float | None
    loss: float | None
    drift: float | None
    measured_as: str = ""


def step_folder(samples: Path, step: int) -> Path:
    """Folder of a step's pictures and LoRAs."""
    return samples / f"step-{step:06d}"


def results_header(
    psnr: float | None, loss: float | None, drift: Mapping[str, float], measured_as: str = ""
) -> dict[str, str]:
    """What the header of a step's LoRA says about its validation. `drift`: the fields of a SampleReport, or empty.
    `measured_as`: a digest of the pairs and settings that determine the results."""
    allowed = PairCheckConfig()
    limits = {"shift": allowed.max_shift, "zoom": allowed.max_zoom_percent, "colour": allowed.max_colour_offset}
    summed = sum(drift[f"drift_{name}"] / limit for name, limit in limits.items()) if drift else None
    found = {_PSNR: psnr, _LOSS: loss, _DRIFT: summed}
    numbers = {name: repr(float(value)) for name, value in found.items() if value is not None}
    return {**numbers, **({_MEASURED_AS: measured_as} if measured_as else {})}


def step_loras(samples: Path) -> list[StepLora]:
    """The steps in this folder that have a LoRA, ascending. Damaged files count as missing."""
    found = (_step_lora(folder) for folder in samples.glob("step-*/"))
    return sorted((each for each in found if each is not None), key=lambda each: each.step)


def _step_lora(folder: Path) -> StepLora | None:
    number = _FOLDER.fullmatch(folder.name)
    files = tuple(path for name in (LORA, EMA) if is_whole(path := folder / name))
    if number is None or not files:
        return None
    try:
        header = read_metadata(files[0])
    except (OSError, SafetensorError):  # deleted meanwhile
        return None
    psnr, loss, drift = (_number(header, name) for name in (_PSNR, _LOSS, _DRIFT))
    return StepLora(int(number[1]), files, psnr, loss, drift, header.get(_MEASURED_AS, ""))


def _number(header: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(header.get(name, ""))
    except ValueError:
        return None
    return None if math.isnan(value) else value


def best_of(loras: Sequence[StepLora]) -> StepLora | None:
    """The step at which the run was best; None if nothing was measured.

    Of the steps whose PSNR is near the highest, the one with the least drift. Without drift, the highest PSNR decides,
    without PSNR the lowest loss; then the later step. Only steps that were validated like the last one count.
    """
    loras = [lora for lora in loras if lora.measured_as == loras[-1].measured_as]
    highest = max((lora.psnr for lora in loras if lora.psnr is not None), default=None)
    if highest is None:
        losses = [(-lora.loss, lora.step, lora) for lora in loras if lora.loss is not None]
        return max(losses, key=lambda each: each[:2])[2] if losses else None
    near = [lora for lora in loras if lora.psnr is not None and lora.psnr >= highest - _PSNR_RANGE]
    has_drift = all(lora.drift is not None for lora in near)
    return max(near, key=lambda lora: (-(lora.drift or 0.0) if has_drift else 0.0, lora.psnr or 0.0, lora.step))


def delete_old(samples: Path, step: int, limit: int) -> None:
    """Delete the LoRAs of earlier steps than `step`, except for the newest `limit` up to `step`, and the best one.

    The pictures stay. Those of later steps stay until the run has reached them again: it was killed after them.
    """
    loras = [each for each in step_loras(samples) if each.step <= step]
    best = best_of(loras)
    for old in loras[: max(0, len(loras) - limit)]:
        for file in old.files if old != best else ():
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("The old LoRA %s can't be deleted (%s).", file, reason_of(error))
