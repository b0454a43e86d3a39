"""Encode a dataset: first all pictures with the VAE, then all prompts with Qwen2.5-VL.

Encodes only what the cache lacks, writes each result before it starts the next, and keeps one network in memory at a
time. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import EncodingConfig, ModelConfig, digest
from ..data.folders import changed_files
from ..data.pairing import EditDataset, EditPair, dataset_states
from ..device import pick_device, release_memory
from ..errors import ConfigError, DatasetError, OutOfMemoryError, Problems
from ..events import SILENT, Observer
from ..files import clean_leftovers
from ..qwen_image.base_model import BaseModel
from ..qwen_image.flavours import FLAVOURS, titles
from ..qwen_image.text_encoder import PICTURE_TOKEN, check_text_encoder
from ..qwen_image.vae import check_vae
from ..ranks import SINGLE_PROCESS, Ranks
from ..text import beginning, counted, shown
from .caption_lengths import too_long
from .encode_pictures import encode_differences, encode_latents, encode_masks
from .encode_prompts import encode_prompts
from .encoded import EncodedDataset, save_manifest
from .encoders import Encoders, PictureEncoder, PromptEncoder, own_pictures, own_prompts
from .encoding_plan import PlannedDataset, PlannedPair, find_missing, plan_encoding
from .image_embeds import ImageEmbeds, open_image_embeds
from .reference_sets import split_by_reference
from .sizes import check_crops, large_enough


def encode_dataset(
    dataset: EditDataset,
    base: BaseModel,
    encoding: EncodingConfig,
    cache_dir: Path,
    observer: Observer = SILENT,
    encoders: Encoders | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> EncodedDataset:
    """Encode what the cache lacks and write the manifest: `plan_dataset`, then `encode_planned`, which say more.

    Raises:
        ConfigError, DatasetError, ModelFileError, OutOfMemoryError, Interrupted: as these two.
    """
    return encode_planned(plan_dataset(dataset, base, encoding, cache_dir, encoders, ranks, observer), observer)


def plan_dataset(
    dataset: EditDataset,
    base: BaseModel,
    encoding: EncodingConfig,
    cache_dir: Path,
    encoders: Encoders | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    observer: Observer = SILENT,
) -> PlannedDataset:
    """Check a dataset and find what the cache lacks. `encoders` replace the base model's VAE and text encoder.

    Finds whatever `encode_planned` would refuse, as far as the files' headers tell, and writes nothing.

    Raises:
        ConfigError: the dataset does not fit the flavour, `encoders` do not fit the model or the preprocessing, the
            device isn't available, or the cache named in conditioning_image_embeds does not exist.
        DatasetError: targets are too small, a caption can't be encoded, or no pair is left to train on.
        MissingPackageError: a setting needs a package that is not installed.
        ModelFileError: a file of the model is missing, or the transformer has another flavour.
        JobError: several of these.
        Interrupted: the observer asked to stop.
    """
    model, encoders, problems = base.config, encoders or Encoders(), Problems()
    problems.attempt(lambda: base.prompt_width)  # fails for a transformer of another flavour
    problems.attempt(lambda: check_references(dataset, model, encoding))
    problems.attempt(lambda: encoders.check(encoding))
    problems.attempt(lambda: _check_captions(dataset, encoding, base.folder.tokenizer, observer))
    used = problems.attempt(lambda: _used_pairs(dataset, encoding))
    networks = problems.attempt(lambda: _networks(base, encoding, encoders, cache_dir, dataset.reference_dirs))
    problems.raise_all()
    assert used is not None
    assert networks is not None
    digests = (networks.vae.digest, networks.text_encoder.digest)
    trained = _planned(used.trained, model, encoding, digests, validated=False)
    validated = _planned(used.validated, model, encoding, digests, validated=True)
    return PlannedDataset(
        base=base,
        encoding=encoding,
        cache_dir=cache_dir,
        ranks=ranks,
        dataset=dataclasses.replace(dataset, pairs=used.pairs),
        left_out=used.left_out,
        pairs=trained,
        validation_pairs=validated,
        missing=find_missing(list(ranks.share([*trained, *validated])), cache_dir, observer),
        picture_encoder=networks.vae,
        prompt_encoder=networks.text_encoder,
        image_embeds=networks.image_embeds,
    )


def encode_planned(planned: PlannedDataset, observer: Observer = SILENT) -> EncodedDataset:
    """Encode what the cache lacks and write the manifest.

    With several ranks, each process calls this with the same cache, encodes its share and waits for the others.

    Raises:
        ConfigError: an encoder belongs to another model.
        DatasetError: pictures changed since they were paired (after encoding all others).
        ModelFileError: the VAE or text encoder can't be loaded.
        OutOfMemoryError: a network or a picture doesn't fit; finished results stay in the cache.
        Interrupted: the observer asked to stop; finished results stay in the cache.
    """
    missing, cache_dir, width = planned.missing, planned.cache_dir, planned.base.prompt_width
    if planned.ranks.leads:
        clean_leftovers(cache_dir)
    if any(missing):  # once more, because another dataset of the job may share pictures
        every = [*planned.pairs, *planned.validation_pairs]
        missing = find_missing(list(planned.ranks.share(every)), cache_dir, observer)
    if planned.encoding.create_image_embeds:
        planned.image_embeds.create()
    before = dataset_states(planned.dataset) if any(missing) else {}
    problems = encode_masks(missing.masks, cache_dir, observer)
    problems += encode_differences(missing.differences, cache_dir, observer)
    with _memory_errors_explained("pictures", "Lower resolution, or the size of the references"):
        problems += encode_latents(missing.latents, planned.picture_encoder, cache_dir, observer)
    release_memory()
    with _memory_errors_explained("prompts", "Set text_encoder_precision to int8-quanto or nf4-bnb"):
        problems += encode_prompts(missing.prompts, planned.prompt_encoder, planned.image_embeds, width, observer)
    release_memory()
    _raise_unread(problems)
    planned.ranks.wait()
    encoded = planned.encoded()
    save_manifest(encoded)
    changed = changed_files(before, dataset_states(planned.dataset)) if any(missing) else ()
    return dataclasses.replace(encoded, changed=changed)


class _Networks(NamedTuple):
    """The encoders to use, and the cache of the text encoder's visual tokens."""

    vae: PictureEncoder
    text_encoder: PromptEncoder
    image_embeds: ImageEmbeds


