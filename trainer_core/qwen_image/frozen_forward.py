"""The frozen transformer's forward, which computes and keeps less than diffusers' in training, with the same result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..precision.frozen_norm import FrozenRMSNorm

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


def optimise_frozen_forward(transformer: QwenImageTransformer2DModel) -> None:
    """Replace parts of a frozen network in place; the output stays the same.

    - The last block's text stream after attention is removed: nothing uses its output.
    - The norms of queries and keys no longer keep float32 copies of their inputs.
    - The modulation no longer builds a scale and a shift for every token.
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
    """Predicted velocity [B, L, c] of the picture tokens [B, L, c]: diffusers' forward, with one difference.

    The sinusoids of sigma [B] (float32) are computed in float32, as ComfyUI does. diffusers rounds sigma and the
    frequencies to bfloat16 first, which changes most of the sinusoids: 1000 sigma is wrong by up to 2.

    `prompt` is [B, T, p], its mask [B, T] is True for real tokens. `shapes` are frames, height and width in tokens of
    the target and of each reference.
    """
    batch, tokens = picture.shape[:2]
    picture, prompt = transformer.img_in(picture), transformer.txt_in(transformer.txt_norm(prompt))
    is_reference = None
    if transformer.zero_cond_t:
        sigma_B = torch.cat([sigma_B, torch.zeros_like(sigma_B)])
        frames, height, width = shapes[0]
        is_reference = torch.ones(batch, tokens, dtype=torch.int, device=picture.device)
        is_reference[:, : frames * height * width] = 0
    time = transformer.time_text_embed(sigma_B, picture)
    rotary = transformer.pos_embed([list(shapes)], max_txt_seq_len=prompt.shape[1], device=picture.device)
    recomputes = torch.is_grad_enabled() and transformer.gradient_checkpointing
    for block in transformer.transformer_blocks:
        inputs = (picture, prompt, prompt_mask, time, rotary, None, is_reference)
        again = transformer._gradient_checkpointing_func if recomputes else None
        prompt, picture = again(block, *inputs) if again else block(*inputs)
    return transformer.proj_out(transformer.norm_out(picture, time[:batch]))


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
    """diffusers' QwenDoubleStreamAttnProcessor2_0 with `_rotated`: attention over the tokens of prompt and pictures."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B, L, d] for the picture tokens and the prompt tokens. The mask [B, L] is True for real tokens."""
        mask, picture, prompt = None, hidden_states, encoder_hidden_states
        if encoder_hidden_states_mask is not None:
            ones = encoder_hidden_states_mask.new_ones(picture.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, ones], dim=1)[:, None, None]
        heads = (-1, attn.inner_dim // attn.heads)
        angles, prompt_angles = image_rotary_emb
        query = _rotated(attn.norm_q(attn.to_q(picture).unflatten(-1, heads)), angles)
        key = _rotated(attn.norm_k(attn.to_k(picture).unflatten(-1, heads)), angles)
        prompt_query = _rotated(attn.norm_added_q(attn.add_q_proj(prompt).unflatten(-1, heads)), prompt_angles)
        prompt_key = _rotated(attn.norm_added_k(attn.add_k_proj(prompt).unflatten(-1, heads)), prompt_angles)
        values = [attn.add_v_proj(prompt), attn.to_v(picture)]
        out = functional.scaled_dot_product_attention(
            torch.cat([prompt_query, query], dim=1).transpose(1, 2),
            torch.cat([prompt_key, key], dim=1).transpose(1, 2),
            torch.cat(values, dim=1).unflatten(-1, heads).transpose(1, 2),
            attn_mask=mask,
        )
        of_prompt, of_picture = out.transpose(1, 2).flatten(2).split([prompt.shape[1], picture.shape[1]], dim=1)
        return attn.to_out[0](of_picture.contiguous()), attn.to_add_out(of_prompt.contiguous())


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, L, heads, d] with neighbouring elements rotated as complex numbers, in float32.

    `angles` are complex [L, d / 2], or their real and imaginary parts [L, d / 2, 2], which the compiler can use.
    """
    if angles.is_complex():
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles.unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2).type_as(x)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles.unsqueeze(1).unbind(-1)
    turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)
