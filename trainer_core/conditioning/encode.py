"""Encode a dataset: first every picture through the VAE, then every prompt through Qwen2.5-VL.

Only what the cache lacks is made, each result is on disk before the next begins, and one network is in memory at a
time. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import EncodingConfig, ModelConfig, digest
from ..data.images import open_picture
from ..data.masks import loss_weights
from ..data.pairing import EditDataset, EditPair
from ..device import pick_device, release_memory
from ..errors import ConfigError, DatasetError
from ..events import SILENT, Observer, raise_if_stopped
from ..files import is_whole, write_tensors
from ..geometry import Box, Size
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.folder import model_folder
from ..qwen_image.latents import VAE_FACTOR
from ..qwen_image.text_encoder import Picture
from ..qwen_image.transformer import transformer_settings
from .cache import entry_path
from .encoded import EncodedDataset, EncodedEntry, save_manifest
from .encoders import Encoders, PictureEncoder, PromptEncoder, own_pictures, own_prompts
from .pictures import PairPlan, View, plan_pair, render, render_picture
from .sizes import large_enough

LATENT_CHANNELS = 16
READ_AHEAD = 4  # pictures decoded while the network works on the one before

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _PlannedPair:
    """A pair, its views and its cache keys."""

    pair: EditPair
    plan: PairPlan
    entry: EncodedEntry
    negative_prompt: str

    def latent_views(self) -> Iterator[tuple[str, Path, View]]:
        """Key, file and view of every picture that goes through the VAE."""
        yield self.entry.target, self.pair.target, self.plan.target
        yield from zip(self.entry.references, self.pair.references, self.plan.references, strict=True)

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Key and caption of every prompt."""
        yield from zip(self.entry.prompts, self.pair.captions, strict=True)
        if self.entry.negative:
            yield self.entry.negative, self.negative_prompt
        if self.entry.empty:
            yield self.entry.empty, ""


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
        DatasetError: targets are too small, or none would be left to train on.
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
    planned = [_plan(pair, model, encoding, (vae.digest, text_encoder.digest), held_out) for pair in dataset.pairs]
    _encode_masks(planned, cache_dir, observer)
    _encode_latents(planned, vae, cache_dir, observer)
    release_memory()
    _encode_prompts(planned, text_encoder, prompt_width(model), cache_dir, observer)
    release_memory()
    return save_manifest(
        cache_dir,
        flavour=model.flavour,
        preprocessing=encoding.preprocessing,
        prompt_width=prompt_width(model),
        pairs=tuple(each.entry for each in planned if each.pair.key not in held_out),
        validation_pairs=tuple(each.entry for each in planned if each.pair.key in held_out),
        left_out=left_out,
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


def _plan(
    pair: EditPair, model: ModelConfig, encoding: EncodingConfig, digests: tuple[str, str], held_out: set[str]
) -> _PlannedPair:
    """`digests` are the VAE's and the text encoder's."""
    flavour, kinds = FLAVOURS[model.flavour], pair.conditioning_types
    plan = plan_pair(pair.sizes, flavour, encoding, pair.key, conditioning_types=kinds)
    entry = _entry(pair, plan, digests, encoding, keep_pictures=pair.key in held_out)
    return _PlannedPair(pair, plan, entry, encoding.validation_negative_prompt)


def _entry(
    pair: EditPair, plan: PairPlan, digests: tuple[str, str], encoding: EncodingConfig, *, keep_pictures: bool
) -> EncodedEntry:
    views = (plan.target, *plan.references)
    files = [[file, view.as_json()] for file, view in zip(pair.digests, views, strict=True)]
    seen = [[file, view.as_json()] for file, view in zip(pair.digests[1:], plan.vision, strict=True)]
    vae, text_encoder = digests
    latents = [digest([vae, *file]) for file in files]
    shapes = [_latents_shape(view) for view in views]

    def prompt_key(caption: str) -> str:
        return digest([text_encoder, seen, caption])

    return EncodedEntry(
        key=pair.key,
        captions=pair.captions,
        target=latents[0],
        references=tuple(latents[1:]),
        prompts=tuple(prompt_key(caption) for caption in pair.captions),
        shape=shapes[0],
        reference_shapes=tuple(shapes[1:]),
        negative=prompt_key(encoding.validation_negative_prompt) if keep_pictures else "",
        pictures=tuple(digest(["picture", *file]) for file in files) if keep_pictures else (),
        empty=prompt_key("") if encoding.encode_empty_caption else "",
        mask=digest(["mask", pair.mask.digest, list(_mask_box(pair, plan)), shapes[0]]) if pair.mask else "",
    )


def _mask_box(pair: EditPair, plan: PairPlan) -> Box:
    assert pair.mask is not None
    return plan.mask_box(pair.sizes[0], pair.mask.size)


def _encode_masks(planned: list[_PlannedPair], cache_dir: Path, observer: Observer) -> None:
    jobs = [each for each in planned if each.pair.mask and not is_whole(entry_path(cache_dir, "mask", each.entry.mask))]
    for done, (each, weights) in enumerate(read_ahead(jobs, _loss_weights)):
        raise_if_stopped(observer)
        write_tensors(entry_path(cache_dir, "mask", each.entry.mask), {"mask": weights})
        observer.on_progress("Encoding masks", done + 1, len(jobs))


def _loss_weights(planned: _PlannedPair) -> Tensor:
    assert planned.pair.mask is not None
    _, height, width = planned.entry.shape
    return loss_weights(planned.pair.mask.path, _mask_box(planned.pair, planned.plan), Size(width, height))


def _encode_latents(planned: list[_PlannedPair], encoder: PictureEncoder, cache_dir: Path, observer: Observer) -> None:
    jobs: dict[str, tuple[Path, View]] = {}
    pictures: dict[str, str] = {}  # latents key -> picture key, for held-out pairs
    for each in planned:
        picture_keys = each.entry.pictures or ("",) * (1 + len(each.pair.references))
        for (key, path, view), picture in zip(each.latent_views(), picture_keys, strict=True):
            missing = not is_whole(entry_path(cache_dir, "latents", key))
            if missing or (picture and not is_whole(entry_path(cache_dir, "picture", picture))):
                jobs[key] = (path, view)
            if picture:
                pictures[key] = picture
    if not jobs:
        return
    raise_if_stopped(observer)
    with encoder.loaded(observer) as encode:
        for done, ((key, (_, view)), pixels) in enumerate(read_ahead(jobs.items(), lambda job: _view_of_file(*job[1]))):
            raise_if_stopped(observer)
            if key in pictures:
                as_bytes = (pixels * 255).round().to(torch.uint8)
                write_tensors(entry_path(cache_dir, "picture", pictures[key]), {"picture": as_bytes})
            latents = encode(pixels)
            _check_shape("VAE", latents, _latents_shape(view))
            write_tensors(entry_path(cache_dir, "latents", key), {"latents": latents})
            observer.on_progress("Encoding pictures", done + 1, len(jobs))


def _latents_shape(view: View) -> tuple[int, int, int]:
    return LATENT_CHANNELS, view.size.height // VAE_FACTOR, view.size.width // VAE_FACTOR


def _check_shape(network: str, made: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises ConfigError where the network is not the base model's kind; only the last sizes count."""
    if tuple(made.shape[-len(wanted) :]) != wanted:
        raise ConfigError(
            f"The {network} gives {list(made.shape)} where the base model takes {list(wanted)}, so it is that of "
            f"another model. Use Qwen-Image-Edit's."
        )


def _view_of_file(path: Path, view: View) -> Tensor:
    return render(open_picture(path), view)


def _encode_prompts(
    planned: list[_PlannedPair], encoder: PromptEncoder, width: int, cache_dir: Path, observer: Observer
) -> None:
    jobs = [
        (each, missing)
        for each in planned
        if (missing := {key: text for key, text in each.prompts() if not _has_prompt(cache_dir, key)})
    ]
    total = sum(len(missing) for _, missing in jobs)
    if not total:
        return
    raise_if_stopped(observer)
    progress = count(1)
    with encoder.loaded(observer) as encode:
        for (_, missing), pictures in read_ahead(jobs, lambda job: _vision_pictures(job[0])):
            for key, text in missing.items():
                raise_if_stopped(observer)
                embeds = encode(text, pictures)
                _check_shape("text encoder", embeds, (width,))
                write_tensors(entry_path(cache_dir, "prompt", key), {"prompt": embeds})
                observer.on_progress("Encoding prompts", next(progress), total)


def prompt_width(model: ModelConfig) -> int:
    """Width D of the prompt embeddings, from the transformer's configuration or file."""
    return int(transformer_settings(model_folder(model).transformer).get("joint_attention_dim", 3584))


def _has_prompt(cache_dir: Path, key: str) -> bool:
    return is_whole(entry_path(cache_dir, "prompt", key))


def _vision_pictures(planned: _PlannedPair) -> list[Picture]:
    views = zip(planned.pair.references, planned.plan.vision, strict=True)
    return [vision_picture(open_picture(path), view) for path, view in views]


def vision_picture(picture: Any, view: View) -> Picture:
    """What the text encoder takes: pixels under the comfyui policy, an 8-bit picture under diffusers'."""
    return render(picture, view) if view.resample == "area" else render_picture(picture, view)


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
