"""Measures a device for a fraction of a second: products, attention and copies of a run's sizes."""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..device import seconds_on_device
from ..errors import TrainerError
from ..precision import eight_bit
from ..qwen_image.attention import attend
from .network import NetworkSize
from .operations import block_operations

_COPIED = 2**26  # bytes of the measured copy


def rates(network: NetworkSize, tokens: int, device: torch.device) -> tuple[float, float, float, float]:
    """Seconds per operation of a matrix product and of attention forward and backward, and per byte of a copy.

    Attention has the kernels that a run would choose. If other packages have some, the first call tests them.
    """
    dtype = torch.bfloat16 if network.element_bytes == 2 else torch.float32
    width, attention = network.width, block_operations(network.width, tokens)[1]
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(width, 4 * width, device=device, dtype=dtype)
    q, k, v = (
        torch.randn(1, tokens, network.heads, width // network.heads, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    attended = attend(q, k, v)
    grad = torch.randn_like(attended)
    host = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    return (
        seconds_on_device(device, lambda: x @ weight) / (8 * tokens * width**2),
        seconds_on_device(device, lambda: attend(q, k, v)) / attention,
        seconds_on_device(device, lambda: torch.autograd.grad(attended, (q, k, v), grad, retain_graph=True))
        / (2 * attention),
        seconds_on_device(device, lambda: there.copy_(host, non_blocking=True)) / _COPIED,
    )


def eight_bit_rate(model: ModelConfig, network: NetworkSize, tokens: int, device: torch.device) -> float | None:
    """Seconds per operation of an MLP layer's two 8-bit products, with all that belongs to them.

    None if the settings exclude them, or the device has none.
    """
    if model.matmul_precision == "bf16" or network.precision == "none":
        return None
    try:
        eight_bit.check_device(device, "An 8-bit product")
    except TrainerError:
        return None
    dtype = torch.bfloat16 if network.element_bytes == 2 else torch.float32
    codes = eight_bit.FP8 if network.precision == "fp8-quanto" and eight_bit.multiplies_fp8(device) else torch.int8
    x, gradient, rows = (
        torch.randn(count, wide, device=device, dtype=dtype)
        for count, wide in ((tokens, network.width), (tokens, 4 * network.width), (4 * network.width, network.width))
    )
    weight = eight_bit.quantised(rows, codes)
    calls = (lambda: eight_bit.product(x, weight, None)), (lambda: eight_bit.input_gradient(gradient, weight))
    return sum(seconds_on_device(device, call) for call in calls) / (16 * tokens * network.width**2)
