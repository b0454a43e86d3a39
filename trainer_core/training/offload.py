"""Activations that wait in host memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL_BYTES = 1 << 20  # smaller tensors stay: the copy would cost more than it saves


@dataclass(eq=False)
class Kept:
    """A tensor in host memory, and what is on its way back."""

    host: Tensor
    like: Tensor  # on the meta device
    device: torch.device
    coming: Tensor | None = None
    came: torch.cuda.Event | None = None


class HostCopies:
    """Last in, first out: while one tensor is used, those kept before it are brought back.

    Copies run on a stream of their own, between pinned buffers that are used again in the next step.
    """

    def __init__(self, device: torch.device, *, small_bytes: int = SMALL_BYTES, ahead: int = 2) -> None:
        self._device, self._small_bytes, self._ahead = device, small_bytes, ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unused: dict[int, list[Tensor]] = {}  # buffers by size
        self._order: list[weakref.ref[Kept]] = []  # those of a step that broke off are gone by themselves
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def keep(self, tensor: Tensor) -> Kept | Tensor:
        """Copy to host memory; the tensor's own memory is free as soon as nobody else holds it. Small ones are given
        back as they are."""
        if tensor.nbytes < self._small_bytes or tensor.device.type != self._device.type:
            return tensor
        kept = Kept(self._buffer(tensor), torch.empty_like(tensor, device="meta"), tensor.device)
        if self._stream is None:
            kept.host.copy_(_bytes(tensor))
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                kept.host.copy_(_bytes(tensor), non_blocking=True)
                left = torch.cuda.Event()
                left.record(self._stream)
            self._hold(left, tensor)
        self._order.append(weakref.ref(kept))
        return kept

    def fetch(self, kept: Kept | Tensor) -> Tensor:
        """The tensor again, on its device. The next ones are begun to be fetched."""
        if isinstance(kept, Tensor):
            return kept
        self._begin(kept)
        self._leaving.clear()  # the forward pass is over, and what is enqueued from here on follows its copies
        while self._order and self._order[-1]() in (None, kept):
            self._order.pop()
        for reference in self._order[-self._ahead :]:
            if (earlier := reference()) is not None:
                self._begin(earlier)
        if kept.came is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.came)
        self._unused.setdefault(kept.host.nbytes, []).append(kept.host)
        assert kept.coming is not None
        return kept.coming

    def _hold(self, left: torch.cuda.Event, tensor: Tensor) -> None:
        """Keep a tensor's memory until it has left, and don't run far ahead of the device: what it has not done yet
        can't be used again, so a whole forward pass enqueued at once would need all of its memory at once."""
        self._leaving.append((left, tensor))
        while len(self._leaving) > self._ahead:
            self._leaving[0][0].synchronize()
            self._leaving.popleft()

    def _begin(self, kept: Kept) -> None:
        if kept.coming is not None:
            return
        kept.coming = torch.empty_like(kept.like, device=kept.device)
        if self._stream is None:
            _bytes(kept.coming).copy_(kept.host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # who had this memory before is through
        with torch.cuda.stream(self._stream):
            _bytes(kept.coming).copy_(kept.host, non_blocking=True)
            kept.came = torch.cuda.Event()
            kept.came.record(self._stream)

    def _buffer(self, tensor: Tensor) -> Tensor:
        unused = self._unused.get(tensor.nbytes)
        if unused:
            return unused.pop()
        return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as bytes."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
