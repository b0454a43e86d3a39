"""The frozen transformer's forward, which computes and keeps less than diffusers' in training, with the same result."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..precision.frozen_norm import FrozenRMSNorm, input_gradient, inverse_root
from .positions import follows_comfyui

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


def optimise_frozen_forward(transformer: QwenImageTransformer2DModel) -> None:
    """Replace parts of a frozen network in place; the output stays the same.

    - The last block's text stream after attention is removed: nothing uses its output.
    - The norms of queries and keys no longer keep float32 copies of their inputs.
    - The modulation no longer builds a scale and a shift for every token.
    - Queries of prompt and picture are joined before they are normalised and rotated, and so are keys, so that an
      uncompiled block launches fewer kernels.
    - The rotary embedding also takes real numbers, which compiled blocks need.
    """
    last = transformer.transformer_blocks[-1]
    last.attn.to_add_out, last.txt_norm2, last.txt_mlp = (torch.nn.Identity() for _ in range(3))
    for block in transformer.transformer_blocks:
        block._modulate = _modulated
        block.attn.processor = _JointAttention()
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(block.attn, name, FrozenRMSNorm(getattr(block.attn, name)))


def predict_tokens(
    transformer: QwenImageTransformer2DModel,
    picture: Tensor,
    sigma_B: Tensor,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    shapes: Sequence[tuple[int, int, int]],
) -> Tensor:
    """Predicted velocity [B, L, c] of the picture tokens [B, L, c]: diffusers' forward.

    If the transformer follows ComfyUI, the sinusoids of sigma [B] (float32) are computed in float32. Otherwise sigma
    and their frequencies are rounded as in diffusers' pipelines. In bfloat16 that changes most of the sinusoids:
    1000 sigma is wrong by up to 4.

    `prompt` is [B, T, p], its mask [B, T] is True for real tokens. `shapes` are frames, height and width in tokens of
    the target and of each reference.
    """
    batch, tokens = picture.shape[:2]
    picture, prompt = transformer.img_in(picture), transformer.txt_in(transformer.txt_norm(prompt))
    is_reference = None
    if not follows_comfyui(transformer):
        sigma_B = rounded_by_pipelines(sigma_B, picture.dtype)
    if transformer.zero_cond_t:
        sigma_B = torch.cat([sigma_B, torch.zeros_like(sigma_B)])
        frames, height, width = shapes[0]
        is_reference = torch.ones(batch, tokens, dtype=torch.int, device=picture.device)
        is_reference[:, : frames * height * width] = 0
    time = transformer.time_text_embed(sigma_B, picture)
    rotary = transformer.pos_embed([list(shapes)], max_txt_seq_len=prompt.shape[1], device=picture.device)
    rotary = joined_angles(*rotary)
    recomputes = torch.is_grad_enabled() and transformer.gradient_checkpointing
    for block in transformer.transformer_blocks:
        inputs = (picture, prompt, prompt_mask, time, rotary, None, is_reference)
        again = transformer._gradient_checkpointing_func if recomputes else None
        prompt, picture = again(block, *inputs) if again else block(*inputs)
    return transformer.proj_out(transformer.norm_out(picture, time[:batch]))


def rounded_by_pipelines(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level [B] that diffusers' pipelines give to a network of `dtype`.

    They round 1000 sigma to `dtype`, divide by 1000 and round again. Because the result has the network's dtype,
    diffusers' time projection also rounds its frequencies to it.
    """
    return (sigma_B * 1000).to(dtype) / 1000


