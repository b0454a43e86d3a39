"""A run's work: its largest micro-batch and validation picture, the pairs of each size, and what encoding computes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from ..conditioning.batches import Draw
from ..conditioning.encoded import EncodedDataset, EncodedEntry
from ..conditioning.encoding_plan import PlannedDataset, PlannedPair
from ..conditioning.pictures import PairPlan
from ..config import BatchingConfig, ValidationConfig
from ..config.validation import SIZE_STEP
from ..errors import DatasetError
from ..geometry import Size, bucket_size
from ..qwen_image.latents import PATCH, VAE_FACTOR
from ..qwen_image.vision import vision_size
from ..training.validation_work import Passes
from .activations import Tokens

VISION_PATCH = 28  # pixels per side of a Qwen2.5-VL picture token
_AROUND_CAPTION, _LETTERS_PER_TOKEN = 16, 3  # estimates: tokens of the prompt template, characters per caption token
_PROMPTS_READ = 64  # at most, of pairs of equal size, whose prompts differ little
_SYSTEM_TURN = 64  # tokens before the user's turn, which the text encoder reads but prompt embeddings leave out
# Floating point operations of the full-size networks; tests/numerics counts them on torch's meta device. The VAE's
# convolutions per pixel, and its attention per pixel squared. Per token, the vision tower and the language model take
# two for each weight (the tower has four patches per token); their attention is left out, at most a tenth.
CONVOLUTION, ATTENTION = 2_326_464, 0.375
VISION_TOWER, LANGUAGE_MODEL = 5.14e9, 13.05e9


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """Size of a pair. `target` is in pixels, and `group` has the sizes of all its pictures. `turns`: per epoch, of all
    pairs that this one stands for."""

    target: Size
    references: int
    image_tokens: int
    text_tokens: int
    group: tuple[Size, ...] = ()
    turns: int = 1


class EncodingWork(NamedTuple):
    """What is still to be encoded: floating point operations of the VAE and of the text encoder, and pixels of the
    largest picture that one of them gets."""

    vae: float = 0
    text_encoder: float = 0
    largest_picture: int = 0


NOTHING = EncodingWork()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`train`: the largest pair; a micro-batch has `batch` pairs of at most its size. `validation`: the largest sampled
    pair, or None.
    `on_the_fly_pixels`: pixels of the largest reference that is encoded on the fly; 0 if all are in the cache.
    `encoding`: what the cache lacks.
    `training`: tokens of the pairs of each size, and their turns per epoch. `held_out` and `pictures`: tokens and
    number of the held-out pairs and of the validation pictures that one set of weights draws, for `validation_work`.
    `regularised`: the share of the turns that regularisation data has."""

    train: PairSize
    batch: int
    validation: PairSize | None = None
    on_the_fly_pixels: int = 0
    encoding: EncodingWork = NOTHING
    training: tuple[Passes, ...] = ()
    held_out: tuple[Passes, ...] = ()
    pictures: tuple[Passes, ...] = ()
    regularised: float = 0.0

    @property
    def tokens(self) -> Tokens:
        """Tokens of the largest micro-batch."""
        pair = self.train
        target = min(picture_tokens(pair.target), pair.image_tokens)  # a scaled pair has its picture tokens scaled only
        return Tokens(batch=self.batch, image=pair.image_tokens, target=target, text=pair.text_tokens)


def pair_size(target: Size, references: Sequence[Size], text_tokens: int, turns: int = 1) -> PairSize:
    """The size of a pair from its pictures' sizes in pixels."""
    return PairSize(
        target=target,
        references=len(references),
        image_tokens=sum(map(picture_tokens, (target, *references))),
        text_tokens=text_tokens,
        group=(target, *references),
        turns=turns,
    )


def workload_of_encoded(
    encoded: EncodedDataset, batching: BatchingConfig, validation: ValidationConfig, held_out: EncodedDataset
) -> Workload:
    """The workload of an encoded dataset. Validation uses the held-out pairs of `held_out`."""
    shown = held_out.validation_pairs[: validation.num_validation_images]
    drawn = [
        dataclasses.replace(size, turns=1 + len(entry.validation_captions))
        for entry in shown
        for size in _sizes(held_out, [entry])
    ]
    work = _workload(_sizes(encoded, encoded.pairs), _at_sizes(drawn, validation), batching)
    flying = (shape for pair in encoded.pairs if pair.reference_files for shape in pair.shapes[1:])
    return dataclasses.replace(
        work,
        on_the_fly_pixels=VAE_FACTOR**2 * max((math.prod(shape[-2:]) for shape in flying), default=0),
        held_out=_passes(_sizes(held_out, held_out.validation_pairs)),
        pictures=_passes(_at_sizes(drawn, validation)),
        regularised=_share(encoded.pairs),
    )


