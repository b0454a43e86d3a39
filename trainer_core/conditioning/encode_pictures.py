"""Encode pictures with the VAE; masks and differences of pixels become maps of the size of the latents."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..data.images import open_checked_picture
from ..data.masks import loss_weights
from ..errors import ConfigError, DatasetError
from ..events import Observer, raise_if_stopped
from ..files import is_whole
from ..geometry import Size, similar_shape
from ..qwen_image.latents import VAE_FACTOR
from .encoders import PictureEncoder
from .encoding_plan import LatentTask, PlannedPair, latents_shape, mask_box
from .entry import entry_path
from .pictures import View, render
from .read_ahead import Write, or_error, read_ahead, write_behind


def encode_masks(missing: dict[str, PlannedPair], cache_dir: Path, observer: Observer) -> list[str]:
    """Write the loss weights of `missing` pairs by their cache keys. Returns the problems of unreadable masks."""
    return _write_maps("mask", missing, _loss_weights, cache_dir, observer, "Encoding masks")


def encode_differences(missing: dict[str, PlannedPair], cache_dir: Path, observer: Observer) -> list[str]:
    """Write the pixel differences of `missing` pairs by their cache keys. Returns the problems of unreadable files."""
    return _write_maps("difference", missing, _difference, cache_dir, observer, "Comparing pixels")


def _write_maps(
    kind: str,
    missing: dict[str, PlannedPair],
    make: Callable[[PlannedPair], Tensor],
    cache_dir: Path,
    observer: Observer,
    stage: str,
) -> list[str]:
    """Write what `make` returns for each of the `missing` pairs. Returns the problems of unreadable files."""
    problems = []
    with write_behind() as write:
        found = read_ahead(missing.items(), or_error(lambda item: make(item[1])))
        for done, ((key, _), made) in enumerate(found):
            raise_if_stopped(observer)
            if isinstance(made, DatasetError):
                problems.append(str(made))
                continue
            write(entry_path(cache_dir, kind, key), {kind: made})
            observer.on_progress(stage, done + 1, len(missing))
    return problems


def _loss_weights(planned: PlannedPair) -> Tensor:
    assert planned.pair.mask is not None
    _, height, width = planned.entry.shape
    return loss_weights(planned.pair.mask, mask_box(planned.pair, planned.plan), Size(width, height))


def _difference(planned: PlannedPair) -> Tensor:
    """`pixel_difference` of the pair's target and first reference; 0 if they have different shapes."""
    target, reference = planned.plan.target, planned.plan.references[0]
    if not similar_shape(reference.size, target.size):
        return torch.zeros(1, *planned.entry.shape[1:])
    files = zip((planned.pair.target, *planned.pair.references), planned.pair.digests, strict=True)
    views = (target, View(reference.box, target.size, target.resample))
    one, other = (render(open_checked_picture(*file), view) for file, view in zip(files, views, strict=False))
    return pixel_difference(one, other)


def pixel_difference(target: Tensor, reference: Tensor) -> Tensor:
    """The mean difference [1, H/8, W/8], in 8-bit steps, of two pictures [3, H, W] in 0..1.

    Squares of 2x2 pixels are averaged first, because in there JPEG pictures differ without an edit.
    """
    squares = avg_pool2d(target - reference, 2).abs().mean(dim=0, keepdim=True)
    return 255 * avg_pool2d(squares, VAE_FACTOR // 2)


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
