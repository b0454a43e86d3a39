"""Encode a dataset: first every picture through the VAE, then every prompt through Qwen2.5-VL.

Only what the cache lacks is made, each result is on disk before the next begins, and one network is in memory at a
time. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import EncodingConfig, ModelConfig, digest
from ..data.folders import changed_files
from ..data.images import open_checked_picture
from ..data.masks import loss_weights
from ..data.pairing import EditDataset, dataset_states
from ..device import pick_device, release_memory
from ..errors import ConfigError, DatasetError
from ..events import SILENT, Observer, raise_if_stopped
from ..files import is_whole, write_tensors
from ..geometry import Size
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.folder import model_folder
from ..qwen_image.text_encoder import Picture
from ..qwen_image.transformer import transformer_settings
from .cache import entry_path
from .encoded import EncodedDataset, save_manifest
from .encoders import Encoders, PictureEncoder, PromptEncoder, own_pictures, own_prompts
from .jobs import LatentJob, PlannedPair, latents_shape, mask_box, missing_jobs, plan_encoding
from .pictures import View, render, render_picture
from .sizes import large_enough

READ_AHEAD = 4  # pictures decoded while the network works on the one before

T = TypeVar("T")
R = TypeVar("R")


def encode_dataset(
    dataset: EditDataset,
    model: ModelConfig,
    encoding: EncodingConfig,
    cache_dir: Path,
    observer: Observer = SILENT,
    encoders: Encoders | None = None,
) -> EncodedDataset:
    """Encode what is missing and write the manifest. `encoders` stand in the place of the base model's.

    Raises:
        ConfigError: the dataset does not fit the flavour, or `encoders` the model or the preprocessing.
        DatasetError: targets are too small, none would be left to train on, or pictures changed since they were paired;
            then the others are encoded first.
        ModelFileError: the VAE or text encoder can't be loaded.
        Interrupted: the observer wants to stop; what was encoded stays.
    """
    _check_built(encoding)
    _check_references(dataset, model)
    encoders = encoders or Encoders()
    encoders.check(encoding)
    pairs, left_out = large_enough(dataset.pairs, encoding.sizes)
    dataset = dataclasses.replace(dataset, pairs=pairs)
    device = pick_device(model.device)
    vae = encoders.pictures or own_pictures(model, device)
    text_encoder = encoders.prompts or own_prompts(model, encoding, device)
    held_out = _held_out(dataset, encoding)
    planned = [
        plan_encoding(pair, model, encoding, (vae.digest, text_encoder.digest), held_out) for pair in dataset.pairs
    ]
    jobs = missing_jobs(planned, cache_dir)
    before = dataset_states(dataset) if any(jobs) else {}
    problems = _encode_masks(jobs.masks, cache_dir, observer)
    problems += _encode_latents(jobs.latents, vae, cache_dir, observer)
    release_memory()
    problems += _encode_prompts(jobs.prompts, text_encoder, prompt_width(model), cache_dir, observer)
    release_memory()
    _raise_unread(problems)
    encoded = save_manifest(
        cache_dir,
        flavour=model.flavour,
        preprocessing=encoding.preprocessing,
        prompt_width=prompt_width(model),
        pairs=tuple(each.entry for each in planned if each.pair.key not in held_out),
        validation_pairs=tuple(each.entry for each in planned if each.pair.key in held_out),
        left_out=left_out,
    )
    changed = changed_files(before, dataset_states(dataset)) if any(jobs) else ()
    return dataclasses.replace(encoded, changed=changed)


def _raise_unread(problems: list[str]) -> None:
    if problems:
        raise DatasetError(
            "Some pictures could not be encoded as they were paired. All others are in the cache, and nothing of these "
            "is. Run again with the folders at rest:",
            list(dict.fromkeys(problems)),
        )


def _check_built(encoding: EncodingConfig) -> None:
    """Settings whose work is not done yet are refused, never ignored."""
    for name in ("conditioning_multidataset_sampling", "conditioning_image_embeds", "reference_latents"):
        usual = next(field.default for field in dataclasses.fields(encoding) if field.name == name)
        if getattr(encoding, name) != usual:
            raise ConfigError(f"{name} is {getattr(encoding, name)!r}; this version has {usual!r} only.")


def _check_references(dataset: EditDataset, model: ModelConfig) -> None:
    allowed = FLAVOURS[model.flavour].max_references
    most = max((len(pair.references) for pair in dataset.pairs), default=0)
    if most > allowed:
        raise ConfigError(
            f"The dataset has {most} references per pair; {model.flavour} takes {allowed}. "
            "Use one reference folder, or a model of flavour edit-v2 or edit-v3."
        )


def _held_out(dataset: EditDataset, encoding: EncodingConfig) -> set[str]:
    """Keys of the pairs kept out of training: the same ones whatever the order or the rest of the dataset."""
    keys = sorted(dataset.pairs, key=lambda pair: digest([encoding.seed, pair.key]))
    wanted = len(keys) if encoding.num_eval_images < 0 else encoding.num_eval_images
    if 0 < len(keys) <= wanted and encoding.num_eval_images > 0:
        raise DatasetError(
            f"num_eval_images is {wanted}, but the dataset has only {len(keys)} pairs, so none would be left to "
            f"train on. Allowed is 0 to {len(keys) - 1}."
        )
    return {pair.key for pair in keys[:wanted]}


def _encode_masks(jobs: list[PlannedPair], cache_dir: Path, observer: Observer) -> list[str]:
    problems = []
    for done, (each, weights) in enumerate(read_ahead(jobs, _or_error(_loss_weights))):
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


def _encode_latents(
    jobs: dict[str, LatentJob], encoder: PictureEncoder, cache_dir: Path, observer: Observer
) -> list[str]:
    problems: list[str] = []
    if not jobs:
        return problems
    raise_if_stopped(observer)
    with encoder.loaded(observer) as encode:
        for done, (job, pixels) in enumerate(read_ahead(jobs.values(), _or_error(LatentJob.read))):
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
                _check_shape("VAE", latents, latents_shape(job.view))
                write_tensors(path, {"latents": latents})
            observer.on_progress("Encoding pictures", done + 1, len(jobs))
    return problems


def _check_shape(network: str, made: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises ConfigError where the network is not the base model's kind; only the last sizes count."""
    if tuple(made.shape[-len(wanted) :]) != wanted:
        raise ConfigError(
            f"The {network} gives {list(made.shape)} where the base model takes {list(wanted)}, so it is that of "
            f"another model. Use Qwen-Image-Edit's."
        )


