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

from ..conditioning.encoded import EncodedDataset, EncodedEntry
from ..conditioning.pictures import to_picture, to_tensor
from ..events import SampleReport
from ..geometry import Size, bucket_size
from ..qwen_image.latents import VAE_FACTOR
from ..qwen_image.vae import decode_latents, encode_picture
from .grid import GridRow, save_picture, validation_grid
from .sample_pictures import save_sample_pictures

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

SIZE_STEP = 16  # pixels, so that no token is cut
_SAME_SHAPE = 0.05  # aspect ratios that differ by less (rounding of small sizes) are held against the target

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
        own = own_size(self.entry)
        stretched = (self.size.width * own.height) / (self.size.height * own.width)
        return self.asks_for_target and abs(stretched - 1) < _SAME_SHAPE


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
    ceilings: dict[Shot, float],
    *,
    step: int,
    grid_file: Path,
) -> SampleReport:
    """Decode, measure, save the grid. `ceilings` remembers what the VAE alone makes of targets."""
    rows, ratios = [], []
    for shot in drawn["base"]:
        pixels = {name: decode_latents(vae, latents[shot]) for name, latents in drawn.items()}
        target, *references = (to_picture(picture.float() / 255) for picture in encoded.load_pictures(shot.entry))
        found = {}
        if shot.has_target:
            wanted = to_tensor(target.resize(shot.size, Image.Resampling.LANCZOS))
            if shot not in ceilings:
                ceilings[shot] = _ceiling(encoded, vae, shot, wanted)
            found = {name: psnr(picture, wanted) for name, picture in pixels.items()}
            ratios.append({**found, "VAE": ceilings[shot]})
        shown = {name: to_picture(picture) for name, picture in pixels.items()}
        rows.append(
            GridRow(
                references=tuple(references),
                base=shown["base"],
                lora=shown["LoRA"],
                target=target if shot.asks_for_target else None,
                caption=shot.caption,
                label=_label(shot, found),
            )
        )
    save_sample_pictures(rows, grid_file.with_suffix(""))
    save_picture(validation_grid(rows), grid_file)
    base, lora, vae_alone = (_mean(ratios, name) for name in ("base", "LoRA", "VAE"))
    return SampleReport(step=step, grid_file=grid_file, psnr_base=base, psnr_lora=lora, psnr_vae=vae_alone)


def _ceiling(encoded: EncodedDataset, vae: AutoencoderKLQwenImage, shot: Shot, wanted: Tensor) -> float:
    """PSNR of the target through the VAE, at the shot's size and no larger: memory is short just now."""
    latents = encoded.load(shot.entry).target_latents if shot.at_own_size else encode_picture(vae, wanted)
    return psnr(decode_latents(vae, latents), wanted)


def _label(shot: Shot, ratios: Mapping[str, float]) -> str:
    measured = ", ".join(f"{name} {value:.1f} dB" for name, value in ratios.items())
    return f"{shot.size.width} x {shot.size.height}" + (f"  ·  {measured}" if measured else "")


def _mean(ratios: Sequence[Mapping[str, float]], name: str) -> float | None:
    return sum(row[name] for row in ratios) / len(ratios) if ratios else None


def psnr(picture: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1."""
    error = float((picture - target).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)
