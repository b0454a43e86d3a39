"""Qwen-Image's double-stream block for frozen weights: equal to diffusers' block, with less work and less memory.

A block holds the layers of diffusers' block under the same names, so weight files and adapters fit both. It takes the
tokens of several pairs one after another, without padding. Attention stands between two compiled parts:

    queries, keys, values = before_attention(picture, prompt, modulation)
    picture, prompt = after_attention(picture, prompt, modulation, attention(queries, keys, values))

Shapes: T prompt tokens and L picture tokens of all pairs, N = T + L, D width, H heads, d head width, R rows of the
noise level's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..memory.recompute import Kept
from ..precision.frozen_linear import mlp, multiplies_8_bits, together
from .attention import OfPair, attend
from .query_key import define_operators, joined

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

_EPS = 1e-6  # of the layer norms


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What all blocks take besides picture and prompt.

    `time` [R, D] and `prompt_time` are the noise level's embeddings. `picture_rows` [L] and `prompt_rows` [T] tell
    which of them belongs to a token; None if there is only one. `angles` [N, d / 2, 2] are the cosines and sines of the
    positions, first of the prompts. `targets` tells which picture tokens are those of the targets. `pairs` and
    `last_pairs` tell which tokens see each other in a block and in the last one, which has queries for the targets
    only; None for a single pair.
    """

    time: Tensor
    prompt_time: Tensor
    angles: Tensor
    targets: slice | Tensor
    picture_rows: Tensor | None = None
    prompt_rows: Tensor | None = None
    pairs: Sequence[OfPair] | None = None
    last_pairs: Sequence[OfPair] | None = None


