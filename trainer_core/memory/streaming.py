"""Block streaming: frozen weights stay in host memory and are copied to the device just in time.

Frozen weights never change, so nothing is copied back. Streamed blocks take turns with a few buffers on the device.
Each block's weights are permanent views of its buffer: their addresses never change, as compiled blocks require. A
block's bytes are one pinned allocation, so one copy moves them. The copy runs on its own stream and begins as soon as
the previous block in that buffer has finished. The backward pass runs in reverse order and begins with the blocks that
the forward pass has left in the buffers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..device import aligned

_LOG = logging.getLogger(__name__)
_Slot = tuple[Tensor, int]  # a tensor, and its offset in bytes
_READ = "read_streamed_weights"  # attribute of every module of a streamed block: `BlockStream._reading` of the block


def weights_on_device(layer: nn.Module) -> AbstractContextManager[None]:
    """Keeps a layer's weights on the device while the context lasts. Does nothing if the layer is not streamed.

    Use it to read frozen weights outside of their block's passes: they are views of a buffer, which may hold another
    block's weights. For the same reason, do not nest these contexts.
    """
    return getattr(layer, _READ, nullcontext)()


class BlockStream:
    """Streams the frozen weights of `blocks`, which run in this order forward and in reverse order backward.

    Forward hooks fetch and release the weights of forward passes without gradients. A forward pass with gradients must
    run inside `held`, together with its backward if there is one. Trainable weights are not streamed: inject adapters
    afterwards.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, num_buffers: int) -> None:
        packed = [_packed(*_layout(block)) for block in blocks]
        sizes = [host.nbytes for _, host in packed]
        count = min(num_buffers, len(blocks))
        self.device = device
        self._host = [host for _, host in packed]
        self._buffers = [
            torch.empty(max(sizes[index::count]), dtype=torch.uint8, device=device) for index in range(count)
        ]
        self._block_in = [-1] * count  # by buffer: the block that is in it or being copied to it
        self._holding = False
        for index, (slots, _) in enumerate(packed):
            _point_into(slots, self._buffers[index % count])
        self._number = {block: index for index, block in enumerate(blocks)}
        self._queue = _CopyQueue(device, count)
        if device.type == "cuda":
            _pin(self, self._host, device)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after)
            for module in block.modules():
                setattr(module, _READ, partial(self._reading, index))
        for index in range(count):
            self._fetch(index)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that hold the weights."""
        return sum(each.nbytes for each in self._host)

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory of the buffers."""
        return sum(each.nbytes for each in self._buffers)

    @property
    def blocks(self) -> tuple[int, ...]:
        """By buffer, the number of the block that work enqueued from now on finds there, after a wait for its copy."""
        return tuple(self._block_in)

    def __contains__(self, block: nn.Module) -> bool:
        return block in self._number

    def put(self, blocks: Sequence[int]) -> None:
        """Let compute work enqueued from now on find these blocks in the buffers."""
        for index in blocks:
            self._need(index)

    def became(self, blocks: Sequence[int]) -> None:
        """Tell that compute work enqueued up to now leaves these blocks in the buffers."""
        self._block_in = list(blocks)
        self.fork()

    def fork(self) -> None:
        """Let all copies from now on, and waits for copies, depend on compute work enqueued up to now, and only on it.
        Copies then belong to the same capture of a CUDA graph, or to none."""
        self._queue.fork()

    def join(self) -> None:
        """Let compute work enqueued from now on wait for all copies."""
        self._queue.join()

    @contextmanager
    def held(self, block: nn.Module, *, forward: bool = False) -> Iterator[None]:
        """Keeps the block's weights until the context ends, then fetches the block that needs its buffer next.

        `forward`: that is a later block, as in the forward pass. Otherwise it is an earlier one.
        """
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if block in self:
                self._release(self._number[block], forward=forward)

    @contextmanager
    def _reading(self, index: int) -> Iterator[None]:
        self._need(index)
        try:
            yield
        finally:
            self._queue.free(index % len(self._buffers))

    def _before(self, block: nn.Module, *_: object) -> None:
        self._need(self._number[block])

    def _after(self, block: nn.Module, *_: object) -> None:
        if self._holding:
            return
        assert not torch.is_grad_enabled(), "a streamed block with gradients needs `held`"
        self._release(self._number[block], forward=True)

    def _need(self, index: int) -> None:
        """Let compute work enqueued from now on find the block's weights in its buffer."""
        self._fetch(index)
        self._queue.wait(index % len(self._buffers))

    def _fetch(self, index: int) -> None:
        buffer = index % len(self._buffers)
        if self._block_in[buffer] != index:
            self._queue.copy(buffer, self._buffers[buffer][: self._host[index].nbytes], self._host[index])
            self._block_in[buffer] = index

    def _release(self, index: int, *, forward: bool) -> None:
        """Free the block's buffer and prefetch the next block of this pass that uses it, if there is one."""
        count = len(self._buffers)
        self._queue.free(index % count)
        following = index + count if forward else index - count
        if 0 <= following < len(self._host):
            self._fetch(following)


