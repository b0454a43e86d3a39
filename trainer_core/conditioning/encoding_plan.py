"""Plan the encoding: the views and cache keys of every pair, and the entries that the cache lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import EncodingConfig, ModelConfig, digest
from ..data.images import open_checked_picture
from ..data.pairing import EditDataset, EditPair
from ..events import SILENT, Observer, watched
from ..files import is_whole
from ..geometry import Box
from ..qwen_image.base_model import BaseModel
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.latents import LATENT_CHANNELS, VAE_FACTOR
from ..ranks import Ranks
from .encoded import EncodedDataset, name_dataset
from .encoders import PictureEncoder, PromptEncoder
from .entry import EncodedEntry, entry_path
from .image_embeds import ImageEmbeds
from .pictures import PairPlan, View, plan_pair, render
from .reference_sets import entries_of_pairs
from .types import ReferenceFile


class LatentTask(NamedTuple):
    """A picture to encode with the VAE.

    `key` is the cache key of its latents, `content` the `content_name` of the file, and `picture` the cache key of its
    pixels, which are kept for validated pairs only.
    """

    key: str
    path: Path
    content: str
    view: View
    picture: str = ""

    def read(self) -> Tensor:
        """The pixels of its view, [3, H, W] in 0..1."""
        return render(open_checked_picture(self.path, self.content), self.view)


@dataclass(frozen=True, slots=True)
class PlannedPair:
    """A pair with its views and its cache keys."""

    pair: EditPair
    plan: PairPlan
    entry: EncodedEntry
    negative_prompt: str
    preservation_prompts: tuple[str, ...] = ()

    def latent_tasks(self) -> Iterator[LatentTask]:
        """The pictures to encode now: the target, and references unless they are encoded on the fly."""
        keys, views = (self.entry.target, *self.entry.references), (self.plan.target, *self.plan.references)
        files, pictures = (self.pair.target, *self.pair.references), self.entry.pictures or ("",) * len(keys)
        tasks = [LatentTask(*each) for each in zip(keys, files, self.pair.digests, views, pictures, strict=True)]
        yield from tasks[:1] if self.entry.reference_files else tasks

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Cache key and text of every prompt."""
        yield from zip(self.entry.prompts, self.pair.captions, strict=True)
        yield from zip(self.entry.validation_prompts, self.entry.validation_captions, strict=True)
        if self.entry.negative:
            yield self.entry.negative, self.negative_prompt
        if self.entry.empty:
            yield self.entry.empty, ""
        yield from zip(self.entry.preservation, self.preservation_prompts, strict=True)


