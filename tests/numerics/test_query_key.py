"""Queries and keys equal those of diffusers' RMSNorm and rotary embedding in both passes, and keep only inputs."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor

from tests.support.random_base import relative_error
from trainer_core.qwen_image.query_key import define_operators, joined

EPS = 1e-6
PROMPT, PICTURE, HEADS, WIDTH = 7, 53, 4, 128


def norms(dtype: torch.dtype) -> tuple[RMSNorm, RMSNorm]:
    """diffusers' norms of the prompt's and the pictures' queries."""
    made = tuple(RMSNorm(WIDTH, eps=EPS).to(dtype).requires_grad_(False) for _ in range(2))
    for norm in made:
        norm.weight.data.normal_(1.0, 0.2)
    return made  # type: ignore[return-value]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt, picture, complex angles, and a gradient of the result, laid out as attention may have it."""
    torch.manual_seed(0)
    prompt, picture = (
        (3 * torch.randn(1, tokens, HEADS, WIDTH)).to(dtype).requires_grad_() for tokens in (PROMPT, PICTURE)
    )
    angles = torch.polar(torch.ones(PROMPT + PICTURE, WIDTH // 2), torch.randn(PROMPT + PICTURE, WIDTH // 2))
    return prompt, picture, angles, torch.randn(1, HEADS, PROMPT + PICTURE, WIDTH).to(dtype).transpose(1, 2)


def ours(prompt: Tensor, picture: Tensor, angles: Tensor, both: tuple[RMSNorm, RMSNorm]) -> Tensor:
    return joined(prompt, picture, both[0].weight, both[1].weight, torch.view_as_real(angles), EPS)


def theirs(prompt: Tensor, picture: Tensor, angles: Tensor, both: tuple[RMSNorm, RMSNorm]) -> Tensor:
    """diffusers normalises and rotates each part, and joins them."""
    parts = (prompt, angles[:PROMPT], both[0]), (picture, angles[PROMPT:], both[1])
    turned = [apply_rotary_emb_qwen(norm(x), turns, use_real=False) for x, turns, norm in parts]
    return torch.cat(turned, dim=1)  # type: ignore[arg-type]


def exact(prompt: Tensor, picture: Tensor, angles: Tensor, both: tuple[RMSNorm, RMSNorm]) -> Tensor:
    """The definition, in float64."""
    turned = []
    for x, turns, norm in ((prompt, angles[:PROMPT], both[0]), (picture, angles[PROMPT:], both[1])):
        y = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight.double()
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns.to(torch.complex128).unsqueeze(1)
        turned.append(torch.view_as_real(pairs).flatten(-2))
    return torch.cat(turned, dim=1)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 3e-7), (torch.bfloat16, 4e-3)])
def test_result_and_gradients_are_diffusers(dtype: torch.dtype, rounding: float) -> None:
    prompt, picture, angles, gradient = inputs(dtype)
    both = norms(dtype)
    outcomes = []
    for compute in (ours, theirs, exact):
        result = compute(prompt, picture, angles, both)
        outcomes.append((result, *torch.autograd.grad(result, (prompt, picture), gradient.to(result.dtype))))
    for found, plain, truth in zip(*outcomes, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, truth) < min(rounding, 1.5 * relative_error(plain, truth))


def test_only_inputs_are_kept() -> None:
    prompt, picture, angles, _ = inputs(torch.bfloat16)
    both, saved = norms(torch.bfloat16), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        ours(prompt, picture, angles, both)
    known = {each.data_ptr() for each in (prompt, picture, angles, both[0].weight, both[1].weight)}
    assert {each.data_ptr() for each in saved} == known


@pytest.mark.parametrize("prompt_tokens", [PROMPT, 0])
def test_compiled_code_calls_operators_with_the_same_result(prompt_tokens: int) -> None:
    """With no prompt too: the last block has queries for the pictures only."""
    define_operators()
    prompt, picture, angles, gradient = inputs(torch.float32)
    prompt, angles = prompt[:, :prompt_tokens], angles[PROMPT - prompt_tokens :]
    both, gradient = norms(torch.float32), gradient[:, PROMPT - prompt_tokens :]
    outcomes = []
    for compute in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        result = compute(prompt, picture, angles, both)
        outcomes.append((result, *torch.autograd.grad(result, (picture,), gradient)))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
