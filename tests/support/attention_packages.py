"""Stand-ins for packages with attention kernels: the functions and arguments that they have, computed in float32."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

NAMES = (
    *("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute", "flash_attn.cute.interface"),
    *("flash_attn_interface", "sageattention"),
)
USED: list[str] = []  # the stand-ins that were called


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp for tensors [B, N, H, d]."""
    scores = scale * torch.einsum("bmhd,bnhd->bhmn", query.float(), key.float())
    out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), value.float())
    return out.to(query.dtype), scores.logsumexp(-1)


def gradients(gradient: Tensor, inputs: tuple[Tensor, ...], length: Tensor, scale: float) -> tuple[Tensor, ...]:
    """By autograd. Needs the log-sum-exp, as the packages' kernels do."""
    leaves = [each.detach().float().requires_grad_() for each in inputs]
    with torch.enable_grad():
        out, right = attention(*leaves, scale)
    found = torch.autograd.grad(out, leaves, gradient.float() * (right - length).exp().mT.unsqueeze(-1).detach())
    return tuple(each.to(inputs[0].dtype) for each in found)


def flash_attention_2() -> dict[str, Any]:
    """Of flash-attn 2.8."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        USED.append("flash-attn 2")
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and not return_softmax
        return *attention(q, k, v, softmax_scale), torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        USED.append("flash-attn 2")
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and rng_state is None and not deterministic and out.shape == q.shape
        fill((dq, dk, dv), gradients(dout, (q, k, v), softmax_lse, softmax_scale))
        return torch.empty(0)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_attention_3() -> dict[str, Any]:
    """As of 2026, with defaults and separate windows."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        USED.append("flash-attn 3")
        assert out_ is None and v_descale is None and causal is False
        return *attention(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        USED.append("flash-attn 3")
        assert max_seqlen_k is None and is_causal is False
        fill((dq, dk, dv), gradients(dout, (q, k, v), softmax_lse, softmax_scale))
        return torch.empty(0)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_attention_3_of_2025() -> dict[str, Any]:
    """Without defaults, with one pair of windows, and with more results."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        USED.append("flash-attn 3")
        assert out is None and v_descale is None and causal is False
        return attention(q, k, v, softmax_scale)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        USED.append("flash-attn 3")
        fill((dq, dk, dv), gradients(dout, (q, k, v), softmax_lse, softmax_scale))
        return dq, dk, dv, torch.empty(0)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_attention_4() -> dict[str, Any]:
    """Of flash-attn-4 4.0.0b36; its other arguments are keywords that are left out."""

    def _flash_attn_fwd(q, k, v, qv=None, softmax_scale=None, causal=False, return_lse=False, out=None, lse=None):
        USED.append("flash-attn 4")
        found, length = attention(q, k, v, softmax_scale)
        return found, length if return_lse else None, None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
        USED.append("flash-attn 4")
        return gradients(dout, (q, k, v), lse, softmax_scale)

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


def sage_attention() -> dict[str, Any]:
    """Of sageattention 2.2: it rounds queries and keys, less their mean, to int8."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        USED.append("sageattention")
        assert tensor_layout == "NHD" and return_lse and not kwargs
        mean = k.float().mean(1, keepdim=True)
        scale = q.shape[-1] ** -0.5
        out, length = attention(rounded(q), rounded(k.float() - mean), v, scale)
        return out.to(q.dtype), length + scale * (q.float() * mean).sum(-1).mT

    return {"sageattn": sageattn}


def sage_attention_1() -> dict[str, Any]:
    """Of sageattention 1.0: it has no log-sum-exp, and ignores arguments that it doesn't know."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        raise AssertionError("its results are of no use")

    return {"sageattn": sageattn}


def rounded(x: Tensor) -> Tensor:
    """x [B, N, H, d] rounded to int8 with a scale per token and head."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def fill(memory: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Write gradients where the caller wants them."""
    for each, values in zip(memory, found, strict=True):
        each.copy_(values)


MODULES = {
    "flash-attn 2": ("flash_attn.flash_attn_interface", flash_attention_2),
    "flash-attn 3": ("flash_attn_interface", flash_attention_3),
    "flash-attn 4": ("flash_attn.cute.interface", flash_attention_4),
    "sageattention": ("sageattention", sage_attention),
}


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Let exactly these modules, with their functions, be the packages that are installed."""
    USED.clear()
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    for name, functions in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:end])) or ModuleType(".".join(parts[:end]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(sys.modules[name]).update(functions)