class MissingWork(NamedTuple):
    """What the cache lacks: masks, pixel differences and latents by cache key, and pairs with their missing prompts
    (text by key)."""

    masks: dict[str, PlannedPair]
    differences: dict[str, PlannedPair]
    latents: dict[str, LatentTask]
    prompts: list[tuple[PlannedPair, dict[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDataset:
    """A dataset that is ready to be encoded. `dataset` has no pairs that are left out; `left_out` are their keys.
    `pairs` are trained and `validation_pairs` validated; with train_eval_images a pair may be in both. `missing`: this
    process's share of what the cache lacks."""

    base: BaseModel
    encoding: EncodingConfig
    cache_dir: Path
    ranks: Ranks
    dataset: EditDataset
    left_out: tuple[str, ...]
    pairs: list[PlannedPair]
    validation_pairs: list[PlannedPair]
    missing: MissingWork
    picture_encoder: PictureEncoder
    prompt_encoder: PromptEncoder
    image_embeds: ImageEmbeds

    def encoded(self) -> EncodedDataset:
        """The dataset that encoding makes. Its manifest and entries may not be written yet."""
        return name_dataset(
            self.cache_dir,
            flavour=self.base.config.flavour,
            preprocessing=self.encoding.preprocessing,
            prompt_width=self.base.prompt_width,
            pairs=tuple(entries_of_pairs([each.entry for each in self.pairs])),
            validation_pairs=tuple(entries_of_pairs([each.entry for each in self.validation_pairs])),
            left_out=self.left_out,
        )


def plan_encoding(
    pair: EditPair, model: ModelConfig, encoding: EncodingConfig, digests: tuple[str, str], *, validated: bool
) -> PlannedPair:
    """The views and cache keys of a pair that is trained, or `validated`.

    `digests` are those of the VAE and the text encoder.
    """
    flavour, kinds = FLAVOURS[model.flavour], pair.conditioning_types
    plan = plan_pair(pair.sizes, flavour, encoding, pair.key, conditioning_types=kinds)
    entry = _entry(pair, plan, digests, encoding, keep_pictures=validated)
    if encoding.reference_latents == "on_the_fly" and not validated:
        entry = dataclasses.replace(entry, reference_files=tuple(_reference_files(pair, plan)))
    kept = encoding.preservation_prompts if entry.preservation else ()
    return PlannedPair(pair, plan, entry, encoding.validation_negative_prompt, kept)


def _reference_files(pair: EditPair, plan: PairPlan) -> Iterator[ReferenceFile]:
    for path, content, view in zip(pair.references, pair.digests[1:], plan.references, strict=True):
        yield ReferenceFile(str(path.absolute()), content, (tuple(view.box), tuple(view.size), view.resample))


def _entry(
    pair: EditPair, plan: PairPlan, digests: tuple[str, str], encoding: EncodingConfig, *, keep_pictures: bool
) -> EncodedEntry:
    views = (plan.target, *plan.references)
    files = [(file, view.as_json()) for file, view in zip(pair.digests, views, strict=True)]
    seen = [[file, view.as_json()] for file, view in zip(pair.digests[1:], plan.vision, strict=True)]
    vae, text_encoder = digests
    latents = [latents_key(vae, *file) for file in files]
    shapes = [latents_shape(view) for view in views]

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
        validation_captions=encoding.validation_prompts if keep_pictures else (),
        validation_prompts=tuple(map(prompt_key, encoding.validation_prompts)) if keep_pictures else (),
        pictures=tuple(digest(["picture", *file]) for file in files) if keep_pictures else (),
        empty=prompt_key("") if encoding.encode_empty_caption else "",
        preservation=() if keep_pictures else tuple(map(prompt_key, encoding.preservation_prompts)),
        mask=digest(["mask", pair.mask.digest, list(mask_box(pair, plan)), shapes[0]]) if pair.mask else "",
        differences=(digest(["difference", *files[:2]]),) if encoding.encode_pixel_difference and files[1:] else (),
    )


def latents_key(vae: str, content: str, view: Sequence[Any]) -> str:
    """Cache key of a picture's latents, from the VAE's digest, the file's SHA-256 and the view as JSON."""
    return digest([vae, content, view])


def mask_box(pair: EditPair, plan: PairPlan) -> Box:
    """The part of the pair's mask that corresponds to the target's view."""
    assert pair.mask is not None
    return plan.mask_box(pair.sizes[0], pair.mask.size)


def find_missing(planned: list[PlannedPair], cache_dir: Path, observer: Observer = SILENT) -> MissingWork:
    """The entries of these pairs that are not in the cache.

    Raises:
        Interrupted: the observer asked to stop.
    """

    def lacks(kind: str, key: str) -> bool:
        return bool(key) and not is_whole(entry_path(cache_dir, kind, key))

    missing, asked = MissingWork({}, {}, {}, []), set[str]()
    for each in watched(planned, observer):
        if lacks("mask", each.entry.mask):
            missing.masks[each.entry.mask] = each
        for key in each.entry.differences:
            if lacks("difference", key):
                missing.differences[key] = each
        for task in each.latent_tasks():
            if lacks("latents", task.key) or lacks("picture", task.picture):
                # pairs may share a picture; keep its pixels if any of them is validated
                picture = task.picture or missing.latents.get(task.key, task).picture
                missing.latents[task.key] = task._replace(picture=picture)
        prompts = {key: text for key, text in each.prompts() if key not in asked and lacks("prompt", key)}
        asked.update(prompts)
        if prompts:
            missing.prompts.append((each, prompts))
    return missing


def latents_shape(view: View) -> tuple[int, int, int]:
    """Shape [C, H, W] of a view's latents."""
    return LATENT_CHANNELS, view.size.height // VAE_FACTOR, view.size.width // VAE_FACTOR
