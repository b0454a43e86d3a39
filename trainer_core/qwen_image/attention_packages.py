"""Attention kernels of other packages, if they are installed. They are imported only where a card may use them.

The functions and their arguments are those of flash-attn 2.7 and 2.8, of FlashAttention 3 (`flash_attn_interface`),
flash-attn-4 4.0 and sageattention 2.2. Other versions may differ: whoever uses these kernels tests them first.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..text import reason_of
from .attention_kernels import Kernel, no_pass

_LOG = logging.getLogger(__name__)


@cache
def installed_kernels(*, in_8_bits: bool) -> tuple[Kernel, ...]:
    """The kernels of the packages that can be imported, exact ones or those that round to 8 bits.

    Logs once why an installed package can't be used.
    """
    found = (_imported(name, *module) for name, module in (_IN_8_BITS if in_8_bits else _EXACT).items())
    return tuple(kernel for kernel in found if kernel is not None)


def _imported(name: str, module: str, kernel_of: Callable[[str, Any], Kernel]) -> Kernel | None:
    try:
        return kernel_of(name, import_module(module))
    except Exception as error:  # noqa: BLE001 - a broken package raises almost anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not (missing and f"{module}.".startswith(f"{missing}.")):  # else it is not installed
            _LOG.info("%s can't be used for attention (%s: %s).", name, type(error).__name__, reason_of(error))
        return None


def _flash_attention_2(name: str, module: Any) -> Kernel:
    others: dict[str, Any] = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        how = {"dropout_p": 0.0, "softmax_scale": _scale(query), "causal": False, "return_softmax": False, **others}
        out, length, *_ = module._flash_attn_forward(query, key, value, **how)
        return out, length

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = _like_inputs(*tensors)
        how = {"dropout_p": 0.0, "softmax_scale": _scale(tensors[1]), "causal": False, "deterministic": False, **others}
        module._flash_attn_backward(*tensors, *found, **how)
        return found

    return Kernel(name, forward, backward)


def _flash_attention_3(name: str, module: Any) -> Kernel:
    """Its older and newer versions have the same arguments up to `causal`, but other defaults and names."""

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        unused, causal = [None] * 20, False  # new keys, lengths, pages, rotary angles, scales of fp8
        out, length, *_ = module._flash_attn_forward(query, key, value, *unused, _scale(query), causal)
        return out, length

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found, unused, causal = _like_inputs(*tensors), [None] * 6, False  # lengths
        module._flash_attn_backward(*tensors, *unused, *found, _scale(tensors[1]), causal)
        return found

    return Kernel(name, forward, backward)


def _flash_attention_4(name: str, module: Any) -> Kernel:
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, length, *_ = module._flash_attn_fwd(query, key, value, softmax_scale=_scale(query), return_lse=True)
        return out, length

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient, query, key, value, out, length = tensors
        how = {"softmax_scale": _scale(query), "causal": False}
        of_query, of_key, of_value, *_ = module._flash_attn_bwd(query, key, value, out, gradient, length, **how)
        return of_query, of_key, of_value

    return Kernel(name, forward, backward)


def _sage_attention(name: str, module: Any) -> Kernel:
    if "return_lse" not in inspect.signature(module.sageattn).parameters:  # 1.0 accepts and ignores it
        raise NotImplementedError("version 2 is needed: older ones don't return the log-sum-exp")

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return module.sageattn(query, key, value, tensor_layout="NHD", is_causal=False, return_lse=True)

    return Kernel(name, forward, no_pass, is_exact=False)


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


def _like_inputs(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of the inputs, from the arguments of a backward pass."""
    of_query, of_key, of_value = (torch.empty_like(each) for each in tensors[1:4])
    return of_query, of_key, of_value


_EXACT = {
    "flash-attn 2": ("flash_attn.flash_attn_interface", _flash_attention_2),
    "flash-attn 3": ("flash_attn_interface", _flash_attention_3),
    "flash-attn 4": ("flash_attn.cute.interface", _flash_attention_4),
}
_IN_8_BITS = {"sageattention": ("sageattention", _sage_attention)}