def _networks(
    base: BaseModel, encoding: EncodingConfig, encoders: Encoders, cache_dir: Path, references: Sequence[Path]
) -> _Networks:
    """The networks, after a check of the base model's parts that they need."""
    device = pick_device(base.config.device)
    if encoders.prompts is None:
        check_text_encoder(base, encoding.preprocessing)
    if encoders.pictures is None:
        check_vae(base)
    vae, text_encoder = encoders.pictures or own_pictures(base, device), encoders.prompts
    text_encoder = text_encoder or own_prompts(base, encoding, device)
    return _Networks(vae, text_encoder, open_image_embeds(encoding, cache_dir, references, text_encoder))


def _check_captions(dataset: EditDataset, encoding: EncodingConfig, tokenizer: Path, observer: Observer) -> None:
    """Raise DatasetError if a prompt can't be encoded; lists all."""
    validated = ("validation prompts", (*encoding.validation_prompts, encoding.validation_negative_prompt))
    kept = ("preservation prompts", encoding.preservation_prompts)
    unreferenced = {pair.key for pair in dataset.pairs if not pair.references}  # their prompts have no placeholders
    every = [*((pair.key, pair.captions) for pair in dataset.pairs), validated, kept]
    prompts = [(place, caption) for place, captions in every for caption in captions]
    problems = [
        f"{shown(place)}: the caption {beginning(caption)} contains {PICTURE_TOKEN}, a picture placeholder. Remove it."
        for place, caption in prompts
        if PICTURE_TOKEN in caption and place not in unreferenced
    ]
    problems += too_long(prompts, encoding.tokenizer_max_length, tokenizer, observer)
    if problems:
        raise DatasetError("These captions can't be encoded:", problems)