def _share(entries: Sequence[EncodedEntry]) -> float:
    """The share of an epoch's turns that regularisation data has."""
    turns = [(entry.probability * (1 + entry.repeats), entry.is_regularisation) for entry in entries]
    return sum(each for each, is_regularisation in turns if is_regularisation) / sum(each for each, _ in turns)


def resolution_in_words(side: int, work: Workload) -> str:
    """A lower resolution as advice. Without match_target_res the references would stay at about a megapixel."""
    return f"resolution {side}{' with match_target_res' if work.train.references else ''}"


def pictures_in_prompt(plan: PairPlan, letters: int = 0) -> int:
    """Prompt tokens of the pictures. A prompt with a caption of so many characters has more."""
    _ = letters
    return sum(vision_tokens(view.size) for view in plan.vision)


def estimated_prompt(plan: PairPlan, letters: int) -> int:
    """Prompt tokens: those of the pictures, and an estimate for a caption of so many characters."""
    return pictures_in_prompt(plan) + _AROUND_CAPTION + letters // _LETTERS_PER_TOKEN


def workload_of_pairs(
    parts: Sequence[PlannedDataset],
    batching: BatchingConfig,
    validation: ValidationConfig,
    prompt_tokens: Callable[[PairPlan, int], int] = estimated_prompt,
) -> Workload:
    """The workload of datasets that are not encoded yet, from the pictures' headers and `prompt_tokens`."""
    train, held_out, flying = [], [], [0]
    for part in parts:
        for each in part.validation_pairs:
            turns = 1 + len(each.entry.validation_captions)
            held_out.append(dataclasses.replace(_planned_size(each, prompt_tokens), turns=turns))
        for each in part.pairs:
            train.append(_planned_size(each, prompt_tokens))
            if each.entry.reference_files:
                flying += [view.size.width * view.size.height for view in each.plan.references]
    drawn = _at_sizes(held_out[: validation.num_validation_images], validation)
    return dataclasses.replace(
        _workload(train, drawn, batching),
        on_the_fly_pixels=max(flying),
        encoding=encoding_work(parts),
        held_out=_passes(dataclasses.replace(pair, turns=1) for pair in held_out),
        pictures=_passes(drawn),
    )


def _planned_size(planned: PlannedPair, prompt_tokens: Callable[[PairPlan, int], int]) -> PairSize:
    others = (*planned.entry.validation_captions, *planned.preservation_prompts)
    letters = max(map(len, (*planned.pair.captions, *others)), default=0)
    references = [view.size for view in planned.plan.references]
    return pair_size(planned.plan.target.size, references, prompt_tokens(planned.plan, letters))


def encoding_work(parts: Iterable[PlannedDataset]) -> EncodingWork:
    """What the cache lacks of these datasets. Prompt lengths are estimated."""
    pictures, seen, prompts = {}, {}, {}
    for part in parts:
        pictures |= {key: task.view.size for key, task in part.missing.latents.items()}
        for planned, texts in part.missing.prompts:
            for content, view in zip(planned.pair.digests[1:], planned.plan.vision, strict=True):
                if not part.image_embeds.has(part.image_embeds.key(content, view)):
                    seen[content, view] = view.size
            prompts |= {key: _SYSTEM_TURN + estimated_prompt(planned.plan, len(text)) for key, text in texts.items()}
    pixels = [size.width * size.height for size in pictures.values()]
    return EncodingWork(
        vae=sum(CONVOLUTION * each + ATTENTION * each**2 for each in pixels),
        text_encoder=VISION_TOWER * sum(map(vision_tokens, seen.values())) + LANGUAGE_MODEL * sum(prompts.values()),
        largest_picture=max((*pixels, *(size.width * size.height for size in seen.values())), default=0),
    )


def _at_sizes(pairs: Sequence[PairSize], validation: ValidationConfig) -> list[PairSize]:
    """The pairs at each distinct validation size, or at their own size if none is set."""
    if not validation.sizes:
        return list(pairs)
    sized: list[PairSize] = []
    for pair in pairs:
        wanted = (
            size if isinstance(size, Size) else bucket_size(pair.target, size, SIZE_STEP) for size in validation.sizes
        )
        sized += [with_target(pair, size) for size in dict.fromkeys(wanted)]
    return sized


