"""Encode a dataset: first every picture through the VAE, then every prompt through Qwen2.5-VL.

Only what the cache lacks is made, each result is on disk before the next begins, and one network is in memory at a
time. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..config import EncodingConfig, ModelConfig, digest
from ..data.folders import changed_files
from ..data.pairing import EditDataset, dataset_states
from ..device import pick_device, release_memory
from ..errors import ConfigError, DatasetError, OutOfMemoryError
from ..events import SILENT, Observer
from ..qwen_image.base_model import BaseModel
from ..qwen_image.flavours import FLAVOURS
from ..ranks import SINGLE_PROCESS, Ranks
from .encode_pictures import encode_latents, encode_masks
from .encode_prompts import encode_prompts
from .encoded import EncodedDataset, save_manifest
from .encoders import Encoders, own_pictures, own_prompts
from .image_embeds import open_image_embeds
from .jobs import missing_jobs, plan_encoding
from .reference_sets import entries_of_pairs, seen_at_once
from .sizes import large_enough


def encode_dataset(
    dataset: EditDataset,
    base: BaseModel,
    encoding: EncodingConfig,
    cache_dir: Path,
    observer: Observer = SILENT,
    encoders: Encoders | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> EncodedDataset:
    """Encode what is missing and write the manifest. `encoders` stand in the place of the base model's.

    Each of `ranks` makes this call for the same cache, encodes its share, and waits for the others.

    Raises:
        ConfigError: the dataset does not fit the flavour, or `encoders` the model or the preprocessing; there is no
            cache of the name in conditioning_image_embeds.
        DatasetError: targets are too small, none would be left to train on, or pictures changed since they were paired;
            then the others are encoded first.
        ModelFileError: the VAE or text encoder can't be loaded, or the transformer is of another flavour.
        OutOfMemoryError: they, or a picture, don't fit; what was encoded stays.
        Interrupted: the observer wants to stop; what was encoded stays.
    """
    model = base.config
    prompt_width = base.prompt_width  # refuses a transformer of another flavour now instead of hours later
    check_references(dataset, model, encoding)
    encoders = encoders or Encoders()
    encoders.check(encoding)
    pairs, left_out = large_enough(dataset.pairs, encoding.sizes)
    dataset = dataclasses.replace(dataset, pairs=pairs)
    device = pick_device(model.device)
    vae = encoders.pictures or own_pictures(base, device)
    text_encoder = encoders.prompts or own_prompts(base, encoding, device)
    image_embeds = open_image_embeds(encoding, cache_dir, dataset.reference_dirs[0], text_encoder)
    held_out = _held_out(dataset, encoding)
    digests = (vae.digest, text_encoder.digest)
    pairs = seen_at_once(dataset.pairs, encoding, held_out)
    planned = [plan_encoding(pair, model, encoding, digests, held_out) for pair in pairs]
    jobs = missing_jobs(list(ranks.share(planned)), cache_dir)
    before = dataset_states(dataset) if any(jobs) else {}
    problems = encode_masks(jobs.masks, cache_dir, observer)
    with _memory_errors_explained("pictures", "Lower resolution, or the size of the references"):
        problems += encode_latents(jobs.latents, vae, cache_dir, observer)
    release_memory()
    with _memory_errors_explained("prompts", "Set text_encoder_precision to int8-quanto or nf4-bnb"):
        problems += encode_prompts(jobs.prompts, text_encoder, image_embeds, prompt_width, observer)
    release_memory()
    _raise_unread(problems)
    ranks.wait()
    entries = list(entries_of_pairs([each.entry for each in planned]))
    encoded = save_manifest(
        cache_dir,
        flavour=model.flavour,
        preprocessing=encoding.preprocessing,
        prompt_width=prompt_width,
        pairs=tuple(entry for entry in entries if entry.key not in held_out),
        validation_pairs=tuple(entry for entry in entries if entry.key in held_out),
        left_out=left_out,
    )
    changed = changed_files(before, dataset_states(dataset)) if any(jobs) else ()
    return dataclasses.replace(encoded, changed=changed)


@contextmanager
def _memory_errors_explained(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold the network and its activations
        release_memory()
        raise OutOfMemoryError(
            f"Out of memory while encoding {what}. What is encoded stays in the cache. {advice}, close other programs "
            "that use the device, or encode once with device cpu: training then finds everything."
        ) from error


def _raise_unread(problems: list[str]) -> None:
    if problems:
        raise DatasetError(
            "Some pictures could not be encoded as they were paired. All others are in the cache, and nothing of these "
            "is. Run again with the folders at rest:",
            list(dict.fromkeys(problems)),
        )


def check_references(dataset: EditDataset, model: ModelConfig, encoding: EncodingConfig) -> None:
    """Raises ConfigError where a pair has more references than a turn of the flavour takes."""
    allowed = FLAVOURS[model.flavour].max_references
    most = max((len(pair.references) for pair in dataset.pairs), default=0)
    if most > allowed and encoding.conditioning_multidataset_sampling == "combined":
        raise ConfigError(
            f"The dataset has {most} references per pair; {model.flavour} takes {allowed}. "
            "Use one reference folder, or a model of flavour edit-v2 or edit-v3, or conditioning_multidataset_sampling "
            "random, which shows one of them at a time."
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
