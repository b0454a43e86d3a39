"""Validation pictures: plan which ones to sample, compare them with their targets, and save the grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ..conditioning.encoded import EncodedDataset
from ..conditioning.entry import EncodedEntry
from ..conditioning.pictures import to_picture, to_tensor
from ..config import ValidationConfig
from ..config.validation import SIZE_STEP
from ..data.alignment import Where
from ..errors import DamagedFileError
from ..events import SampleReport
from ..files import is_whole, read_tensors, write_tensors
from ..geometry import Size, bucket_size, similar_shape
from ..pictures.drift import Drift, mean_drift, measure_drift, unedited_region
from ..pictures.grid import GridRow, save_picture, validation_grid
from ..pictures.sample_pictures import save_sample_pictures
from ..qwen_image.latents import VAE_FACTOR
from ..qwen_image.vae import decode_latents, encode_picture
from ..text import reason_of
from .ema import AVERAGE, TRAINED

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

_LOG = logging.getLogger(__name__)
_NO_DRIFT = "Drift outside the edit can't be measured: the pictures have too little in common with their targets."
Drawn = Mapping[str, Mapping["Shot", Tensor]]  # latents [C, H, W] by variant ("base", TRAINED, AVERAGE) and shot


@dataclass(frozen=True, slots=True)
class Shot:
    """A held-out pair with one caption at one size. The references are always used as encoded.

    `prompt` is the caption's cache key. `asks_for_target` is True for the pair's own caption.
    """

    entry: EncodedEntry
    caption: str
    prompt: str
    size: Size
    asks_for_target: bool

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """Shape [C, H, W] of the latents to sample."""
        return self.entry.shape[0], self.size.height // VAE_FACTOR, self.size.width // VAE_FACTOR

    @property
    def at_own_size(self) -> bool:
        """Whether the pair was encoded at this size."""
        return self.size == own_size(self.entry)

    @property
    def has_target(self) -> bool:
        """Whether the picture can be compared with the target."""
        return self.asks_for_target and similar_shape(self.size, own_size(self.entry))


@dataclass(frozen=True, slots=True)
class Standard:
    """What a shot's pictures are compared with: the target at the shot's size, the PSNR (dB) of the target encoded and
    decoded by the VAE, and the region where the target equals its reference (None if it can't be measured)."""

    target: Image.Image
    vae_psnr: float
    unedited: Where | None


@dataclass(frozen=True, slots=True)
class Measured:
    """A sampled picture compared with its target. `psnr` is in dB."""

    psnr: float
    drift: Drift | None

    def as_text(self) -> str:
        """PSNR and drift with their units."""
        return f"{self.psnr:.1f} dB" + (f", {self.drift.as_text()}" if self.drift else "")


def validation_shots(held_out: EncodedDataset, config: ValidationConfig) -> tuple[Shot, ...]:
    """The pictures that each validation of a run draws."""
    return plan_shots(held_out.validation_pairs[: config.num_validation_images], config.sizes)


def plan_shots(entries: Sequence[EncodedEntry], sizes: Sequence[Size | int]) -> tuple[Shot, ...]:
    """Every pair with its first caption and its validation captions, at every size; at its own size if there is none.

    A number as size is the side of a square of equal area.
    """
    shots = []
    for entry in entries:
        own = own_size(entry)
        wanted = (size if isinstance(size, Size) else bucket_size(own, size, SIZE_STEP) for size in sizes)
        distinct = dict.fromkeys(wanted) or [own]
        prompts = zip(entry.validation_captions, entry.validation_prompts, strict=True)
        captions = [(entry.captions[0], entry.prompts[0], True), *((*each, False) for each in prompts)]
        shots += [Shot(entry, text, prompt, size, asks) for text, prompt, asks in captions for size in distinct]
    return tuple(shots)


def own_size(entry: EncodedEntry) -> Size:
    """The size at which a pair's target was encoded."""
    _, height, width = entry.shape
    return Size(width * VAE_FACTOR, height * VAE_FACTOR)


def incomparable(shots: Sequence[Shot]) -> str:
    """Why pictures can't be compared with their targets, as a sentence; empty if all can."""
    asked = [shot for shot in shots if shot.asks_for_target]
    others = [shot for shot in asked if not shot.has_target]
    if not others:
        return ""
    drawn, own = others[0].size, own_size(others[0].entry)
    return (
        f"{len(others)} of {len(asked)} validation pictures can't be compared with their targets, so there is no PSNR "
        f"and no drift for them: a picture is {drawn.width} x {drawn.height}, its target {own.width} x {own.height}. "
        "For the target's shape, set validation_resolution to a single number, such as 1024, or leave it empty."
    )


def read_base(path: Path, shot: Shot) -> Tensor | None:
    """The base model's latents [C, H, W] of a shot that `keep_base` wrote; None if the file is missing or damaged."""
    try:
        latents = read_tensors(path)["latents"] if is_whole(path) else None
    except (OSError, DamagedFileError, KeyError):
        return None
    whole = latents is not None and tuple(latents.shape) == shot.latents_shape and bool(latents.isfinite().all())
    return latents if whole else None


def keep_base(path: Path, latents: Tensor) -> None:
    """Write the base model's latents for later starts of the run. A full disk does not stop the validation."""
    try:
        write_tensors(path, {"latents": latents})
    except OSError as error:
        _LOG.warning("%s can't be written (%s). After a pause, this picture is drawn again.", path, reason_of(error))


def report_pictures(
    encoded: EncodedDataset,
    vae: AutoencoderKLQwenImage,
    drawn: Drawn,
    standards: dict[Shot, Standard],
    *,
    step: int,
    grid_file: Path,
) -> SampleReport:
    """Decode and measure the pictures, and save the grid. Adds missing entries to the cache `standards`."""
    rows = []
    measured: dict[str, list[Measured]] = {name: [] for name in drawn}
    for shot in drawn["base"]:
        pixels = {name: decode_latents(vae, latents[shot]) for name, latents in drawn.items()}
        pictures = {name: to_picture(each) for name, each in pixels.items()}
        target, *references = (to_picture(each.float() / 255) for each in encoded.load_pictures(shot.entry))
        label = f"{shot.size.width} x {shot.size.height}"
        if shot.has_target:
            if shot not in standards:
                standards[shot] = _standard(encoded, vae, shot, target, references)
            for name in drawn:
                measured[name].append(_measure(pixels[name], pictures[name], standards[shot]))
                label += f"  ·  {name} {measured[name][-1].as_text()}"
        elif shot.asks_for_target:
            own = own_size(shot.entry)
            label += f"  ·  not compared: the target is {own.width} x {own.height}"
        rows.append(
            GridRow(
                references=tuple(references),
                base=pictures["base"],
                lora=pictures.get(TRAINED),
                ema=pictures.get(AVERAGE),
                target=target if shot.asks_for_target else None,
                caption=shot.caption,
                label=label,
            )
        )
    save_sample_pictures(rows, grid_file.with_suffix(""))
    save_picture(validation_grid(rows), grid_file)
    ceiling = _mean([standards[shot].vae_psnr for shot in drawn["base"] if shot.has_target])
    return _report(measured, ceiling, incomparable(tuple(drawn["base"])), step, grid_file)


def mean_psnr(
    encoded: EncodedDataset, vae: AutoencoderKLQwenImage, drawn: Mapping[Shot, Tensor], standards: dict[Shot, Standard]
) -> float | None:
    """Mean PSNR (dB) of decoded latents [C, H, W] by shot; None without any. Adds what `standards` lacks."""
    found = []
    for shot, latents in drawn.items():
        if shot not in standards:
            target, *references = (to_picture(each.float() / 255) for each in encoded.load_pictures(shot.entry))
            standards[shot] = _standard(encoded, vae, shot, target, references)
        found.append(psnr(decode_latents(vae, latents), to_tensor(standards[shot].target)))
    return _mean(found)


def _report(
    measured: Mapping[str, Sequence[Measured]], vae_psnr: float | None, unmeasured: str, step: int, grid_file: Path
) -> SampleReport:
    """The report. Its drift is that of the trained weights, or of the average if only that was sampled."""
    drift = mean_drift(each.drift for each in measured.get(TRAINED, measured.get(AVERAGE, ())))
    if vae_psnr is not None and drift is None:
        unmeasured = " ".join(filter(None, (unmeasured, _NO_DRIFT)))
    base, lora, ema = (_mean([each.psnr for each in measured.get(name, ())]) for name in ("base", TRAINED, AVERAGE))
    return SampleReport(
        step=step,
        grid_file=grid_file,
        psnr_base=base,
        psnr_lora=lora,
        psnr_ema=ema,
        psnr_vae=vae_psnr,
        drift_shift=drift and drift.shift,
        drift_zoom=drift and drift.zoom,
        drift_colour=drift and drift.colour,
        unmeasured=unmeasured,
    )


def _standard(
    encoded: EncodedDataset,
    vae: AutoencoderKLQwenImage,
    shot: Shot,
    target: Image.Image,
    references: Sequence[Image.Image],
) -> Standard:
    """The shot's Standard. Works at the shot's size, to save memory while the transformer is loaded."""
    at_size = target.resize(shot.size, Image.Resampling.LANCZOS)
    wanted = to_tensor(at_size)
    latents = encoded.load(shot.entry).target_latents if shot.at_own_size else encode_picture(vae, wanted)
    return Standard(at_size, psnr(decode_latents(vae, latents), wanted), unedited_region(at_size, references))


def _measure(pixels: Tensor, picture: Image.Image, standard: Standard) -> Measured:
    drift = measure_drift(picture, standard.target, standard.unedited)
    return Measured(psnr(pixels, to_tensor(standard.target)), drift)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def psnr(picture: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values from 0 to 1."""
    error = float((picture - target).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)