def _passes(pairs: Iterable[PairSize]) -> tuple[Passes, ...]:
    """The pairs as input of `validation_work`."""
    return tuple(Passes(pair.image_tokens, pair.text_tokens, pair.turns) for pair in pairs)


def with_target(pair: PairSize, size: Size) -> PairSize:
    """The pair with a target of another size and the same references."""
    others = pair.image_tokens - picture_tokens(pair.target)
    return dataclasses.replace(pair, target=size, image_tokens=others + picture_tokens(size))


def picture_tokens(size: Size) -> int:
    """Tokens of a picture's latents; odd sides are padded."""
    return -(-(size.height // VAE_FACTOR) // PATCH) * -(-(size.width // VAE_FACTOR) // PATCH)


def vision_tokens(size: Size) -> int:
    """Prompt tokens of a reference that Qwen2.5-VL gets in this size."""
    return math.prod(vision_size(size.height, size.width)) // VISION_PATCH**2


def _workload(train: Sequence[PairSize], drawn: Sequence[PairSize], batching: BatchingConfig) -> Workload:
    if not train:
        raise DatasetError(
            "The memory plan has no pairs to train on: all are held out. Set num_eval_images lower, to 0 or more."
        )
    turns = Counter[tuple[Size, ...]]()
    for pair in train:
        turns[pair.group] += pair.turns
    texts = {pair.group: pair for pair in sorted(train, key=_all_tokens)}  # the longest prompt of each size
    return Workload(
        train=max(train, key=_all_tokens),
        batch=batching.train_batch_size,  # a small data set, or two epochs in a row, can fill a batch with one pair
        validation=max(drawn, key=_all_tokens) if drawn else None,
        training=_passes(dataclasses.replace(pair, turns=turns[group]) for group, pair in texts.items()),
    )


def _all_tokens(pair: PairSize) -> int:
    return pair.image_tokens + pair.text_tokens


def _sizes(encoded: EncodedDataset, entries: Sequence[EncodedEntry]) -> list[PairSize]:
    sizes = []
    for pictures, turns in _turns_by_size(entries).items():
        read = [turn.seen for turn in turns[:_PROMPTS_READ]]
        text = max(
            encoded.prompt_tokens(key)
            for seen in read
            for key in (*seen.prompts, *seen.validation_prompts, *seen.preservation)
        )
        target, *references = pictures
        sizes.append(pair_size(target, references, text, turns=sum(1 + turn.seen.repeats for turn in turns)))
    return sizes


def largest_draws(encoded: EncodedDataset, work: Workload) -> tuple[Draw, ...]:
    """The largest micro-batch of a run: pairs of the size of `work.train`, those with the longest prompts first."""
    longest = []
    for turn in _turns_by_size(encoded.pairs)[work.train.group][:_PROMPTS_READ]:
        prompts = [(key, number, False) for number, key in enumerate(turn.seen.prompts)]
        prompts += [(key, number, True) for number, key in enumerate(turn.seen.preservation)]
        longest.append((turn, *max((encoded.prompt_tokens(key), *which) for key, *which in prompts)))
    longest.sort(key=lambda each: each[1], reverse=True)
    return tuple(
        Draw(turn.pair, caption, index, turn.reference_set, preserves=preserves)
        for index, (turn, _, caption, preserves) in zip(range(work.batch), cycle(longest), strict=False)
    )


class _Turn(NamedTuple):
    """One way of using a pair: its number, the number of a reference set, and the entry with only that set."""

    pair: int
    reference_set: int
    seen: EncodedEntry


def _turns_by_size(entries: Sequence[EncodedEntry]) -> dict[tuple[Size, ...], list[_Turn]]:
    """The turns of an epoch by their pictures' sizes in pixels, as in `PairSize.group`: target, then references."""
    groups: dict[tuple[Size, ...], list[_Turn]] = {}
    for number, entry in enumerate(entries):
        for reference_set in range(max(1, len(entry.prompts_by_reference))):  # more than 1: a turn has one reference
            seen = entry.seen(reference_set)
            sizes = tuple(Size(shape[-1] * VAE_FACTOR, shape[-2] * VAE_FACTOR) for shape in seen.shapes)
            groups.setdefault(sizes, []).append(_Turn(number, reference_set, seen))
    return groups