def _planned(
    pairs: Sequence[EditPair],
    model: ModelConfig,
    encoding: EncodingConfig,
    digests: tuple[str, str],
    *,
    validated: bool,
) -> list[PlannedPair]:
    pairs = split_by_reference(pairs, encoding, validated=validated)
    return [plan_encoding(pair, model, encoding, digests, validated=validated) for pair in pairs]


@contextmanager
def _memory_errors_explained(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # the frames keep the network and its activations alive
        release_memory()
        raise OutOfMemoryError(
            f"Out of memory while encoding {what}. Finished results stay in the cache. {advice}, close other programs "
            "that use the device, or encode once on the CPU (device cpu, or ComfyUI with --cpu)."
        ) from error


def _raise_unread(problems: list[str]) -> None:
    if problems:
        raise DatasetError(
            "Some pictures changed or could not be read since they were paired. All others are in the cache. Fix the "
            "problems below and run again while no other program changes the folders:",
            list(dict.fromkeys(problems)),
        )


def check_references(dataset: EditDataset, model: ModelConfig, encoding: EncodingConfig) -> None:
    """Refuse pairs whose references can't be used.

    Raises:
        ConfigError: a pair has more references than the flavour can take at a time.
        DatasetError: match_target_res would crop a reference to less than a quarter.
    """
    row = FLAVOURS[model.flavour]
    most = max((len(pair.references) for pair in dataset.pairs), default=0)
    if most > row.max_references and encoding.conditioning_multidataset_sampling == "combined":
        others = titles(each for each in FLAVOURS.values() if each.max_references >= most)
        raise ConfigError(
            f"The dataset has {most} references per pair; {row.title} takes {row.max_references}. "
            f"Use fewer reference folders, {f'the model {others}, ' if others else ''}or set "
            "conditioning_multidataset_sampling to random, which shows one reference at a time."
        )
    check_crops(dataset.pairs, encoding)


class _UsedPairs(NamedTuple):
    """The pairs that are large enough, the keys of the others, and of the former those to train on and to validate."""

    pairs: tuple[EditPair, ...]
    left_out: tuple[str, ...]
    trained: Sequence[EditPair]
    validated: Sequence[EditPair]


def _used_pairs(dataset: EditDataset, encoding: EncodingConfig) -> _UsedPairs:
    """The pairs to use, in the dataset's order.

    The pairs that the dataset holds out are validated, and no others. If it names none, or num_eval_images asks for
    all, pairs are ranked by a digest of each, so that other pairs and their order matter little.

    Raises:
        DatasetError: targets are too small, or no pair is left to train on.
    """
    pairs, left_out = large_enough(dataset.pairs, encoding.sizes)
    ranked = sorted(pairs, key=lambda pair: digest([encoding.seed, pair.key]))
    wanted = len(ranked) if encoding.num_eval_images < 0 else encoding.num_eval_images
    marked = {pair.key for pair in pairs} & set(dataset.held_out) if encoding.num_eval_images >= 0 else set[str]()
    keys = marked or {pair.key for pair in ranked[:wanted]}
    validated = [pair for pair in pairs if pair.key in keys]
    if encoding.train_eval_images:
        return _UsedPairs(pairs, left_out, pairs, validated)
    if marked and len(marked) == len(pairs):
        raise DatasetError(
            f"All {counted(len(pairs), 'pair')} are held out for validation. At least one must be left to train on: "
            "remove the mark of some pairs in the side panel Edit pairs."
        )
    if not marked and 0 < len(ranked) <= wanted and encoding.num_eval_images > 0:
        raise DatasetError(
            f"num_eval_images must be less than the dataset's number of pairs ({len(ranked)}), got {wanted}. "
            "At least one pair must be left to train on. To train on the validated pairs too, set train_eval_images."
        )
    return _UsedPairs(pairs, left_out, [pair for pair in pairs if pair.key not in keys], validated)
