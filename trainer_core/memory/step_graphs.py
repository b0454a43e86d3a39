"""Runs the forward and backward passes of training as CUDA graphs, which take the host next to no time.

With small pictures, launching thousands of kernels takes longer than running them. Inductor has CUDA graphs too. They
would be one for each compiled part of each block, would copy the inputs of each, and could not hold what is not
compiled. Here, one graph is a whole pass, and the parts in it may be compiled or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..device import aligned, release_memory
from .capture import CapturedPasses, CapturePool

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
MOST_GRAPHS = 16  # sizes of inputs with graphs. Each needs memory for its kernels' parameters


def allocator_allows_graphs() -> bool:
    """Whether torch uses its own allocator. CUDA's gives back no memory of graphs when something else needs it, and
    runs out of it only while a graph runs."""
    return torch.cuda.get_allocator_backend() == "native"


class StepGraphs:
    """Replays the passes of micro-batches whose size came before; runs the others as usual. Off until `start`.

    A size is captured when it comes the second time, so an ordinary pass has prepared all libraries for it, and a size
    that comes once costs nothing. When there are graphs of `most` sizes, later ones get none: frequent sizes come
    twice first. Replacing graphs would cost more than it saves if a data set's many sizes take turns.

    `weights` are the trained ones, which have the gradients. While graphs exist, these gradients are parts of one
    tensor, because graphs need constant addresses. Both kinds of passes give the same numbers and can be mixed.
    """

    def __init__(
        self,
        weights: Collection[nn.Parameter],
        pool: CapturePool,
        *,
        most: int = MOST_GRAPHS,
    ) -> None:
        self._weights, self._pool, self._most = list(weights), pool, most
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, CapturedPasses] = {}
        self._places: list[tuple[nn.Parameter, Tensor]] = []  # where graphs find the gradient of each weight
        self.is_active = False

    @property
    def held_bytes(self) -> int:
        """Device memory that graphs keep from other uses. torch does not count it as allocated."""
        return self._pool.held_bytes

    def __call__(self, kind: Hashable, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """`compute(*inputs)`. One that requires a gradient must be among the inputs; it gets none from a graph.

        `kind` tells all that `compute` depends on besides the inputs and weights.
        """
        if not torch.is_grad_enabled():
            return compute(*inputs)
        key = (kind, *(None if each is None else (each.shape, each.dtype) for each in inputs))
        is_new = key not in self._seen
        self._seen.add(key)
        if not self.is_active or is_new:
            return compute(*inputs)
        if key not in self._graphs and len(self._graphs) < self._most:
            self._add(key, compute, inputs)
        passes = self._graphs.get(key)
        if passes is None:
            return compute(*inputs)
        self._place_gradients()
        return _Replayed.apply(passes, *inputs)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Capture and replay from now on."""
        self.is_active = True

    def stop(self, reason: str = "") -> None:
        """Run all passes as usual from now on. Logs the reason, if there is one."""
        self.is_active = False
        self.clear()
        if reason:
            _LOG.warning("Steps run without CUDA graphs from now on, because %s.", reason)

    def forget(self) -> None:
        """Free all graphs, and capture sizes only when they come twice from now on: passes run in another way now."""
        self.clear()
        self._seen.clear()

    def clear(self) -> None:
        """Free all graphs and their memory. Sizes that came before are captured again when they come next."""
        if not self._places:
            return
        self._graphs.clear()
        self._places = []
        self._pool.free()

    def attempt(self, compute: Callable[[], T], clean_up: Callable[[], None]) -> T:
        """Call `compute`, which runs passes, and return its result.

        If memory runs out, the graphs are freed, and `compute` is called again after `clean_up`.
        """
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        clean_up()
        self.stop("a step needs the VRAM that graphs hold")
        return compute()

    def _add(self, key: Hashable, compute: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> None:
        """Capture the passes for inputs of this size. If that fails, log the reason and run them as usual."""
        without = [weight for weight in self._weights if weight.grad is None]
        try:
            self._place_gradients()
            versions = [place._version for _, place in self._places]
            self._graphs[key] = self._pool.capture(compute, inputs)
            self._leave_out_unused(versions)
        except torch.OutOfMemoryError:
            reason = "graphs need more VRAM than is free"
        except Exception as error:  # noqa: BLE001 - libraries raise many kinds
            first_line = next(iter(str(error).splitlines()), "")
            reason = f"a pass can't be captured ({type(error).__name__}: {first_line[:200]})"
        else:
            return
        for weight in without:
            weight.grad = None
        if self._graphs:
            self._most = len(self._graphs)
            release_memory()
            text = "CUDA graphs are kept for %d sizes of pictures and prompts, because %s."
            _LOG.info(text, self._most, reason)
        else:
            self.stop(reason)

    def _place_gradients(self) -> None:
        """Move the weights' gradients to their places, with the values that they have now."""
        if not self._places:
            self._places = list(zip(self._weights, _parts_of_one(self._weights), strict=True))
        strays = [(weight, place) for weight, place in self._places if weight.grad is not place]
        empty = [place for weight, place in strays if weight.grad is None]
        filled = [(place, weight.grad) for weight, place in strays if weight.grad is not None]
        if empty:
            torch._foreach_zero_(empty)
        if filled:
            torch._foreach_copy_([place for place, _ in filled], [gradient for _, gradient in filled])
        for weight, place in strays:
            weight.grad = place

    def _leave_out_unused(self, versions: Sequence[int]) -> None:
        """Weights that the network does not use keep None as their gradient: optimizers would let zeros decay them.

        Capturing has changed the versions of the other weights' places, though not their values.
        """
        pairs = list(zip(self._places, versions, strict=True))
        self._places = [place for place, version in pairs if place[1]._version != version]
        for (weight, place), version in pairs:
            if place._version == version:
                weight.grad = None


def _parts_of_one(like: Collection[Tensor]) -> list[Tensor]:
    """Tensors of the same shapes and types in one allocation."""
    sizes = [aligned(each.nbytes) for each in like]
    device = next(iter(like)).device
    pieces = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    parts = [piece[: each.nbytes].view(each.dtype).view(each.shape) for piece, each in zip(pieces, like, strict=True)]
    return [part.data for part in parts]  # with a version of its own


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: CapturedPasses, *inputs: Tensor | None) -> Tensor:
        ctx.passes, ctx.count = passes, len(inputs)
        return passes.forward(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.passes.backward(gradients[0])
        return (None,) * (1 + ctx.count)