def _modulated(x: Tensor, parameters: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B, L, d] scaled and shifted, and the gate: the same as diffusers' `_modulate`.

    `parameters` [B, 3 d] are shift, scale and gate. With `index` [B, L] (in a 2511) they are [2 B, 3 d]: tokens with
    index 0 use the first half, the others the second.

    A function rather than a method, so that compiled blocks share its code.
    """
    if index is None:
        shift, scale, gate = parameters.unsqueeze(1).chunk(3, dim=-1)
        return x * (1 + scale) + shift, gate
    first, second = parameters.chunk(2)
    (x_first, gate_first), (x_second, gate_second) = _modulated(x, first), _modulated(x, second)
    is_first = (index == 0).unsqueeze(-1)
    return torch.where(is_first, x_first, x_second), torch.where(is_first, gate_first, gate_second)


class _JointAttention:
    """diffusers' QwenDoubleStreamAttnProcessor2_0 with `_joined`: attention over the tokens of prompt and pictures."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, ...],
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B, L, d] for the picture tokens and the prompt tokens. The mask [B, L] is True for real tokens.

        The angles are those of `joined_angles`, or the pair that diffusers' own forward gives.
        """
        mask, picture, prompt = None, hidden_states, encoder_hidden_states
        if encoder_hidden_states_mask is not None:
            ones = encoder_hidden_states_mask.new_ones(picture.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, ones], dim=1)[:, None, None]
        heads = (-1, attn.inner_dim // attn.heads)
        (angles,) = image_rotary_emb if len(image_rotary_emb) == 1 else joined_angles(*image_rotary_emb)
        prompt_query, prompt_key = (each(prompt).unflatten(-1, heads) for each in (attn.add_q_proj, attn.add_k_proj))
        query, key = (each(picture).unflatten(-1, heads) for each in (attn.to_q, attn.to_k))
        query = _joined(prompt_query, query, attn.norm_added_q, attn.norm_q, angles)
        key = _joined(prompt_key, key, attn.norm_added_k, attn.norm_k, angles)
        values = [attn.add_v_proj(prompt), attn.to_v(picture)]
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            torch.cat(values, dim=1).unflatten(-1, heads).transpose(1, 2),
            attn_mask=mask,
        )
        of_prompt, of_picture = out.transpose(1, 2).flatten(2).split([prompt.shape[1], picture.shape[1]], dim=1)
        return attn.to_out[0](of_picture.contiguous()), attn.to_add_out(of_prompt.contiguous())


# diffusers reads this signature in every forward pass, and Python would derive it anew each time.
_JointAttention.__call__.__signature__ = inspect.signature(_JointAttention.__call__)  # type: ignore[attr-defined]


def joined_angles(picture: Tensor, prompt: Tensor) -> tuple[Tensor]:
    """The rotary angles that a block takes: those of the prompt tokens, then those of the picture tokens."""
    return (torch.cat([prompt, picture]),)


def _joined(prompt: Tensor, picture: Tensor, prompt_norm: FrozenRMSNorm, norm: FrozenRMSNorm, angles: Tensor) -> Tensor:
    """Queries or keys of prompt [B, T, heads, d] and picture [B, L, heads, d] as one tensor, normalised and rotated.

    `angles` are complex [T + L, d / 2], or their real and imaginary parts [T + L, d / 2, 2], for the compiler.
    """
    if angles.is_complex():
        weights = prompt_norm.weight, norm.weight
        return _NormalisedAndRotated.apply(prompt, picture, *weights, norm.eps, angles)  # type: ignore[no-untyped-call]
    tokens = prompt.shape[1]
    parts = [_rotated(prompt_norm(prompt), angles[:tokens]), _rotated(norm(picture), angles[tokens:])]
    return torch.cat(parts, dim=1)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, L, heads, d] with neighbouring elements rotated as complex numbers, in float32. `angles` [L, d / 2, 2]."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles.unsqueeze(1).unbind(-1)
    turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


class _NormalisedAndRotated(torch.autograd.Function):
    """`_joined` with complex angles, in as few operations as possible. Never compiled, so it may write in place."""

    @staticmethod
    def forward(
        ctx: Any,
        prompt: Tensor,
        picture: Tensor,
        prompt_weight: Tensor,
        weight: Tensor,
        eps: float,
        angles: Tensor,
    ) -> Tensor:
        tokens, x = prompt.shape[1], torch.cat([prompt, picture], dim=1)
        inverse = inverse_root(x, eps)
        ctx.save_for_backward(x, inverse, prompt_weight, weight, angles)
        ctx.tokens = tokens
        y = torch.mul(x, inverse, out=torch.empty_like(x))
        y[:, :tokens].mul_(prompt_weight)
        y[:, tokens:].mul_(weight)
        turned = torch.view_as_complex(y.float().unflatten(-1, (-1, 2))).mul_(angles.unsqueeze(1))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, prompt_weight, weight, angles = ctx.saved_tensors
        parts = gradients[0].float().contiguous().unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(parts) * angles.conj().unsqueeze(1)
        gradient = torch.view_as_real(turned).flatten(-2).to(x.dtype)
        gradient[:, : ctx.tokens].mul_(prompt_weight)
        gradient[:, ctx.tokens :].mul_(weight)
        gradient = input_gradient(gradient.float(), x, inverse)
        return (
            gradient[:, : ctx.tokens].contiguous(),
            gradient[:, ctx.tokens :].contiguous(),
            *(None,) * 4,
        )
