"""FrozenRMSNorm equals diffusers' RMSNorm, forward and backward, and saves less for the backward pass."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from trainer_core.precision.frozen_norm import FrozenRMSNorm


def norms(dtype: torch.dtype) -> tuple[RMSNorm, FrozenRMSNorm]:
    theirs = RMSNorm(128, eps=1e-6).to(dtype).requires_grad_(False)
    theirs.weight.data.normal_(1.0, 0.2)
    return theirs, FrozenRMSNorm(theirs)


def with_gradient(norm: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(gradient)
    assert x.grad is not None
    return y.detach(), x.grad


def exact(norm: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient from the definition, in float64."""
    x = x.double().requires_grad_()
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    return y.detach(), torch.autograd.grad(y, x, gradient.double())[0]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-7), (torch.bfloat16, 3e-3)])
def test_the_result_and_its_gradient_are_diffusers(dtype: torch.dtype, rounding: float) -> None:
    torch.manual_seed(0)
    theirs, ours = norms(dtype)
    x, gradient = (3 * torch.randn(2, 100, 4, 128).to(dtype) for _ in range(2))
    found, expected = with_gradient(ours, x, gradient), exact(theirs, x, gradient)
    plain = with_gradient(theirs, x, gradient)
    for ours_is, theirs_is, truth in zip(found, plain, expected, strict=True):
        assert ours_is.dtype == dtype
        assert error(ours_is, truth) < rounding
        assert error(ours_is, truth) < 1.5 * error(theirs_is, truth)
        assert error(ours_is, theirs_is.double()) < rounding


def test_only_its_input_is_kept() -> None:
    theirs, ours = norms(torch.bfloat16)
    x = torch.randn(10, 4, 128, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[str, int] = {}
    for name, norm in (("theirs", theirs), ("ours", ours)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: (saved.append(each), each)[1], lambda each: each):  # noqa: B023
            norm(x)
        kept[name] = sum(each.nbytes for each in saved if each is not norm.weight)
    assert kept["ours"] <= x.nbytes + 4 * x.numel() // 128
    assert kept["theirs"] > 2 * kept["ours"]
