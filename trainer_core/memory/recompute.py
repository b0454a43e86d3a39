"""Gradient checkpointing: blocks keep only their inputs and recompute their activations in the backward pass.

Unlike torch.utils.checkpoint, this runs a block's second forward and its backward in one call. Streamed weights can
thus be held for exactly that call, and the inputs can be offloaded to host memory until then.
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
    """A gradient checkpointing function for diffusers, which calls it with a block and the block's inputs.

    The first block's inputs must require gradients, which `predict_velocity` sees to: autograd skips the backward pass
    of a function if none of its inputs requires one, even if an adapter inside it does.

    The first `num_blocks` of `blocks` are recomputed; the others keep their activations. With `dropout`, a block drops
    the same values in both forward passes.
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
        self._recomputed = set(blocks[:num_blocks])

    def __call__(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
        """Run a block and return its outputs."""
        if block not in self._recomputed:
            return block(*inputs)
        return _Recomputed.apply(self, block, *inputs)  # type: ignore[no-untyped-call]

    def keep(self, value: Any) -> Any:
        """Store an input of a block for its backward pass, in host memory if there is an offload."""
        return self.offload.keep(value) if self.offload is not None and isinstance(value, Tensor) else value

    def fetch(self, kept: Any) -> Any:
        """The input that was given to `keep`."""
        return self.offload.fetch(kept) if self.offload is not None and isinstance(kept, OffloadedTensor) else kept

    def held(self, block: nn.Module, *, forward: bool = False) -> AbstractContextManager[None]:
        """Keeps a streamed block's weights on the device while the context lasts. `forward`: in the forward pass."""
        return nullcontext() if self.stream is None else self.stream.held(block, forward=forward)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Recomputation, block: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # None instead of zeros as the gradient of an unused output
        ctx.how, ctx.block = how, block
        ctx.random = _RandomState.of(inputs) if how.dropout else None
        ctx.needed = [isinstance(each, Tensor) and each.requires_grad for each in inputs]
        ctx.kept = [how.keep(each) for each in inputs]
        if not how.dropout:
            with torch.no_grad():
                return block(*inputs)
        # With gradients, so that both passes run the same compiled code: another graph may draw in another order.
        with how.held(block, forward=True), torch.enable_grad():
            return tuple(each.detach() for each in block(*_inputs(inputs, ctx.needed)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Recomputation = ctx.how
        inputs = _inputs([how.fetch(each) for each in ctx.kept], ctx.needed)
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
            *(each.grad if needed else None for each, needed in zip(inputs, ctx.needed, strict=True)),
        )


def _inputs(values: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    """The inputs as leaves of a new graph. Those that are `needed` get gradients."""
    return [
        each.detach().requires_grad_() if is_needed else each for each, is_needed in zip(values, needed, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _RandomState:
    """A snapshot of torch's global generators, so that dropout drops the same values again."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> _RandomState:
        devices, states = get_device_states(*inputs)
        return cls(torch.get_rng_state(), devices, states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Sets the generators to the snapshot inside the context and restores them afterwards."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
