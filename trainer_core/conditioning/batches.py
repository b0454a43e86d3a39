"""Choose the pairs of micro-batch i as a pure function of i, and stack their tensors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import BatchingConfig
from ..errors import ConfigError
from ..qwen_image.types import Condition
from ..ranks import Ranks
from ..rng import stream
from .encoded import EncodedDataset, EncodeReference
from .entry import EMPTY_CAPTION, EncodedEntry
from .types import EncodedPair

MEMORY_BYTES = 1 << 30  # host memory for encoded pairs, so that a small dataset is read only once


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of a pair in training. `pair` is its number; `caption` is a caption's number or EMPTY_CAPTION.

    `index` counts draws from the start of the run and seeds all randomness of this one. `reference_set` is the number
    of the reference to show, for pairs that show one reference at a time.
    """

    pair: int
    caption: int
    index: int
    reference_set: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one micro-batch: `target_latents` [B, C, H, W] and `loss_weights` [B, 1, H, W], None if all are 1."""

    draws: tuple[Draw, ...]
    target_latents: Tensor
    condition: Condition
    loss_weights: Tensor | None = None


class _EpochStart(NamedTuple):
    """The numbers of an epoch's first micro-batch and first turn."""

    batch: int
    turn: int


class _Turn(NamedTuple):
    """One turn of an epoch: a pair with one of its reference sets."""

    pair: int
    reference_set: int


