"""Choose the pairs of micro-batch i as a pure function of i, and read them."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch

from ..config import BatchingConfig, NoiseConfig, PreservationConfig
from ..errors import ConfigError
from ..ranks import Ranks
from ..rng import stream
from ..text import counted, shown
from .encoded import EncodedDataset, EncodeReference
from .entry import EMPTY_CAPTION, EncodedEntry
from .types import EncodedPair

MEMORY_BYTES = 1 << 30  # host memory for encoded pairs, so that a small dataset is read only once


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of a pair in training. `pair` is its number; `caption` is a caption's number or EMPTY_CAPTION.

    A turn that `preserves` trains what the base model predicts: with one of the pair's preservation prompts, of which
    `caption` is the number, or with a caption of regularisation data.

    `index` counts draws from the start of the run and seeds all randomness of this one. `reference_set` is the number
    of the reference to show, for pairs that show one reference at a time.
    """

    pair: int
    caption: int
    index: int
    reference_set: int = 0
    preserves: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """The pairs of one micro-batch, of any sizes, and the draws that chose them."""

    draws: tuple[Draw, ...]
    pairs: tuple[EncodedPair, ...]


class _Turn(NamedTuple):
    """One turn of an epoch: a pair with one of its reference sets."""

    pair: int
    reference_set: int


class BatchPlan:
    """The micro-batches of a whole run. Each depends only on its number, so a resumed run continues identically.

    A run's turns are those of its epochs, one epoch after the other, and every `train_batch_size` turns are a
    micro-batch. An epoch visits every pair once, or as often as a mix's repeats and probability say, shuffled by
    (seed, epoch).

    Raises:
        ConfigError: caption dropout is on, but the empty caption was not encoded; turns shall preserve, but no prompts
            for that were encoded.
    """

    def __init__(
        self,
        encoded: EncodedDataset,
        batching: BatchingConfig,
        seed: int,
        preservation: PreservationConfig = PreservationConfig(),  # noqa: B008 - frozen
    ) -> None:
        check_empty_captions(encoded, batching)
        check_preservation(encoded, preservation)
        self._preserved = preservation.preservation_probability
        self._pairs = encoded.pairs
        self._size = batching.train_batch_size
        self._dropout = batching.caption_dropout_probability
        self._seed = seed
        self._turns = lru_cache(maxsize=2)(self._shuffled_turns)
        self._all_turns = [index for index, pair in enumerate(self._pairs) for _ in range(1 + pair.repeats)]
        self._draws_pairs = any(pair.probability < 1 for pair in self._pairs)
        self._draws_references = any(pair.prompts_by_reference for pair in self._pairs)
        self._epoch_starts = [0]  # first turns of the epochs computed so far; unused if all have equal length
        self._lock = Lock()  # the loader's thread and the training thread both read the plan

    def __getitem__(self, micro_batch: int) -> tuple[Draw, ...]:
        """The pairs that a micro-batch uses, as Draws. Micro-batches are counted from the start of the run."""
        first = micro_batch * self._size
        return tuple(map(self._draw, range(first, first + self._size)))

    def turns_in_epoch(self, epoch: int) -> int:
        """Number of turns in an epoch; 0 if it happens to draw no pair."""
        return len(self._visited(epoch))

    def _draw(self, index: int) -> Draw:
        epoch, position = self._place(index)
        turn = self._turns(epoch)[position]
        pair = self._pairs[turn.pair]
        if self._preserved and not pair.is_regularisation:
            generator = stream(self._seed, "preservation", index)
            if float(torch.rand((), generator=generator)) < self._preserved:
                prompt = int(torch.randint(pair.num_preservation, (), generator=generator))
                return Draw(turn.pair, prompt, index, turn.reference_set, preserves=True)
        captions = len(pair.captions)
        caption = int(torch.randint(captions, (), generator=stream(self._seed, "caption", index)))
        if (
            self._dropout
            and float(torch.rand((), generator=stream(self._seed, "caption dropout", index))) < self._dropout
        ):
            caption = EMPTY_CAPTION
        return Draw(turn.pair, caption, index, turn.reference_set, preserves=pair.is_regularisation)

    def _place(self, index: int) -> tuple[int, int]:
        """The epoch of a turn and its position in that epoch."""
        if not self._draws_pairs:
            return divmod(index, len(self._all_turns))
        with self._lock:
            while self._epoch_starts[-1] <= index:
                self._epoch_starts.append(self._epoch_starts[-1] + self.turns_in_epoch(len(self._epoch_starts) - 1))
            epoch = bisect_right(self._epoch_starts, index) - 1
            return epoch, index - self._epoch_starts[epoch]

    def _shuffled_turns(self, epoch: int) -> list[_Turn]:
        """The turns of an epoch, each with its reference set."""
        pairs = self._visited(epoch)
        turns = [_Turn(pair, 0) for pair in pairs]
        if self._draws_references:
            drawn = torch.rand(len(pairs), generator=stream(self._seed, "reference set", epoch)).tolist()
            turns = [
                _Turn(pair, int(share * max(1, len(self._pairs[pair].prompts_by_reference))))
                for pair, share in zip(pairs, drawn, strict=True)
            ]
        order = torch.randperm(len(turns), generator=stream(self._seed, "order", epoch))
        return [turns[at] for at in order.tolist()]

    def _visited(self, epoch: int) -> list[int]:
        """The pairs of an epoch in order, each as often as the epoch visits it."""
        if not self._draws_pairs:
            return self._all_turns
        drawn = torch.rand(len(self._pairs), generator=stream(self._seed, "probability", epoch)).tolist()
        return [pair for pair in self._all_turns if drawn[pair] < self._pairs[pair].probability]


