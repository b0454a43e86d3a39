"""Gradient checkpointing: blocks keep little and recompute their other activations in the backward pass.

A block keeps its inputs, which a second forward pass needs, and attention's output: it is as small as an input, and
attention is what takes longest to compute again. Unlike torch.utils.checkpoint, this runs a block's second forward and
its backward in one call. Streamed weights can thus be held for exactly that call, and what is kept can be offloaded to
host memory until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .offload import HostCopies
from .streaming import BlockStream


class Kept:
    """What a block's first forward pass leaves for its second one, in the backward pass.

    `attention` has attention's output and the log-sum-exp of each pair; empty before the first pass, and if attention
    is to be computed again. `modulation` has that of picture and prompt; empty before the first pass, and if it is
    trained. `is_second`: the block is in its second pass. Nothing reads its output there, only its gradients count.
    """

    def __init__(
        self, attention: Sequence[Tensor] = (), modulation: Sequence[Tensor] = (), *, is_second: bool = False
    ) -> None:
        self.attention, self.modulation, self.is_second = tuple(attention), tuple(modulation), is_second


class Recomputation:
    """A gradient checkpointing function for the transformer, which calls it with a block and the block's inputs.

    The first block's inputs must require gradients, which `predict_velocity` sees to: autograd skips the backward pass
    of a function if none of its inputs requires one, even if an adapter inside it does.

    The first `num_blocks` of `blocks` are recomputed; the others keep their activations. `keeps_attention`: they don't
    compute attention again. With `dropout`, a block drops the same values in both forward passes.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        num_blocks: int,
        *,
        stream: BlockStream | None = None,
        offload: HostCopies | None = None,
        keeps_attention: bool = True,
        dropout: bool = False,
    ) -> None:
        self.stream, self.offload, self.keeps_attention, self.dropout = stream, offload, keeps_attention, dropout
        self._recomputed = set(blocks[:num_blocks])

    def __call__(self, block: nn.Module, picture: Tensor, prompt: Tensor, shared: object) -> tuple[Tensor, ...]:
        """Run a block and return its outputs. `shared` is passed on to it."""
        if block not in self._recomputed:
            return block(picture, prompt, shared)
        return _Recomputed.apply(self, block, picture, prompt, shared)  # type: ignore[no-untyped-call]

    def keep(self, tensor: Tensor) -> Any:
        """Store a tensor for a block's backward pass, in host memory if there is an offload."""
        return self.offload.keep(tensor) if self.offload is not None else tensor

    def fetch(self, kept: Any) -> Tensor:
        """The tensor that was given to `keep`."""
        return self.offload.fetch(kept) if self.offload is not None else kept

    def held(self, block: nn.Module, *, forward: bool = False) -> AbstractContextManager[None]:
        """Keeps a streamed block's weights on the device while the context lasts. `forward`: in the forward pass."""
        return nullcontext() if self.stream is None else self.stream.held(block, forward=forward)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Recomputation, block: nn.Module, picture: Tensor, prompt: Tensor, shared: object
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # None instead of zeros as the gradient of an unused output
        ctx.how, ctx.block, ctx.shared, inputs = how, block, shared, (picture, prompt)
        ctx.random = _RandomState.of(inputs) if how.dropout else None
        ctx.needed = [each.requires_grad for each in inputs]
        ctx.kept = [how.keep(each) for each in inputs]
        kept = Kept()
        if how.dropout:
            # With gradients, so that both passes run the same compiled code: another graph may draw in another order.
            with how.held(block, forward=True), torch.enable_grad():
                outputs = tuple(each.detach() for each in block(*_inputs(inputs, ctx.needed), shared, kept))
        else:
            with torch.no_grad():
                outputs = block(picture, prompt, shared, kept)
        ctx.attention = [how.keep(each) for each in kept.attention] if how.keeps_attention else []
        ctx.modulation = kept.modulation  # a few numbers per pair
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Recomputation = ctx.how
        # Last kept is first fetched: host memory is a stack.
        attention = [how.fetch(each) for each in reversed(ctx.attention)][::-1]
        inputs = _inputs([how.fetch(each) for each in reversed(ctx.kept)][::-1], ctx.needed)
        ctx.kept = ctx.attention = None
        # With dropout, the second pass must draw in the order of the first one.
        kept = Kept(attention, ctx.modulation, is_second=not how.dropout)
        with how.held(ctx.block):
            with torch.enable_grad(), nullcontext() if ctx.random is None else ctx.random.again():
                outputs = ctx.block(*inputs, ctx.shared, kept)
            pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
            pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return (
            None,
            None,
            *(each.grad if needed else None for each, needed in zip(inputs, ctx.needed, strict=True)),
            None,
        )


def _inputs(values: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
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
    def of(cls, inputs: Sequence[Tensor]) -> _RandomState:
        devices, states = get_device_states(*inputs)
        return cls(torch.get_rng_state(), devices, states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Sets the generators to the snapshot inside the context and restores them afterwards."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
