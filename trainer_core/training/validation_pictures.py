"""Which validation pictures are drawn, and what is shown and measured of them.

A shot is a held-out pair under one instruction at one size. Its references are the pair's own, as encoded.
"""

from __future__ import annotations

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
from ..config.validation import SIZE_STEP
from ..data.alignment import Where
from ..events import SampleReport
from ..geometry import Size, bucket_size, similar_shape
from ..pictures.drift import Drift, mean_drift, measure_drift, unedited_region
from ..pictures.grid import GridRow, save_picture, validation_grid
from ..pictures.sample_pictures import save_sample_pictures
from ..qwen_image.latents import VAE_FACTOR
from ..qwen_image.vae import decode_latents, encode_picture
from .ema import AVERAGE, TRAINED

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

Drawn = Mapping[str, Mapping["Shot", Tensor]]  # latents [C, H, W] by who drew them ("base", "LoRA") and by shot


@dataclass(frozen=True, slots=True)
class Shot:
    """`prompt` is the cache key of `caption`; `asks_for_target`: it is the pair's own instruction."""

    entry: EncodedEntry
    caption: str
    prompt: str
    size: Size
    asks_for_target: bool

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return self.entry.shape[0], self.size.height // VAE_FACTOR, self.size.width // VAE_FACTOR

    @property
    def at_own_size(self) -> bool:
        """Whether the pair was encoded at this very size."""
        return self.size == own_size(self.entry)

    @property
    def has_target(self) -> bool:
        """Whether the picture can be held against the target."""
        return self.asks_for_target and similar_shape(self.size, own_size(self.entry))


@dataclass(frozen=True, slots=True)
class Standard:
    """What the pictures of a shot are held against: the target at its size, how near (dB) the VAE alone comes to that,
    and where the target shows its reference unedited (None where that can't be told)."""

    target: Image.Image
    vae_psnr: float
    unedited: Where | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One drawn picture against its target."""

    psnr: float
    drift: Drift | None

    def as_text(self) -> str:
        """For people."""
        return f"{self.psnr:.1f} dB" + (f", {self.drift.as_text()}" if self.drift else "")


def plan_shots(entries: Sequence[EncodedEntry], sizes: Sequence[Size | int]) -> tuple[Shot, ...]:
    """Every pair under its first caption and under the validation prompts, each at every size."""
    shots = []
    for entry in entries:
        words = [(entry.captions[0], entry.prompts[0], True)]
        prompts = zip(entry.validation_captions, entry.validation_prompts, strict=True)
        words += [(caption, prompt, False) for caption, prompt in prompts]
        of_pair = dict.fromkeys(_size(entry, size) for size in sizes) or [own_size(entry)]
        shots += [Shot(entry, words, prompt, size, own) for words, prompt, own in words for size in of_pair]
    return tuple(shots)


def own_size(entry: EncodedEntry) -> Size:
    """The size that a pair's target is encoded at."""
    _, height, width = entry.shape
    return Size(width * VAE_FACTOR, height * VAE_FACTOR)


def _size(entry: EncodedEntry, size: Size | int) -> Size:
    return size if isinstance(size, Size) else bucket_size(own_size(entry), size, SIZE_STEP)


def report_pictures(
    encoded: EncodedDataset,
    vae: AutoencoderKLQwenImage,
    drawn: Drawn,
    standards: dict[Shot, Standard],
    *,
    step: int,
    grid_file: Path,
) -> SampleReport:
    """Decode, measure, save the grid. `standards` are remembered from one validation to the next."""
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
        wanted = target if shot.asks_for_target else None
        rows.append(
            GridRow(
                references=tuple(references),
                base=pictures["base"],
                lora=pictures.get(TRAINED),
                ema=pictures.get(AVERAGE),
                target=wanted,
                caption=shot.caption,
                label=label,
            )
        )
    save_sample_pictures(rows, grid_file.with_suffix(""))
    save_picture(validation_grid(rows), grid_file)
    ceiling = _mean([standards[shot].vae_psnr for shot in drawn["base"] if shot.has_target])
    return _report(measured, ceiling, step, grid_file)


def _report(
    measured: Mapping[str, Sequence[Measured]], vae_psnr: float | None, step: int, grid_file: Path
) -> SampleReport:
    """Drift is that of the trained weights, or of their average where they are not drawn."""
    drift = mean_drift(each.drift for each in measured.get(TRAINED, measured.get(AVERAGE, ())))
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
    )


def _standard(
    encoded: EncodedDataset,
    vae: AutoencoderKLQwenImage,
    shot: Shot,
    target: Image.Image,
    references: Sequence[Image.Image],
) -> Standard:
    """At the shot's size and no larger: memory is short just now."""
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
    """Peak signal-to-noise ratio in dB of pictures in 0..1."""
    error = float((picture - target).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)
