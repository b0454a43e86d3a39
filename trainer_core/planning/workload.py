"""The largest micro-batch of a run and its largest validation picture, from picture sizes and prompt lengths."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from ..conditioning.batches import Draw
from ..conditioning.encoded import EncodedDataset, EncodedEntry
from ..conditioning.pictures import PairPlan, plan_pair
from ..conditioning.reference_sets import split_by_reference
from ..config import BatchingConfig, EncodingConfig, ModelConfig, ValidationConfig
from ..config.validation import SIZE_STEP
from ..data.pairing import EditDataset
from ..errors import DatasetError
from ..geometry import Size, bucket_size
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.latents import PATCH, VAE_FACTOR
from ..training.validation_work import Passes
from .activations import Tokens

VISION_PATCH = 28  # pixels per side of a Qwen2.5-VL picture token
_AROUND_CAPTION, _LETTERS_PER_TOKEN = 16, 3  # estimates: tokens of the prompt template, characters per caption token
_PROMPTS_READ = 64  # at most, of pairs of equal size, whose prompts differ little


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """Size of a pair. `target` is in pixels. Pairs of equal `group`, the sizes of all their pictures, can share a
    batch. `turns`: per epoch, of all pairs that this one stands for."""

    target: Size
    references: int
    image_tokens: int
    text_tokens: int
    group: tuple[Size, ...] = ()
    turns: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`train`: the largest pair, `batch` of them per micro-batch. `validation`: the largest sampled pair, or None.
    `on_the_fly_pixels`: pixels of the largest reference that is encoded on the fly; 0 if all are in the cache.
    `largest_picture`: pixels of the largest target or reference that is still to be encoded; 0 if there is none.
    `training`: tokens of the pairs of each size, and their turns per epoch. `held_out` and `pictures`: tokens and
    number of the held-out pairs and of the validation pictures that one set of weights draws, for `validation_work`."""

    train: PairSize
    batch: int
    validation: PairSize | None = None
    on_the_fly_pixels: int = 0
    largest_picture: int = 0
    training: tuple[Passes, ...] = ()
    held_out: tuple[Passes, ...] = ()
    pictures: tuple[Passes, ...] = ()

    @property
    def tokens(self) -> Tokens:
        """Tokens of the largest micro-batch."""
        return Tokens(batch=self.batch, image=self.train.image_tokens, text=self.train.text_tokens)


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
    )


def workload_of_pairs(
    parts: Iterable[tuple[EditDataset, EncodingConfig]],
    model: ModelConfig,
    batching: BatchingConfig,
    validation: ValidationConfig,
) -> Workload:
    """The workload of datasets that are not encoded yet, from the pictures' headers.

    Prompt lengths are estimated. The first pairs stand for the ones that encoding will hold out.
    """
    train, drawn, out, flying, largest = [], [], [], [0], 0
    for dataset, encoding in parts:
        sizes = []
        for pair in split_by_reference(dataset.pairs, encoding, held_out=()):
            kinds = pair.conditioning_types
            plan = plan_pair(pair.sizes, FLAVOURS[model.flavour], encoding, pair.key, conditioning_types=kinds)
            text = _estimated_prompt(plan, max(map(len, pair.captions), default=0))
            references = [view.size for view in plan.references]
            sizes.append(pair_size(plan.target.size, references, text))
            largest = max(largest, *(size.width * size.height for size in (plan.target.size, *references)))
            if encoding.reference_latents == "on_the_fly":
                flying += [size.width * size.height for size in references]
        held = len(sizes) if encoding.num_eval_images < 0 else encoding.num_eval_images
        train += sizes if held < len(sizes) else []
        drawn += sizes if held else []
        out += [dataclasses.replace(size, turns=1 + len(encoding.validation_prompts)) for size in sizes[:held]]
    work = _workload(train, _at_sizes(drawn, validation) if validation.num_validation_images else [], batching)
    return dataclasses.replace(
        work,
        on_the_fly_pixels=max(flying),
        largest_picture=largest,
        held_out=_passes(dataclasses.replace(pair, turns=1) for pair in out),
        pictures=_passes(_at_sizes(out[: validation.num_validation_images], validation)),
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


def _estimated_prompt(plan: PairPlan, letters: int) -> int:
    """Prompt tokens: those of the pictures, and an estimate for a caption of so many characters."""
    vision = sum((view.size.height // VISION_PATCH) * (view.size.width // VISION_PATCH) for view in plan.vision)
    return vision + _AROUND_CAPTION + letters // _LETTERS_PER_TOKEN


def _workload(train: Sequence[PairSize], drawn: Sequence[PairSize], batching: BatchingConfig) -> Workload:
    if not train:
        raise DatasetError(
            "The memory plan has no pairs to train on: all are held out. Set num_eval_images lower, to 0 or more."
        )
    turns = Counter[tuple[Size, ...]]()
    for pair in train:
        turns[pair.group] += pair.turns
    batches = {group: min(batching.train_batch_size, count) for group, count in turns.items()}
    largest = max(train, key=lambda pair: batches[pair.group] * _all_tokens(pair))
    texts = {pair.group: pair for pair in sorted(train, key=_all_tokens)}  # the longest prompt of each size
    return Workload(
        train=largest,
        batch=batches[largest.group],
        validation=max(drawn, key=_all_tokens) if drawn else None,
        training=_passes(dataclasses.replace(pair, turns=turns[group]) for group, pair in texts.items()),
    )


def _all_tokens(pair: PairSize) -> int:
    return pair.image_tokens + pair.text_tokens


def _sizes(encoded: EncodedDataset, entries: Sequence[EncodedEntry]) -> list[PairSize]:
    sizes = []
    for pictures, turns in _turns_by_size(entries).items():
        read = [turn.seen for turn in turns[:_PROMPTS_READ]]
        text = max(encoded.prompt_tokens(key) for seen in read for key in (*seen.prompts, *seen.validation_prompts))
        target, *references = pictures
        sizes.append(pair_size(target, references, text, turns=sum(1 + turn.seen.repeats for turn in turns)))
    return sizes


def largest_draws(encoded: EncodedDataset, work: Workload) -> tuple[Draw, ...]:
    """The largest micro-batch of a run: pairs of the size of `work.train`, those with the longest prompts first."""
    longest = []
    for turn in _turns_by_size(encoded.pairs)[work.train.group][:_PROMPTS_READ]:
        tokens, caption = max((encoded.prompt_tokens(key), number) for number, key in enumerate(turn.seen.prompts))
        longest.append((tokens, turn, caption))
    longest.sort(key=lambda each: each[0], reverse=True)
    return tuple(
        Draw(turn.pair, caption, index, turn.reference_set)
        for index, (_, turn, caption) in zip(range(work.batch), cycle(longest), strict=False)
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
