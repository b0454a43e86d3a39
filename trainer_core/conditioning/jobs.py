"""What is to be encoded: every pair's views and cache keys, and which of the entries the cache lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import EncodingConfig, ModelConfig, digest
from ..data.images import open_checked_picture
from ..data.pairing import EditPair
from ..files import is_whole
from ..geometry import Box
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.latents import LATENT_CHANNELS, VAE_FACTOR
from .entry import EncodedEntry, entry_path
from .pictures import PairPlan, View, plan_pair, render
from .types import ReferenceFile


class LatentJob(NamedTuple):
    """A picture for the VAE: key of the latents, file, its SHA-256, view; key of its pixels for held-out pairs."""

    key: str
    path: Path
    content: str
    view: View
    picture: str = ""

    def read(self) -> Tensor:
        """Its pixels."""
        return render(open_checked_picture(self.path, self.content), self.view)


@dataclass(frozen=True, slots=True)
class PlannedPair:
    """A pair, its views and its cache keys."""

    pair: EditPair
    plan: PairPlan
    entry: EncodedEntry
    negative_prompt: str

    def latent_jobs(self) -> Iterator[LatentJob]:
        """Every picture that goes through the VAE now: the target, and references that aren't encoded on the fly."""
        keys, views = (self.entry.target, *self.entry.references), (self.plan.target, *self.plan.references)
        files, pictures = (self.pair.target, *self.pair.references), self.entry.pictures or ("",) * len(keys)
        jobs = [LatentJob(*each) for each in zip(keys, files, self.pair.digests, views, pictures, strict=True)]
        yield from jobs[:1] if self.entry.reference_files else jobs

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Key and caption of every prompt."""
        yield from zip(self.entry.prompts, self.pair.captions, strict=True)
        yield from zip(self.entry.validation_prompts, self.entry.validation_captions, strict=True)
        if self.entry.negative:
            yield self.entry.negative, self.negative_prompt
        if self.entry.empty:
            yield self.entry.empty, ""


class Jobs(NamedTuple):
    """What is to be made: masks and latents by their key, and the prompts (text by key) of pairs."""

    masks: dict[str, PlannedPair]
    latents: dict[str, LatentJob]
    prompts: list[tuple[PlannedPair, dict[str, str]]]


def plan_encoding(
    pair: EditPair, model: ModelConfig, encoding: EncodingConfig, digests: tuple[str, str], held_out: set[str]
) -> PlannedPair:
    """`digests` are the VAE's and the text encoder's."""
    flavour, kinds = FLAVOURS[model.flavour], pair.conditioning_types
    plan = plan_pair(pair.sizes, flavour, encoding, pair.key, conditioning_types=kinds)
    entry = _entry(pair, plan, digests, encoding, keep_pictures=pair.key in held_out)
    if encoding.reference_latents == "on_the_fly" and pair.key not in held_out:
        entry = dataclasses.replace(entry, reference_files=tuple(_reference_files(pair, plan)))
    return PlannedPair(pair, plan, entry, encoding.validation_negative_prompt)


def _reference_files(pair: EditPair, plan: PairPlan) -> Iterator[ReferenceFile]:
    for path, content, view in zip(pair.references, pair.digests[1:], plan.references, strict=True):
        yield ReferenceFile(str(path.absolute()), content, (tuple(view.box), tuple(view.size), view.resample))


def _entry(
    pair: EditPair, plan: PairPlan, digests: tuple[str, str], encoding: EncodingConfig, *, keep_pictures: bool
) -> EncodedEntry:
    views = (plan.target, *plan.references)
    files = [[file, view.as_json()] for file, view in zip(pair.digests, views, strict=True)]
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
        mask=digest(["mask", pair.mask.digest, list(mask_box(pair, plan)), shapes[0]]) if pair.mask else "",
    )


def latents_key(vae: str, content: str, view: Sequence[Any]) -> str:
    """Of a picture by its file's SHA-256 and what is seen of it; `vae` is the network's digest."""
    return digest([vae, content, view])


def mask_box(pair: EditPair, plan: PairPlan) -> Box:
    assert pair.mask is not None
    return plan.mask_box(pair.sizes[0], pair.mask.size)


def missing_jobs(planned: list[PlannedPair], cache_dir: Path) -> Jobs:
    """What the cache lacks."""

    def lacks(kind: str, key: str) -> bool:
        return bool(key) and not is_whole(entry_path(cache_dir, kind, key))

    jobs = Jobs({}, {}, [])
    for each in planned:
        if lacks("mask", each.entry.mask):
            jobs.masks[each.entry.mask] = each
        for job in each.latent_jobs():
            if lacks("latents", job.key) or lacks("picture", job.picture):
                jobs.latents[job.key] = job._replace(picture=job.picture or jobs.latents.get(job.key, job).picture)
        prompts = {key: text for key, text in each.prompts() if lacks("prompt", key)}
        if prompts:
            jobs.prompts.append((each, prompts))
    return jobs


def latents_shape(view: View) -> tuple[int, int, int]:
    return LATENT_CHANNELS, view.size.height // VAE_FACTOR, view.size.width // VAE_FACTOR
