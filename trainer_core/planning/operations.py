"""Floating point operations of the transformer's blocks."""

from __future__ import annotations

LINEAR_AGAIN = 2 / 3  # fraction of the linear layers' operations that a recomputed block does again


def block_operations(width: int, tokens: int) -> tuple[int, int]:
    """Floating point operations of a block's forward pass: of its linear layers, and of attention.

    The adapter is left out: about a percent.
    """
    return 2 * tokens * 12 * width * width, 4 * tokens**2 * width


def training_operations(
    width: int, tokens: int, num_blocks: int, recomputed: int, *, attention_again: bool = False
) -> int:
    """Floating point operations of a forward and backward pass through the blocks.

    A linear layer counts once forward, once for the gradient of its input (frozen weights have no gradient), and once
    more if recomputed, without the MLP's second layer. Attention counts 2 products forward and 4 backward, without
    FlashAttention's own recomputation, and 2 more if it is computed again.
    """
    linear, attention = block_operations(width, tokens)
    again = round(LINEAR_AGAIN * linear) + attention_again * attention
    return num_blocks * (2 * linear + 3 * attention) + recomputed * again
