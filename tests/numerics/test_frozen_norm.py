"""FrozenRMSNorm equals diffusers' RMSNorm, forward and backward, and saves less for the backward pass.

Queries or keys that are joined before the norm equal those that are joined after the rotation.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from trainer_core.precision.frozen_norm import FrozenRMSNorm
from trainer_core.qwen_image.query_key import joined, rotated


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


def joined_afterwards(
    prompt: Tensor, picture: Tensor, prompt_norm: FrozenRMSNorm, norm: FrozenRMSNorm, angles: Tensor
) -> Tensor:
    """Normalises and rotates one after the other, and joins the results."""
    parts = []
    for x, of_x, turns in (
        (prompt, prompt_norm, angles[: prompt.shape[1]]),
        (picture, norm, angles[prompt.shape[1] :]),
    ):
        pairs = torch.view_as_complex(of_x(x).float().unflatten(-1, (-1, 2)))
        parts.append(torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(-2).type_as(x))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joining_first_is_bit_equal(dtype: torch.dtype, batch: int) -> None:
    torch.manual_seed(0)
    both_norms = norms(dtype)[1], norms(dtype)[1]
    angles = torch.polar(torch.ones(60, 64), torch.randn(60, 64))
    prompt, picture = (torch.randn(batch, tokens, 4, 128, dtype=dtype, requires_grad=True) for tokens in (7, 53))
    gradient = torch.randn(batch, 4, 60, 128, dtype=dtype).transpose(1, 2)  # as attention may lay it out
    kept = gradient.clone()
    outcomes = []
    for join, turns in ((joined, torch.view_as_real(angles)), (joined_afterwards, angles)):
        both = join(prompt, picture, *both_norms, turns)
        outcomes.append((both, *torch.autograd.grad(both, (prompt, picture), gradient)))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*outcomes, strict=True))
    assert torch.equal(gradient, kept)


def test_real_numbers_rotate_like_complex_ones() -> None:
    """Compiled blocks use real ones."""
    torch.manual_seed(0)
    angles, x = torch.polar(torch.ones(60, 64), torch.randn(60, 64)), torch.randn(1, 60, 4, 128)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles.unsqueeze(1)
    expected = torch.view_as_real(pairs).flatten(-2)
    assert error(rotated(x, torch.view_as_real(angles)), expected.double()) < 1e-7