class _CopyQueue:
    """Copies on their own CUDA stream, synchronised with the compute stream. On the CPU, copies are synchronous."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = [torch.cuda.Event() for _ in range(num_buffers)] if self._stream else []
        self._freed = [torch.cuda.Event() for _ in range(num_buffers)] if self._stream else []
        # Work enqueued before may still use the memory that the buffers took over. The first copies wait for it too.
        for buffer in range(num_buffers):
            self.free(buffer)

    def copy(self, buffer: int, target: Tensor, source: Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._freed[buffer])
            target.copy_(source, non_blocking=True)
            self._copied[buffer].record(self._stream)

    def wait(self, buffer: int) -> None:
        """Let compute work enqueued from now on wait for the last copy into the buffer."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied[buffer])

    def fork(self) -> None:
        """See `BlockStream.fork`: CUDA refuses to wait in a capture for an event from outside, and the reverse."""
        if self._stream is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for buffer, copied in enumerate(self._copied):
            copied.record(self._stream)
            self.free(buffer)

    def join(self) -> None:
        """Let compute work enqueued from now on wait for all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def free(self, buffer: int) -> None:
        """Let the next copy into the buffer wait for compute work enqueued up to now."""
        if self._stream is not None:
            self._freed[buffer].record(torch.cuda.current_stream(self._stream.device))


def _layout(block: nn.Module) -> tuple[list[_Slot], int]:
    """The block's frozen tensors with their offsets in one allocation, and its size in bytes."""
    slots: list[_Slot] = []
    size = 0
    for tensor in (*block.parameters(), *block.buffers()):
        if not tensor.requires_grad:
            slots.append((tensor, size))
            size += aligned(tensor.nbytes)
    return slots, size


def _view(buffer: Tensor, tensor: Tensor, offset: int) -> Tensor:
    """The part of a byte buffer at `offset`, with the type and shape of a tensor."""
    return buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _packed(slots: list[_Slot], size: int) -> tuple[list[_Slot], Tensor]:
    """The block's tensors with their offsets in one allocation in host memory, and that allocation.

    Loading leaves a block as one allocation already. Otherwise the tensors are copied, and their own memory is freed.
    """
    storages = [tensor.untyped_storage() for tensor, _ in slots]
    is_one = len({storage.data_ptr() for storage in storages}) == 1
    if is_one and storages[0].device.type == "cpu" and storages[0].nbytes() == size:
        host = torch.empty(0, dtype=torch.uint8).set_(storages[0])
        return [(tensor, tensor.data_ptr() - host.data_ptr()) for tensor, _ in slots], host
    host = torch.empty(size, dtype=torch.uint8)
    for tensor, offset in slots:
        _view(host, tensor, offset).copy_(tensor)
        tensor.data = _view(host, tensor, offset)
    return slots, host


def _point_into(slots: list[_Slot], buffer: Tensor) -> None:
    for tensor, offset in slots:
        tensor.data = _view(buffer, tensor, offset)


def _pin(owner: object, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Pin host memory while `owner` lives, for fast asynchronous copies to a CUDA device.

    Torch's own pinned memory is rounded up to powers of two, which would waste up to half of it.
    """
    unpinned = 0
    with torch.cuda.device(device):  # or CUDA would also take memory on the current device
        runtime: Any = torch.cuda.cudart()
        for tensor in tensors:
            if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
                unpinned += tensor.nbytes
                _forget_error(device)
            else:
                weakref.finalize(owner, _unpin, tensor, device)
    if unpinned:
        text = "%.1f GiB of host memory can't be pinned, so streaming is slow. Lower blocks_to_stream or free memory."
        _LOG.warning(text, unpinned / 2**30)


def _forget_error(device: torch.device) -> None:
    """Clear CUDA's last error: it would otherwise be raised by the next kernel, so launch one for this purpose."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


def _unpin(tensor: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still be reading from this memory
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(tensor.data_ptr())