def _encode_prompts(
    jobs: list[tuple[PlannedPair, dict[str, str]]],
    encoder: PromptEncoder,
    width: int,
    cache_dir: Path,
    observer: Observer,
) -> list[str]:
    """`jobs`: pairs with keys and texts of the prompts they lack."""
    problems: list[str] = []
    total = sum(len(missing) for _, missing in jobs)
    if not total:
        return problems
    raise_if_stopped(observer)
    progress = count(1)
    with encoder.loaded(observer) as encode:
        for (_, missing), pictures in read_ahead(jobs, _or_error(lambda job: _vision_pictures(job[0]))):
            if isinstance(pictures, DatasetError):
                problems.append(str(pictures))
                continue
            for key, text in missing.items():
                raise_if_stopped(observer)
                path = entry_path(cache_dir, "prompt", key)
                if not is_whole(path):
                    embeds = encode(text, pictures)
                    _check_shape("text encoder", embeds, (width,))
                    write_tensors(path, {"prompt": embeds})
                observer.on_progress("Encoding prompts", next(progress), total)
    return problems


def prompt_width(model: ModelConfig) -> int:
    """Width D of the prompt embeddings, from the transformer's configuration or file."""
    return int(transformer_settings(model_folder(model).transformer).get("joint_attention_dim", 3584))


def _vision_pictures(planned: PlannedPair) -> list[Picture]:
    views = zip(planned.pair.references, planned.pair.digests[1:], planned.plan.vision, strict=True)
    return [vision_picture(open_checked_picture(path, content), view) for path, content, view in views]


def vision_picture(picture: Any, view: View) -> Picture:
    """What the text encoder takes: pixels under the comfyui policy, an 8-bit picture under diffusers'."""
    return render(picture, view) if view.resample == "area" else render_picture(picture, view)


def _or_error(read: Callable[[T], R]) -> Callable[[T], R | DatasetError]:
    """`read`, whose DatasetError is handed on, not raised, so that the other pictures are encoded all the same."""

    def attempt(item: T) -> R | DatasetError:
        try:
            return read(item)
        except DatasetError as error:
            return error

    return attempt


def read_ahead(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each item with what `read` made of it in a thread, a few items ahead and no more."""
    source = iter(items)
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read-ahead") as pool:
        waiting = [(item, pool.submit(read, item)) for item in islice(source, READ_AHEAD)]
        try:
            while waiting:
                item, future = waiting.pop(0)
                result = future.result()
                waiting += [(item_, pool.submit(read, item_)) for item_ in islice(source, 1)]
                yield item, result
        finally:
            for _, future in waiting:
                future.cancel()
