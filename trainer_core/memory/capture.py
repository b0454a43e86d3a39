"""Captures a forward and a backward pass as CUDA graphs, with the copies of streamed weights and offloaded tensors.

Capturing records the kernels that a pass would launch, with the addresses of their memory, and runs none of them. A
replay launches all of them at once. The addresses stay valid: trained and frozen weights never move, inputs and the
output are copied to and from tensors that belong to the graph, and tensors made in the pass have memory that only
graphs use. Constants such as rotary angles stay alive with the function that was captured.

That memory is a pool of torch's own allocator. With cudaMallocAsync, it is the driver's (`graph_memory.py`): replays
allocate and free, and the replay of a forward pass leaves allocated what its backward pass will free. All tensors of a
capture must then be freed in a capture too. CUDA does not let torch free one outside if its graph does not hold it at
that moment, and torch ends the process at such an error.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..device import release_memory
from .capture_guard import noted_capture
from .graph_memory import (
    Allocations,
    allocations,
    free_at,
    raise_if_too_large,
    reserved_bytes,
    take_memory,
    trim,
    uses_graph_memory,
)
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
        copying = [each for each in (self.stream, self.offload) if each is not None]
        for each in copying:
            each.fork()
        try:
            yield
        except BaseException:
            for each in copying:
                with suppress(RuntimeError):  # CUDA may have ended the capture
                    each.join()
            raise
        for each in copying:
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
        self.unfreed: set[int] = set()  # addresses that replays have allocated in the driver's memory and not yet freed
        self._pool_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._handle: Any = None
        # Kept until `free`, also those of captures that failed later: with a graph, newer versions of torch drop what
        # cuBLAS holds for the stream, which other graphs use.
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @property
    def held_bytes(self) -> int:
        """Device memory that graphs keep from other uses. torch does not count it as allocated."""
        return reserved_bytes(self.device) if self._graphs and uses_graph_memory() else self._pool_bytes

    def capture(self, compute: Callable[..., Tensor], inputs: Inputs, like: Tensor) -> CapturedPasses:
        """Capture `compute` for inputs of these sizes: see `CapturedPasses`, also for what it raises."""
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):
            _prepare_libraries(self.device)
        gc.collect()  # not in a capture, which freeing some things would end
        before = self._reserved()
        with noted_capture() if uses_graph_memory() else nullcontext():
            passes = CapturedPasses(compute, inputs, like, self)
        self._pool_bytes += max(0, self._reserved() - before)
        return passes

    def free(self) -> None:
        """Drop all graphs and give their memory back."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
            free_at(self.unfreed, self._stream)
            torch._C._cuda_clearCublasWorkspaces()  # those of the stream are of no use now
        self._pool_bytes, self._handle = 0, None
        self.unfreed.clear()
        self._graphs.clear()
        release_memory()
        if self._stream is not None and uses_graph_memory():
            trim(self.device)

    @contextmanager
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[torch.cuda.Stream]:
        """Captures what the context's work enqueues, also from autograd's thread. Other threads may go on using CUDA.

        Gives the stream. torch.cuda.graph would leave its stream current after a failed capture.
        """
        assert self._stream is not None
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                with self.copies.captured(), _without_waits():
                    yield self._stream
                graph.capture_end()
            except BaseException as error:
                _free_locals(error)
                self._abandon(graph)
                raise
            finally:
                self._graphs.append(graph)

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
    """A CUDA graph of `run`. `earlier`: what a graph before it leaves allocated."""

    def __init__(self, run: Callable[[], None], pool: CapturePool, earlier: Sequence[int] = ()) -> None:
        self._copies, self._graph = pool.copies, torch.cuda.CUDAGraph()
        self._before = self._copies.blocks()
        with pool.capturing(self._graph) as stream:
            run()
            self.memory = allocations(stream, earlier) if uses_graph_memory() else Allocations()
        self._after = self._copies.blocks()

    def replay(self) -> None:
        """Enqueue the pass on the current stream.

        Raises:
            OutOfMemoryError: the driver lacks memory for the graph. Nothing of it has run.
        """
        stream, offload = self._copies.stream, self._copies.offload
        if stream is not None:
            stream.put(self._before)
        if offload is not None:
            offload.join()
        try:
            self._graph.replay()
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        if stream is not None:
            stream.became(self._after)

    def take_memory(self, stream: torch.cuda.Stream) -> None:
        """As `graph_memory.take_memory`."""
        take_memory(self._graph, stream)