class BatchPlan:
    """The micro-batches of a whole run. Each depends only on its number, so a resumed run continues identically.

    An epoch visits every pair once, or as often as a mix's repeats and probability say, shuffled by (seed, epoch).

    Raises:
        ConfigError: caption dropout is on, but the empty caption was not encoded.
    """

    def __init__(self, encoded: EncodedDataset, batching: BatchingConfig, seed: int) -> None:
        check_empty_captions(encoded, batching)
        self._pairs = encoded.pairs
        self._size = batching.train_batch_size
        self._dropout = batching.caption_dropout_probability
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        self._all_turns = [index for index, pair in enumerate(self._pairs) for _ in range(1 + pair.repeats)]
        self._draws_pairs = any(pair.probability < 1 for pair in self._pairs)
        self._draws_references = any(pair.prompts_by_reference for pair in self._pairs)
        self._epochs_differ = self._draws_pairs or any(len(_shapes_per_reference(pair)) > 1 for pair in self._pairs)
        self._epoch_starts = [_EpochStart(0, 0)]  # of the epochs computed so far; unused if all have equal length
        self._lock = Lock()  # the loader's thread and the training thread both read the plan

    def __getitem__(self, micro_batch: int) -> tuple[Draw, ...]:
        """The pairs that a micro-batch uses, as Draws. Micro-batches are counted from the start of the run."""
        epoch, position = self._place(micro_batch)
        return self._epoch(epoch)[position]

    def batches_in_epoch(self, epoch: int) -> int:
        """Number of micro-batches in an epoch; 0 if it happens to draw no pair."""
        shapes = Counter(map(self._shapes, self._turns(epoch)))
        return sum(math.ceil(count / self._size) for count in shapes.values())

    @cached_property
    def _even_length(self) -> int:
        """Number of micro-batches in every epoch, if all epochs have equal length."""
        return self.batches_in_epoch(0)

    def _place(self, micro_batch: int) -> tuple[int, int]:
        """The epoch of a micro-batch and its position in that epoch."""
        if not self._epochs_differ:
            return divmod(micro_batch, self._even_length)
        with self._lock:
            while self._epoch_starts[-1].batch <= micro_batch:
                self._add_epoch_start()
            epoch = bisect_right(self._epoch_starts, micro_batch, key=lambda start: start.batch) - 1
            return epoch, micro_batch - self._epoch_starts[epoch].batch

    def _add_epoch_start(self) -> None:
        epoch, last = len(self._epoch_starts) - 1, self._epoch_starts[-1]
        turns = len(self._turns(epoch))
        self._epoch_starts.append(_EpochStart(last.batch + self.batches_in_epoch(epoch), last.turn + turns))

    def _shapes(self, turn: _Turn) -> object:
        """The shapes of a turn's latents. Turns share a batch only if these are equal."""
        return self._pairs[turn.pair].seen(turn.reference_set).shapes

    def _turns(self, epoch: int) -> list[_Turn]:
        """The turns of an epoch in pair order, each with its reference set."""
        pairs = self._visited(epoch)
        if not self._draws_references:
            return [_Turn(pair, 0) for pair in pairs]
        drawn = torch.rand(len(pairs), generator=stream(self._seed, "reference set", epoch)).tolist()
        return [
            _Turn(pair, int(share * max(1, len(self._pairs[pair].prompts_by_reference))))
            for pair, share in zip(pairs, drawn, strict=True)
        ]

    def _visited(self, epoch: int) -> list[int]:
        """The pairs of an epoch in order, each as often as the epoch visits it."""
        if not self._draws_pairs:
            return self._all_turns
        drawn = torch.rand(len(self._pairs), generator=stream(self._seed, "probability", epoch)).tolist()
        return [pair for pair in self._all_turns if drawn[pair] < self._pairs[pair].probability]

    def _plan_epoch(self, epoch: int) -> list[tuple[Draw, ...]]:
        """Fill a batch per shape from the shuffled turns. Batches that stay smaller come last."""
        turns = self._turns(epoch)
        order = [turns[at] for at in torch.randperm(len(turns), generator=stream(self._seed, "order", epoch)).tolist()]
        waiting: dict[object, list[_Turn]] = {}
        batches: list[list[_Turn]] = []
        for turn in order:
            group = waiting.setdefault(self._shapes(turn), [])
            group.append(turn)
            if len(group) == self._size:
                batches.append(waiting.pop(self._shapes(turn)))
        batches += waiting.values()
        index = self._epoch_starts[epoch].turn if self._epochs_differ else epoch * len(order)
        planned = []
        for batch in batches:
            planned.append(tuple(self._draw(turn, index + number) for number, turn in enumerate(batch)))
            index += len(batch)
        return planned

    def _draw(self, turn: _Turn, index: int) -> Draw:
        captions = len(self._pairs[turn.pair].captions)
        caption = int(torch.randint(captions, (), generator=stream(self._seed, "caption", index)))
        if (
            self._dropout
            and float(torch.rand((), generator=stream(self._seed, "caption dropout", index))) < self._dropout
        ):
            caption = EMPTY_CAPTION
        return Draw(turn.pair, caption, index, turn.reference_set)


def _shapes_per_reference(pair: EncodedEntry) -> set[object]:
    """The different shapes of a pair's turns, for pairs that show one reference at a time."""
    return {pair.seen(number).shapes for number in range(len(pair.prompts_by_reference))}


def check_empty_captions(encoded: EncodedDataset, batching: BatchingConfig) -> None:
    """Raise ConfigError if captions are to be dropped, but the dataset has no empty caption."""
    if batching.caption_dropout_probability > 0 and not all(pair.has_empty for pair in encoded.pairs):
        raise ConfigError(
            f"caption_dropout_probability is {batching.caption_dropout_probability}, but the dataset was encoded "
            "without the empty caption. Encode it again with encode_empty_caption on (nothing else is encoded again), "
            "or set caption_dropout_probability to 0, which suits most edits."
        )


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The micro-batches of this process, `per_step` per step.

    Each step splits consecutive micro-batches evenly among the processes. Together they see the same data as a single
    process with `ranks.size` times the gradient accumulation.
    """

    whole: BatchPlan
    ranks: Ranks
    per_step: int

    def __getitem__(self, micro_batch: int) -> tuple[Draw, ...]:
        """The pairs that one of this process's micro-batches uses. They are counted from the start of the run."""
        step, position = divmod(micro_batch, self.per_step)
        return self.whole[(step * self.ranks.size + self.ranks.rank) * self.per_step + position]

    def draws_of_step(self, step: int) -> list[Draw]:
        """The pairs that a step uses in all processes together."""
        count = self.per_step * self.ranks.size
        return [draw for number in range(step * count, (step + 1) * count) for draw in self.whole[number]]


