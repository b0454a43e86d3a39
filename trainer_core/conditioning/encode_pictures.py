"""Pictures through the VAE, and masks to the size of the latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data.masks import loss_weights
from ..errors import ConfigError, DatasetError
from ..events import Observer, raise_if_stopped
from ..files import is_whole, write_tensors
from ..geometry import Size
from .encoders import PictureEncoder
from .entry import entry_path
from .jobs import LatentJob, PlannedPair, latents_shape, mask_box
from .read_ahead import or_error, read_ahead


def encode_masks(jobs: dict[str, PlannedPair], cache_dir: Path, observer: Observer) -> list[str]:
    problems = []
    for done, (each, weights) in enumerate(read_ahead(jobs.values(), or_error(_loss_weights))):
        raise_if_stopped(observer)
        if isinstance(weights, DatasetError):
            problems.append(str(weights))
            continue
        write_tensors(entry_path(cache_dir, "mask", each.entry.mask), {"mask": weights})
        observer.on_progress("Encoding masks", done + 1, len(jobs))
    return problems


def _loss_weights(planned: PlannedPair) -> Tensor:
    assert planned.pair.mask is not None
    _, height, width = planned.entry.shape
    return loss_weights(planned.pair.mask, mask_box(planned.pair, planned.plan), Size(width, height))


def encode_latents(
    jobs: dict[str, LatentJob], encoder: PictureEncoder, cache_dir: Path, observer: Observer
) -> list[str]:
    problems: list[str] = []
    if not jobs:
        return problems
    raise_if_stopped(observer)
    with encoder.loaded(observer) as encode:
        for done, (job, pixels) in enumerate(read_ahead(jobs.values(), or_error(LatentJob.read))):
            raise_if_stopped(observer)
            if isinstance(pixels, DatasetError):
                problems.append(str(pixels))
                continue
            if job.picture:
                as_bytes = (pixels * 255).round().to(torch.uint8)
                write_tensors(entry_path(cache_dir, "picture", job.picture), {"picture": as_bytes})
            path = entry_path(cache_dir, "latents", job.key)
            if not is_whole(path):  # another run may have made it meanwhile
                latents = encode(pixels)
                check_shape("VAE", latents, latents_shape(job.view))
                write_tensors(path, {"latents": latents})
            observer.on_progress("Encoding pictures", done + 1, len(jobs))
    return problems


def check_shape(network: str, made: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises ConfigError where the network is not the base model's kind; only the last sizes count."""
    if tuple(made.shape[-len(wanted) :]) != wanted:
        raise ConfigError(
            f"The {network} gives {list(made.shape)} where the base model takes {list(wanted)}, so it is that of "
            f"another model. Use Qwen-Image-Edit's."
        )
