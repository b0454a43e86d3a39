"""Attention whose output can be kept: its backward pass then needs no second forward pass.

Shapes: N tokens of all pairs, M of them with queries, H heads, d head width. Tokens come first and heads second, as the
linear layers before and after attention have them, so nothing is transposed in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..memory.recompute import Kept
from .attention_choice import kernel_for
from .attention_kernels import Kernel


class OfPair(NamedTuple):
    """The tokens of one pair among those of all pairs: indices of its queries, and of its keys and values."""

    queries: Tensor
    keys: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: Sequence[OfPair] | None = None,
    kept: Kept | None = None,
    *,
    in_8_bits: bool = False,
) -> Tensor:
    """Attention of queries [1, M, H, d] over keys and values [1, N, H, d]: [1, M, H, d]. Each pair sees only itself.

    `pairs` None: all tokens belong to one pair. With `kept`, the first pass stores its results there, and a second
    pass returns them instead of computing them again. `in_8_bits`: queries, keys and values may be rounded to 8 bits.
    """
    kernel = kernel_for(query, key, in_8_bits=in_8_bits)
    if kernel is None:
        return _without_kernel(query, key, value, pairs)
    return _Attention.apply(query, key, value, pairs, kept, kernel)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pairs: Sequence[OfPair] | None,
        kept: Kept | None,
        kernel: Kernel,
    ) -> Tensor:
        if kept is not None and kept.attention:
            out, *lengths = kept.attention
        else:
            out, lengths = _forward(kernel, query, key, value, pairs)
            if kept is not None:
                kept.attention = out, *lengths
        ctx.save_for_backward(query, key, value, out, *lengths)
        ctx.pairs, ctx.kernel = pairs, kernel
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *lengths = ctx.saved_tensors
        kernel, gradient = ctx.kernel, gradients[0]
        if ctx.pairs is None:
            found = kernel.backward(gradient, query, key, value, out, lengths[0])
            return *found, None, None, None
        of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
        for pair, length in zip(ctx.pairs, lengths, strict=True):
            mine = (each[:, pair.queries] for each in (gradient, query))
            others = (each[:, pair.keys] for each in (key, value))
            found = kernel.backward(*mine, *others, out[:, pair.queries], length)
            of_query[:, pair.queries], of_key[:, pair.keys], of_value[:, pair.keys] = found
        return of_query, of_key, of_value, None, None, None


def _forward(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, pairs: Sequence[OfPair] | None
) -> tuple[Tensor, list[Tensor]]:
    if pairs is None:
        out, length = kernel.forward(query, key, value)
        return out, [length]
    whole, lengths = torch.empty_like(query), []
    for pair in pairs:
        whole[:, pair.queries], length = kernel.forward(query[:, pair.queries], key[:, pair.keys], value[:, pair.keys])
        lengths.append(length)
    return whole, lengths


def _without_kernel(query: Tensor, key: Tensor, value: Tensor, pairs: Sequence[OfPair] | None) -> Tensor:
    """Attention on devices whose kernels don't return the log-sum-exp, such as MPS."""
    if pairs is None:
        heads_first = (each.transpose(1, 2) for each in (query, key, value))
        return functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    parts = [_without_kernel(query[:, q], key[:, k], value[:, k], None) for q, k in pairs]
    order = torch.cat([pair.queries for pair in pairs]).argsort()
    return torch.cat(parts, dim=1)[:, order]