class BatchLoader:
    """Reads batches one ahead of the training step. Use it as a context manager.

    Keeps up to about 1 GiB of pairs in memory. `encode_reference` encodes references on the fly, in a thread if
    `in_background`; on MPS it must not, because torch crashes if two threads use MPS at once.
    """

    def __init__(
        self,
        encoded: EncodedDataset,
        plan: RankPlan,
        *,
        encode_reference: EncodeReference | None = None,
        in_background: bool = True,
    ) -> None:
        self.plan = plan
        self._encoded = encoded
        self._encode_reference = encode_reference
        self._held: OrderedDict[tuple[int, int, int], EncodedPair] = OrderedDict()
        self._held_bytes = 0
        # One thread reads everything, because the cache of pairs and the VAE are not thread-safe.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if in_background else None
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __getitem__(self, micro_batch: int) -> Batch:
        """The tensors of a micro-batch. Starts to read the next one in the background."""
        ready, self._next = self._next, None
        if ready and ready[0] == micro_batch:
            batch = ready[1].result()
        else:
            if ready:
                ready[1].cancel()
            batch = self.read(self.plan[micro_batch])
        if self._pool is not None:
            self._next = (micro_batch + 1, self._pool.submit(lambda: self._read(self.plan[micro_batch + 1])))
        return batch

    def read(self, draws: tuple[Draw, ...]) -> Batch:
        """The tensors of a micro-batch with these draws, of the plan or not."""
        return self._read(draws) if self._pool is None else self._pool.submit(self._read, draws).result()

    def _read(self, draws: tuple[Draw, ...]) -> Batch:
        return collate(draws, [self._pair(draw) for draw in draws])

    def _pair(self, draw: Draw) -> EncodedPair:
        key = (draw.pair, draw.caption, draw.reference_set)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        entry = self._encoded.pairs[draw.pair]
        pair = self._encoded.load(entry, draw.caption, draw.reference_set, encode_reference=self._encode_reference)
        self._held[key] = pair
        self._held_bytes += _num_bytes(pair)
        while self._held_bytes > MEMORY_BYTES and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= _num_bytes(oldest)
        return pair


def _num_bytes(pair: EncodedPair) -> int:
    weights = () if pair.loss_weights is None else (pair.loss_weights,)
    return sum(each.nbytes for each in (pair.target_latents, pair.prompt_embeds, *pair.reference_latents, *weights))


def collate(draws: tuple[Draw, ...], pairs: Sequence[EncodedPair]) -> Batch:
    """Stack pairs of equal shapes into one batch. Pads shorter prompts at the end and masks the padding."""
    condition = Condition(
        tuple(torch.stack(latents) for latents in zip(*(pair.reference_latents for pair in pairs), strict=True)),
        *pad_prompts([pair.prompt_embeds for pair in pairs]),
    )
    return Batch(draws, torch.stack([pair.target_latents for pair in pairs]), condition, _stacked_weights(pairs))


def _stacked_weights(pairs: Sequence[EncodedPair]) -> Tensor | None:
    """Stacked loss weights, with 1 everywhere for pairs without a mask; None if no pair has one."""
    if all(pair.loss_weights is None for pair in pairs):
        return None
    ones = torch.ones(1, *pairs[0].target_latents.shape[1:])
    return torch.stack([ones if pair.loss_weights is None else pair.loss_weights for pair in pairs])


def pad_prompts(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Padded embeddings [B, L, D] and their mask [B, L], which is None if all prompts have equal length."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    if bool((lengths == lengths[0]).all()):
        return padded, None
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