class CapturedPasses:
    """The forward pass of `compute` and its backward pass as CUDA graphs, for inputs of the sizes of `inputs`.

    `compute` returns a tensor like `like`. Its backward pass adds gradients to those that the trained weights have now,
    which must keep their addresses. Capture after an ordinary pass of this size: libraries choose and compile kernels
    in it.

    Raises:
        RuntimeError: an operation can't be captured.
        OutOfMemoryError: the device's memory does not suffice.
    """

    def __init__(self, compute: Callable[..., Tensor], inputs: Inputs, like: Tensor, pool: CapturePool) -> None:
        self._compute = compute  # keeps alive what the graphs read besides their inputs
        self._pool = pool
        self._inputs = [None if each is None else each.detach().clone() for each in inputs]
        self._output, self._gradient = (torch.zeros_like(like, device=pool.device) for _ in range(2))
        needed = [each is not None and each.requires_grad for each in inputs]
        outputs: list[Tensor] = []

        def forward() -> None:
            leaves = [
                None if each is None else each.detach().requires_grad_(is_needed)
                for each, is_needed in zip(self._inputs, needed, strict=True)
            ]
            output = compute(*leaves)
            self._output.copy_(output.detach())
            outputs.append(output)

        def backward() -> None:
            torch.autograd.backward(outputs.pop(), self._gradient)

        with pool.copies.restored():
            try:
                self._forward = CapturedPass(forward, pool)
                self._backward = CapturedPass(backward, pool, self._forward.memory.unfreed)
            except BaseException:
                if outputs:  # they must be freed in a capture
                    with suppress(RuntimeError):
                        CapturedPass(outputs.clear, pool)
                raise
        if uses_graph_memory():
            self._take_memory()

    def _take_memory(self) -> None:
        """Get the driver's memory for both passes now. Nothing has changed yet that another pass could not do again.

        That of the backward pass must lie beside what the forward pass leaves, so the forward pass must have run.
        """
        device = self._pool.device
        raise_if_too_large(self._forward.memory.needed_bytes + self._backward.memory.needed_bytes, device)
        stream = torch.cuda.current_stream(device)
        self._forward.replay()
        try:
            self._backward.take_memory(stream)
        finally:
            free_at(self._forward.memory.unfreed, stream)

    def forward(self, inputs: Inputs) -> Tensor:
        """The output for these inputs."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._forward.replay()
        self._pool.unfreed.update(self._forward.memory.unfreed)
        return self._output.clone()

    def backward(self, gradient: Tensor) -> None:
        """Adds the trained weights' gradients, from that of the last output."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        self._pool.unfreed.difference_update(self._forward.memory.unfreed)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[], object]) -> Tensor:
        ctx.run = run
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.run()
        return gradients[0], None


def _prepare_libraries(device: torch.device) -> None:
    """Let cuBLAS allocate what it keeps for the current stream, in this thread and in autograd's: not in a capture."""
    x = torch.zeros(2, 2, device=device)

    def product() -> Tensor:
        return nn.functional.linear(x, x, x[0])

    with torch.enable_grad():
        product()
        _InBackward.apply(x.clone().requires_grad_(), product).sum().backward()  # type: ignore[no-untyped-call]


@contextmanager
def _without_waits() -> Iterator[None]:
    """Lets torch refuse what waits for the device. CUDA would end a capture, without freeing its tensors."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not everything that waits is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _free_locals(error: BaseException) -> None:
    """Free the tensors that the functions refer to which the error has ended."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