class EditBlock(nn.Module):
    """A block of a frozen transformer. Made from diffusers' block, whose layers it takes over."""

    # For the compiler: the methods that it compiles, with the dimension of each argument that counts tokens.
    COMPILED: ClassVar[dict[str, tuple[int | None, ...]]] = {
        "modulation": (None, None),
        "before_attention": (1, 1, None, None, 0, 0, 0),
        "after_attention": (1, 1, 1, None, None, 0, 0, None),
    }

    def __init__(self, block: QwenImageTransformerBlock) -> None:
        super().__init__()
        define_operators()
        self.heads = block.attn.heads
        self.img_mod, self.txt_mod = block.img_mod, block.txt_mod
        self.attn: Any = block.attn
        self.img_mlp, self.txt_mlp = block.img_mlp, block.txt_mlp

    def forward(
        self, picture: Tensor, prompt: Tensor, shared: Shared, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """picture [1, L, D] and prompt [1, T, D] after this block."""
        modulation, rows = self._modulation(shared, kept), (shared.picture_rows, shared.prompt_rows)
        query, key, value = self.before_attention(picture, prompt, *modulation, shared.angles, *rows)
        out = attend(query, key, value, shared.pairs, kept, in_8_bits=multiplies_8_bits(self.attn.to_v))
        return self.after_attention(picture, prompt, out, *modulation, *rows, kept is not None and kept.is_second)

    def _modulation(self, shared: Shared, kept: Kept | None) -> tuple[Tensor, Tensor]:
        """`modulation`, or what the first pass kept of it. Its layers are a third of the block's weights."""
        if kept is not None and kept.modulation:
            picture, prompt = kept.modulation
            return picture, prompt
        picture, prompt = self.modulation(shared.time, shared.prompt_time)
        weights = (*self.img_mod.parameters(), *self.txt_mod.parameters())
        if kept is not None and not any(each.requires_grad for each in weights):
            kept.modulation = picture, prompt
        return picture, prompt

    def modulation(self, time: Tensor, prompt_time: Tensor) -> tuple[Tensor, Tensor]:
        """The modulation [R, 6 D] of picture and prompt."""
        return self.img_mod(time), self.txt_mod(prompt_time)

    def before_attention(
        self,
        picture: Tensor,
        prompt: Tensor,
        modulation: Tensor,
        prompt_modulation: Tensor,
        angles: Tensor,
        picture_rows: Tensor | None,
        prompt_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [1, N, H, d]."""
        picture = _modulated(picture, modulation, 0, picture_rows)
        prompt = _modulated(prompt, prompt_modulation, 0, prompt_rows)
        attn = self.attn
        of_prompt = together((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), prompt)
        of_picture = together((attn.to_q, attn.to_k, attn.to_v), picture)
        (queries, keys, values) = zip(of_prompt, of_picture, strict=True)
        value = self._by_head(torch.cat(values, dim=1))
        return self._joined("q", *queries, angles), self._joined("k", *keys, angles), value

    def after_attention(
        self,
        picture: Tensor,
        prompt: Tensor,
        out: Tensor,
        modulation: Tensor,
        prompt_modulation: Tensor,
        picture_rows: Tensor | None,
        prompt_rows: Tensor | None,
        is_second: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor]:
        """picture [1, L, D] and prompt [1, T, D] after this block, from those before it and attention's output."""
        out, tokens = out.flatten(2), prompt.shape[1]
        picture = self._stream(
            picture,
            self.attn.to_out[0](out[:, tokens:]),
            self.img_mlp.net,
            modulation,
            picture_rows,
            is_second=is_second,
        )
        prompt = self._stream(
            prompt,
            self.attn.to_add_out(out[:, :tokens]),
            self.txt_mlp.net,
            prompt_modulation,
            prompt_rows,
            is_second=is_second,
        )
        return picture, prompt

    def _joined(self, which: Literal["q", "k"], prompt: Tensor, picture: Tensor, angles: Tensor) -> Tensor:
        """Queries or keys of prompt [1, T, D] and picture [1, L, D], normalised and rotated: [1, N, H, d]."""
        prompt_norm, norm = getattr(self.attn, f"norm_added_{which}"), getattr(self.attn, f"norm_{which}")
        return joined(self._by_head(prompt), self._by_head(picture), prompt_norm.weight, norm.weight, angles, norm.eps)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _stream(
        self, x: Tensor, out: Tensor, layers: Any, modulation: Tensor, rows: Tensor | None, *, is_second: bool
    ) -> Tensor:
        """x [1, tokens, D] plus attention's output and then plus the MLP's."""
        x = _plus(x, out, modulation, 2, rows)
        # A trained gate's gradient needs the last layer's output.
        gradient_only = is_second and not modulation.requires_grad
        out = mlp(layers[0].proj, layers[2], _modulated(x, modulation, 3, rows), gradient_only=gradient_only)
        return _plus(x, out, modulation, 5, rows)


class LastBlock(EditBlock):
    """The last block. Only the targets' tokens leave it: others have no queries, and the prompt ends in attention."""

    COMPILED: ClassVar = {}  # it would need code of its own, which takes longer to compile than it saves

    def __init__(self, block: QwenImageTransformerBlock) -> None:
        super().__init__(block)
        self.attn.to_add_out, self.txt_mlp = nn.Identity(), nn.Identity()

    def forward(
        self, picture: Tensor, prompt: Tensor, shared: Shared, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """The targets' tokens of the picture after this block, and the prompt as it was."""
        (modulation, prompt_modulation), rows = self._modulation(shared, kept), shared.picture_rows
        attn = self.attn
        inner = _modulated(picture, modulation, 0, rows)
        inner_prompt = _modulated(prompt, prompt_modulation, 0, shared.prompt_rows)
        value = self._by_head(torch.cat([attn.add_v_proj(inner_prompt), attn.to_v(inner)], dim=1))
        key = self._joined("k", attn.add_k_proj(inner_prompt), attn.to_k(inner), shared.angles)
        of_targets = attn.to_q(inner[:, shared.targets])
        angles = shared.angles[prompt.shape[1] :][shared.targets]
        query = self._joined("q", of_targets[:, :0], of_targets, angles)
        out = attend(query, key, value, shared.last_pairs, kept, in_8_bits=multiplies_8_bits(attn.to_v)).flatten(2)
        targets, rows = picture[:, shared.targets], None if rows is None else rows[shared.targets]
        is_second = kept is not None and kept.is_second
        return self._stream(
            targets, attn.to_out[0](out), self.img_mlp.net, modulation, rows, is_second=is_second
        ), prompt


def _modulated(x: Tensor, modulation: Tensor, first: int, rows: Tensor | None) -> Tensor:
    """The layer norm of x [1, tokens, D], scaled and shifted.

    `modulation` [R, 6 D] has shift and scale in its parts `first` and `first` + 1. `rows` [tokens] tells the row of a
    token, or is None if R is 1.
    """
    normed = functional.layer_norm(x, x.shape[-1:], eps=_EPS)
    shifts, scales = modulation.chunk(6, dim=-1)[first : first + 2]
    if rows is not None:
        shifts = _Rows.apply(shifts, rows)  # type: ignore[no-untyped-call]
    return _times(normed, 1 + scales, rows) + shifts


def _plus(x: Tensor, change: Tensor, modulation: Tensor, gate: int, rows: Tensor | None) -> Tensor:
    """x [1, tokens, D] plus a change of the same shape, times the gate in this part of `modulation` [R, 6 D]."""
    return x + _times(change, modulation.chunk(6, dim=-1)[gate], rows)


def _times(x: Tensor, factors: Tensor, rows: Tensor | None) -> Tensor:
    """x [1, tokens, D] times the factors [R, D] of each token's row."""
    if rows is None:
        return x * factors
    return _TimesRow.apply(x, factors, rows)  # type: ignore[no-untyped-call]


class _Rows(torch.autograd.Function):
    """`values[rows]`. The gradients of a row are added up in a fixed order, which compiled indexing doesn't."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(values)
        return values[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return _row_sums(gradients[0], rows, ctx.count), None


class _TimesRow(torch.autograd.Function):
    """Keeps no factors per token for the backward pass, which would be as large as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, factors, rows)
        return x * factors[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, rows = ctx.saved_tensors
        of_factors = None if x is None else _row_sums((gradients[0] * x).squeeze(0), rows, len(factors))
        return gradients[0] * factors[rows], of_factors, None


def _row_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The sums [count, D] of those values [tokens, D] that belong to each row."""
    is_row = rows == torch.arange(count, device=rows.device).unsqueeze(1)
    return is_row.to(values.dtype) @ values
