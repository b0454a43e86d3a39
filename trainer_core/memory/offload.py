"""Activations that wait in host memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL_BYTES = 1 << 20  # smaller tensors stay: the copy would cost more than it saves
CHUNK_BYTES = 1 << 28  # of host memory at a time; a power of two, to which torch rounds pinned memory up


@dataclass(eq=False)
class OffloadedTensor:
    """A tensor in host memory, and what is on its way back."""

    host: Tensor
    shape: torch.Size
    dtype: torch.dtype
    coming: Tensor | None = None
    came: torch.cuda.Event | None = None
    is_fetched: bool = False


class HostCopies:
    """Last in, first out: while one tensor is used, those kept before it are brought back.

    Copies run on a stream of their own. Tensors lie one behind the other in pinned memory that is used again in the
    next step, so that as much is held as the largest step took, whatever the sizes of the others.
    """

    def __init__(self, device: torch.device, *, small_bytes: int = SMALL_BYTES, ahead: int = 2) -> None:
        self._device, self._small_bytes, self._ahead = device, small_bytes, ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunks: list[Tensor] = []
        self._order: list[_StackEntry] = []  # what a step that broke off left is given up by itself
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @property
    def host_bytes(self) -> int:
        """Host memory that is held."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def keep(self, tensor: Tensor) -> OffloadedTensor | Tensor:
        """Copy to host memory; the tensor's own memory is free as soon as nobody else holds it. Small ones are given
        back as they are."""
        if tensor.nbytes < self._small_bytes or tensor.device.type != self._device.type:
            return tensor
        kept = self._placed(tensor)
        if self._stream is None:
            kept.host.copy_(_bytes(tensor))
            return kept
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            kept.host.copy_(_bytes(tensor), non_blocking=True)
            left = torch.cuda.Event()
            left.record(self._stream)
        self._hold(left, tensor)
        return kept

    def fetch(self, kept: OffloadedTensor | Tensor) -> Tensor:
        """The tensor again, on its device. The next ones are begun to be fetched."""
        if isinstance(kept, Tensor):
            return kept
        self._begin(kept)
        kept.is_fetched = True
        self._leaving.clear()  # the forward pass is over, and what is enqueued from here on follows its copies
        self._give_up_fetched()
        for place in self._order[-self._ahead :]:
            if (earlier := place.kept()) is not None:
                self._begin(earlier)
        if kept.came is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.came)
        assert kept.coming is not None
        return kept.coming

    def _placed(self, tensor: Tensor) -> OffloadedTensor:
        """The next piece of host memory. It may still be read from: copies are in order, on one stream."""
        self._give_up_fetched()
        chunk, end = (self._order[-1].chunk, self._order[-1].end) if self._order else (0, 0)
        while True:
            if chunk == len(self._chunks):
                size = _chunk_bytes(tensor.nbytes)
                self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None))
            if end + tensor.nbytes <= self._chunks[chunk].nbytes:
                break
            chunk, end = chunk + 1, 0
        host = self._chunks[chunk][end : end + tensor.nbytes]
        kept = OffloadedTensor(host, tensor.shape, tensor.dtype)
        self._order.append(_StackEntry(weakref.ref(kept), chunk, end + _aligned(tensor.nbytes)))
        return kept

    def _give_up_fetched(self) -> None:
        while self._order and ((last := self._order[-1].kept()) is None or last.is_fetched):
            self._order.pop()

    def _hold(self, left: torch.cuda.Event, tensor: Tensor) -> None:
        """Keep a tensor's memory until it has left, and don't run far ahead of the device: what it has not done yet
        can't be used again, so a whole forward pass enqueued at once would need all of its memory at once."""
        self._leaving.append((left, tensor))
        while len(self._leaving) > self._ahead:
            self._leaving[0][0].synchronize()
            self._leaving.popleft()

    def _begin(self, kept: OffloadedTensor) -> None:
        if kept.coming is not None:
            return
        kept.coming = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        if self._stream is None:
            _bytes(kept.coming).copy_(kept.host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # who had this memory before is through
        with torch.cuda.stream(self._stream):
            _bytes(kept.coming).copy_(kept.host, non_blocking=True)
            kept.came = torch.cuda.Event()
            kept.came.record(self._stream)


@dataclass(frozen=True, slots=True)
class _StackEntry:
    """Where a kept tensor lies, or lay: its chunk, and the byte there behind it."""

    kept: weakref.ref[OffloadedTensor]
    chunk: int
    end: int


def offloaded_bytes(sizes: Iterable[int]) -> int:
    """Host memory that tensors of these sizes in bytes take, in the order in which they are kept."""
    chunks: list[int] = []
    end = 0
    for size in sizes:
        if size < SMALL_BYTES:
            continue
        if not chunks or end + size > chunks[-1]:
            chunks.append(_chunk_bytes(size))
            end = 0
        end += _aligned(size)
    return sum(chunks)


def _chunk_bytes(size: int) -> int:
    """Of a chunk that has to hold a tensor of that size."""
    return max(CHUNK_BYTES, 1 << (size - 1).bit_length())


def _aligned(size: int) -> int:
    """Up to the next multiple of 512 bytes, where another tensor may begin."""
    return -(-size // 512) * 512


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as bytes."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
