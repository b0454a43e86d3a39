"""Encode pictures with the VAE, and resize masks to the size of the latents."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ..data.masks import loss_weights
from ..errors import ConfigError, DatasetError
from ..events import Observer, raise_if_stopped
from ..files import is_whole
from ..geometry import Size
from .encoders import PictureEncoder
from .encoding_plan import LatentTask, PlannedPair, latents_shape, mask_box
from .entry import entry_path
from .read_ahead import Write, or_error, read_ahead, write_behind


def encode_masks(missing: dict[str, PlannedPair], cache_dir: Path, observer: Observer) -> list[str]:
    """Write the loss weights of `missing` pairs by their cache keys. Returns the problems of unreadable masks."""
    problems = []
    with write_behind() as write:
        for done, (each, weights) in enumerate(read_ahead(missing.values(), or_error(_loss_weights))):
            raise_if_stopped(observer)
            if isinstance(weights, DatasetError):
                problems.append(str(weights))
                continue
            write(entry_path(cache_dir, "mask", each.entry.mask), {"mask": weights})
            observer.on_progress("Encoding masks", done + 1, len(missing))
    return problems


def _loss_weights(planned: PlannedPair) -> Tensor:
    assert planned.pair.mask is not None
    _, height, width = planned.entry.shape
    return loss_weights(planned.pair.mask, mask_box(planned.pair, planned.plan), Size(width, height))


def encode_latents(
    missing: dict[str, LatentTask], encoder: PictureEncoder, cache_dir: Path, observer: Observer
) -> list[str]:
    """Write the latents of `missing` pictures by their cache keys. Returns the problems of unreadable pictures."""
    problems: list[str] = []
    if not missing:
        return problems
    raise_if_stopped(observer)
    # Pictures of one size follow each other, so that they can share a forward pass.
    tasks = sorted(missing.values(), key=lambda task: task.view.size)
    encoding: deque[LatentTask] = deque()  # pictures that the network has taken
    progress = count(1)

    def pictures(write: Write) -> Iterator[Tensor]:
        for task, pixels in read_ahead(tasks, or_error(LatentTask.read)):
            raise_if_stopped(observer)
            if isinstance(pixels, DatasetError):
                problems.append(str(pixels))
                next(progress)
                continue
            if task.picture:
                as_bytes = (pixels * 255).round().to(torch.uint8)
                write(entry_path(cache_dir, "picture", task.picture), {"picture": as_bytes})
            if is_whole(entry_path(cache_dir, "latents", task.key)):  # another process may have written it meanwhile
                observer.on_progress("Encoding pictures", next(progress), len(tasks))
                continue
            encoding.append(task)
            yield pixels

    with encoder.loaded(observer) as encode, write_behind() as write:
        for latents in encode(pictures(write)):
            task = encoding.popleft()
            check_shape("VAE", latents, latents_shape(task.view))
            write(entry_path(cache_dir, "latents", task.key), {"latents": latents})
            observer.on_progress("Encoding pictures", next(progress), len(tasks))
    return problems


def check_shape(network: str, made: Tensor, wanted: tuple[int, ...]) -> None:
    """Raise ConfigError if the last dimensions of a result are not `wanted`, as with the network of another model."""
    if tuple(made.shape[-len(wanted) :]) != wanted:
        raise ConfigError(
            f"The {network} returns the shape {list(made.shape)}, but the base model needs {list(wanted)}, so it "
            f"belongs to another model. Use the {network} of Qwen-Image-Edit."
        )
