"""Blocks that keep only their inputs and compute the rest again in the backward pass.

torch.utils.checkpoint does the same; here forward, second forward and backward of a block are one call each, so that
its streamed weights can be held for just as long, and its inputs can wait in host memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .offload import HostCopies, OffloadedTensor
from .streaming import BlockStream


class Recomputation:
    """Runs the transformer's blocks as diffusers' gradient checkpointing function: called with a block and its inputs.

    The first `num_blocks` of `blocks` are computed again, the others keep what they computed. Under dropout a block
    draws the same numbers both times.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        num_blocks: int,
        *,
        stream: BlockStream | None = None,
        offload: HostCopies | None = None,
        dropout: bool = False,
    ) -> None:
        self.stream, self.offload, self.dropout = stream, offload, dropout
        self._again = set(blocks[:num_blocks])
        self._anchor = torch.zeros((), requires_grad=True)  # a block without inputs that need gradients has some inside

    def __call__(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
        """The block's outputs."""
        if block not in self._again:
            return block(*inputs)
        return _Recomputed.apply(self, block, self._anchor, *inputs)  # type: ignore[no-untyped-call]

    def keep(self, value: Any) -> Any:
        """An input of a block until its backward pass."""
        return self.offload.keep(value) if self.offload is not None and isinstance(value, Tensor) else value

    def fetch(self, kept: Any) -> Any:
        """What `keep` was given."""
        return self.offload.fetch(kept) if self.offload is not None and isinstance(kept, OffloadedTensor) else kept

    def held(self, block: nn.Module) -> AbstractContextManager[None]:
        """While the block's weights have to stay."""
        return nullcontext() if self.stream is None else self.stream.held(block)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Recomputation, block: nn.Module, _anchor: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # of an output that nobody reads there is no gradient
        ctx.how, ctx.block = how, block
        ctx.random = _RandomState.of(inputs) if how.dropout else None
        ctx.needed = [isinstance(each, Tensor) and each.requires_grad for each in inputs]
        ctx.kept = [how.keep(each) for each in inputs]
        with torch.no_grad():
            return block(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Recomputation = ctx.how
        inputs = [how.fetch(each) for each in ctx.kept]
        inputs = [
            each.detach().requires_grad_() if needed else each for each, needed in zip(inputs, ctx.needed, strict=True)
        ]
        ctx.kept = None
        with how.held(ctx.block):
            with torch.enable_grad(), nullcontext() if ctx.random is None else ctx.random.again():
                outputs = ctx.block(*inputs)
            pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
            pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return (
            None,
            None,
            None,
            *(each.grad if needed else None for each, needed in zip(inputs, ctx.needed, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class _RandomState:
    """Torch's process-wide generators at a moment, so that a dropout drops the same again."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> _RandomState:
        devices, states = get_device_states(*inputs)
        return cls(torch.get_rng_state(), devices, states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """As then inside, as before afterwards."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