def check_preservation(encoded: EncodedDataset, preservation: PreservationConfig) -> None:
    """Raise ConfigError if turns shall preserve, but a pair lacks the prompts for that."""
    edits = [pair for pair in encoded.pairs if not pair.is_regularisation]
    if preservation.preservation_probability > 0 and not all(pair.num_preservation for pair in edits):
        raise ConfigError(
            f"preservation_probability is {preservation.preservation_probability:g}, but the dataset was encoded "
            "without preservation_prompts. Encode it again with some (nothing else is encoded again): in ComfyUI, "
            "connect Qwen Edit Preservation Settings to Encode Edit Pairs too. Or set preservation_probability to 0."
        )


def check_empty_captions(encoded: EncodedDataset, batching: BatchingConfig) -> None:
    """Raise ConfigError if captions are to be dropped, but the dataset has no empty caption."""
    if batching.caption_dropout_probability > 0 and not all(pair.has_empty for pair in encoded.pairs):
        raise ConfigError(
            f"caption_dropout_probability is {batching.caption_dropout_probability}, but the dataset was encoded "
            "without the empty caption. Encode it again with encode_empty_caption on (nothing else is encoded again), "
            "or set caption_dropout_probability to 0, which suits most edits."
        )


def check_differences(pairs: Sequence[EncodedEntry], noise: NoiseConfig) -> None:
    """Raise ConfigError if the edit weight needs the pixel differences of pairs that were encoded without them."""
    lacking = [pair.key for pair in pairs if pair.references and not pair.differences]
    if noise.needs_pixels and lacking:
        raise ConfigError(
            f"edit_weight_from is pixels, but {counted(len(lacking), 'pair')} (the first is {shown(lacking[0])!r}) "
            "had no pixel difference encoded. Encode the dataset again with encode_pixel_difference on (nothing else "
            "is encoded again), or set edit_weight_from to latents."
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
        self._held: OrderedDict[tuple[int, int, int, bool], EncodedPair] = OrderedDict()
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
        """The pairs of a micro-batch. Starts to read the next one in the background."""
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
        """The pairs of a micro-batch with these draws, of the plan or not."""
        return self._read(draws) if self._pool is None else self._pool.submit(self._read, draws).result()

    def _read(self, draws: tuple[Draw, ...]) -> Batch:
        return Batch(draws, tuple(map(self._pair, draws)))

    def _pair(self, draw: Draw) -> EncodedPair:
        key = (draw.pair, draw.caption, draw.reference_set, draw.preserves)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        entry = self._encoded.pairs[draw.pair]
        pair = self._encoded.load(
            entry,
            draw.caption,
            draw.reference_set,
            preserves=draw.preserves and not entry.is_regularisation,
            encode_reference=self._encode_reference,
        )
        self._held[key] = pair
        self._held_bytes += _num_bytes(pair)
        while self._held_bytes > MEMORY_BYTES and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= _num_bytes(oldest)
        return pair


def _num_bytes(pair: EncodedPair) -> int:
    maps = (each for each in (pair.loss_weights, pair.difference) if each is not None)
    return sum(each.nbytes for each in (pair.target_latents, pair.prompt_embeds, *pair.reference_latents, *maps))
