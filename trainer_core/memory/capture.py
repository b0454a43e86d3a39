"""Captures a forward and a backward pass as CUDA graphs, with the copies of streamed weights and offloaded tensors.

Capturing records the kernels that a pass would launch, with the addresses of their memory, and runs none of them. A
replay launches all of them at once. The addresses stay valid: trained and frozen weights never move, inputs are copied
into tensors of the graph, and tensors made in the pass have memory of a pool that only graphs use. Constants such as
rotary angles stay alive with the function that was captured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import release_memory
from .offload import HostCopies
from .streaming import BlockStream

Inputs = Sequence[Tensor | None]


@dataclass(eq=False)
class Copies:
    """What copies between host and device during a pass, on streams of its own."""

    stream: BlockStream | None = None
    offload: HostCopies | None = None

    def blocks(self) -> tuple[int, ...]:
        """Numbers of the streamed blocks that are in the buffers, as the host sees it."""
        return () if self.stream is None else self.stream.blocks

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Makes the copies part of a capture on the current stream: their streams leave it and come back to it.

        CUDA lets captured work wait only for work of the same capture.
        """
        for each in (self.stream, self.offload):
            if each is not None:
                each.fork()
        yield
        for each in (self.stream, self.offload):
            if each is not None:
                each.join()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context for captures of a forward and a backward pass, of which nothing runs.

        It begins with the blocks that a backward pass leaves in the buffers, so that replays need no further copies.
        Afterwards, it restores what the host knows about the copies.
        """
        if self.stream is not None:
            self.stream.put(range(len(self.blocks())))
        blocks = self.blocks()
        try:
            yield
        finally:
            if self.offload is not None:
                self.offload.fork()
            if self.stream is not None:
                self.stream.became(blocks)


class CapturePool:
    """The memory that all graphs share, and the stream that they are captured on.

    Sharing is safe because the passes of a micro-batch keep nothing for those of another.
    """

    def __init__(self, device: torch.device, copies: Copies) -> None:
        self.device, self.copies = device, copies
        self.held_bytes = 0  # device memory that graphs keep from other uses; torch does not count it as allocated
        self._stream: torch.cuda.Stream | None = None
        self._handle: Any = None

    def capture(self, compute: Callable[..., Tensor], inputs: Inputs) -> CapturedPasses:
        """Capture `compute` for inputs of these sizes: see `CapturedPasses`, also for what it raises."""
        gc.collect()  # not in a capture, which freeing some things would end
        before = self._reserved()
        passes = CapturedPasses(compute, inputs, self)
        self.held_bytes += max(0, self._reserved() - before)
        return passes

    def free(self) -> None:
        """Give the memory back. All graphs must have been dropped."""
        self.held_bytes, self._handle = 0, None
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
            torch._C._cuda_clearCublasWorkspaces()  # those of the stream lie in the pool
        release_memory()

    @contextmanager
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Captures what the context's work enqueues, also from autograd's thread. Other threads may go on using CUDA.

        torch.cuda.graph would leave its stream current after a failed capture.
        """
        torch.cuda.synchronize(self.device)
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                with self.copies.captured():
                    yield
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed, and undo what torch itself would leave behind."""
        try:
            graph.capture_end()
        except (
            RuntimeError
        ):  # CUDA has ended the capture, but torch still gives out and counts the pool's memory for it
            native: Any = torch._C
            with suppress(RuntimeError, AttributeError):
                native._cuda_endAllocateToPool(torch.cuda.current_device(), self._handle)
                native._cuda_releasePool(torch.cuda.current_device(), self._handle)
            # The generator of random numbers would stay in the state of a capture. One that succeeds resets it.
            with suppress(RuntimeError):
                small, another = torch.zeros(1, device=self.device), torch.cuda.CUDAGraph()
                torch.cuda.synchronize(self.device)
                another.capture_begin(capture_error_mode="thread_local")
                small.add_(1)
                another.capture_end()

    def _reserved(self) -> int:
        """Device memory that torch holds, after it has given back what it caches: a pool can't use that."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)


class CapturedPass:
    """A CUDA graph of `run`."""

    def __init__(self, run: Callable[[], None], pool: CapturePool) -> None:
        self._copies, self._graph = pool.copies, torch.cuda.CUDAGraph()
        self._before = self._copies.blocks()
        with pool.capturing(self._graph):
            run()
        self._after = self._copies.blocks()

    def replay(self) -> None:
        """Enqueue the pass on the current stream."""
        stream, offload = self._copies.stream, self._copies.offload
        if stream is not None:
            stream.put(self._before)
        if offload is not None:
            offload.join()
        self._graph.replay()
        if stream is not None:
            stream.became(self._after)


class CapturedPasses:
    """The forward pass of `compute` and its backward pass as CUDA graphs, for inputs of the sizes of `inputs`.

    `compute` returns a tensor. Its backward pass adds gradients to those that the trained weights have now, which must
    keep their addresses. Capture after an ordinary pass of this size: libraries choose and compile kernels in it.

    Raises:
        RuntimeError: an operation can't be captured.
        OutOfMemoryError: the device's memory does not suffice.
    """

    def __init__(self, compute: Callable[..., Tensor], inputs: Inputs, pool: CapturePool) -> None:
        self._compute = compute  # keeps alive what the graphs read besides their inputs
        self._inputs = [None if each is None else each.detach().clone() for each in inputs]
        needed = [each is not None and each.requires_grad for each in inputs]
        outputs: list[Tensor] = []

        def forward() -> None:
            leaves = [
                None if each is None else each.detach().requires_grad_(is_needed)
                for each, is_needed in zip(self._inputs, needed, strict=True)
            ]
            outputs.append(compute(*leaves))

        def backward() -> None:
            torch.autograd.backward(outputs[0], self._gradient)

        with pool.copies.restored():
            self._forward = CapturedPass(forward, pool)
            self._output = outputs[0].detach()
            self._gradient = torch.zeros_like(self._output)
            self._backward = CapturedPass(backward, pool)

    def forward(self, inputs: Inputs) -> Tensor:
        """The output for these inputs."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._forward.replay()
        return self._output.clone()

    def backward(self, gradient: Tensor) -> None:
        """Adds the trained weights' gradients, from that of the last output."""
        self._gradient.copy_(gradient)
        self._backward.replay()
