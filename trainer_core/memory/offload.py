"""Offloads activations to host memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import aligned

SMALL_BYTES = 1 << 20  # smaller tensors stay on the device: copying them would cost more than it saves
CHUNK_BYTES = 1 << 28  # host memory per allocation; a power of two, because torch rounds pinned memory up to one


@dataclass(eq=False)
class OffloadedTensor:
    """A tensor in host memory, and its copy back to the device once that has begun.

    On CUDA, `came` is recorded when the copy is done. `coming` has memory of the stream `user`, which computes with it.
    """

    host: Tensor
    shape: torch.Size
    dtype: torch.dtype
    coming: Tensor | None = None
    came: torch.cuda.Event | None = None
    user: torch.cuda.Stream | None = None
    is_fetched: bool = False

    def __del__(self) -> None:
        """After an aborted step, work that reuses the memory of `coming` must wait until the copy into it is done."""
        if self.came is not None and self.user is not None and not self.is_fetched:
            with suppress(RuntimeError):  # after a failed capture of a CUDA graph, there was no copy
                self.user.wait_event(self.came)


class HostCopies:
    """A stack of tensors in host memory. Fetching one also starts copying back the `ahead` tensors kept just before it.

    On CUDA, copies run on their own stream. Tensors lie one after another in pinned memory, which is reused in every
    step. It grows to what the largest step needs and no further, however the tensor sizes vary between steps.
    """

    def __init__(self, device: torch.device, *, small_bytes: int = SMALL_BYTES, ahead: int = 2) -> None:
        self._device, self._small_bytes, self._ahead = device, small_bytes, ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunks: list[Tensor] = []
        self._stack: list[_StackEntry] = []  # weak references: the tensors of an aborted step free their own space
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are allocated."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def keep(self, tensor: Tensor) -> OffloadedTensor | Tensor:
        """Begin to copy a tensor to host memory. Small tensors, and those of other devices, are returned unchanged.

        Drop the tensor afterwards: its device memory is freed when the copy is done and nothing else refers to it.
        """
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
        """The tensor on its device again. Also begins to copy back the tensors that will be fetched next."""
        if isinstance(kept, Tensor):
            return kept
        self._begin(kept)
        if kept.came is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.came)
        kept.is_fetched = True
        # The copies to the host need no more references: copies back run after them, on the same stream.
        self._leaving.clear()
        self._pop_unused()
        for entry in self._stack[-self._ahead :]:
            if (earlier := entry.kept()) is not None:
                self._begin(earlier)
        assert kept.coming is not None
        return kept.coming

    def fork(self) -> None:
        """Let all copies from now on depend on compute work enqueued up to now, and forget those before. Call it where
        a capture of a CUDA graph begins: CUDA refuses to wait in a capture for work from outside."""
        self._leaving.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """Let compute work enqueued from now on wait for all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._leaving.clear()

    def _placed(self, tensor: Tensor) -> OffloadedTensor:
        """Reserve the next piece of host memory for a tensor.

        A copy back may still be reading from this memory. That is safe: all copies run in order on one stream.
        """
        self._pop_unused()
        chunk, end = (self._stack[-1].chunk, self._stack[-1].end) if self._stack else (0, 0)
        while True:
            if chunk == len(self._chunks):
                size = _chunk_bytes(tensor.nbytes)
                self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None))
            if end + tensor.nbytes <= self._chunks[chunk].nbytes:
                break
            chunk, end = chunk + 1, 0
        host = self._chunks[chunk][end : end + tensor.nbytes]
        kept = OffloadedTensor(host, tensor.shape, tensor.dtype)
        self._stack.append(_StackEntry(weakref.ref(kept), chunk, end + aligned(tensor.nbytes)))
        return kept

    def _pop_unused(self) -> None:
        """Free the space of tensors on top of the stack that were fetched or no longer exist."""
        while self._stack and ((last := self._stack[-1].kept()) is None or last.is_fetched):
            self._stack.pop()

    def _hold(self, left: torch.cuda.Event, tensor: Tensor) -> None:
        """Keep a tensor alive until its copy is done. If more than `ahead` copies are pending, later compute work waits
        for the oldest: only then may it use that tensor's memory."""
        self._leaving.append((left, tensor))
        while len(self._leaving) > self._ahead:
            torch.cuda.current_stream(self._device).wait_event(self._leaving[0][0])
            self._leaving.popleft()

    def _begin(self, kept: OffloadedTensor) -> None:
        if kept.coming is not None:
            return
        kept.coming = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        if self._stream is None:
            _bytes(kept.coming).copy_(kept.host)
            return
        # The new tensor may reuse memory that work on the current stream still reads.
        kept.user = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(kept.user)
        with torch.cuda.stream(self._stream):
            _bytes(kept.coming).copy_(kept.host, non_blocking=True)
            kept.came = came = torch.cuda.Event()
            came.record(self._stream)


@dataclass(frozen=True, slots=True)
class _StackEntry:
    """Where an offloaded tensor's space is: its chunk, and the offset there at which the next tensor may begin."""

    kept: weakref.ref[OffloadedTensor]
    chunk: int
    end: int


def offloaded_bytes(sizes: Iterable[int]) -> int:
    """Bytes of host memory that HostCopies allocates for tensors of these sizes (bytes), kept in this order."""
    chunks: list[int] = []
    end = 0
    for size in sizes:
        if size < SMALL_BYTES:
            continue
        if not chunks or end + size > chunks[-1]:
            chunks.append(_chunk_bytes(size))
            end = 0
        end += aligned(size)
    return sum(chunks)


def _chunk_bytes(size: int) -> int:
    """Bytes of a new chunk whose first tensor has `size` bytes."""
    return max(CHUNK_BYTES, 1 << (size - 1).bit_length())


def _bytes(tensor: Tensor) -> Tensor:
    """A view of the tensor's memory as bytes [n]."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
