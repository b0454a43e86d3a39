"""Kernels of a profiled step on CUDA are linked to what launched them, also where the compiler made them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.support.kernel_groups import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    CODES,
    OPTIMIZER,
    PRODUCTS,
    PRODUCTS_THIN,
    busy_time,
    group_of,
    profiled,
)

RANK = 16
CUDA = torch.device("cuda")


@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_have_the_groups_of_what_launched_them(compiled: bool) -> None:
    x = torch.randn(512, 1024, device=CUDA, dtype=torch.bfloat16)
    codes = torch.randint(-127, 127, (1024, 1024), device=CUDA, dtype=torch.int8)
    thin = torch.nn.Parameter(torch.randn(RANK, 1024, device=CUDA, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([thin], fused=True)

    def forward(x: Tensor) -> Tensor:
        y = functional.linear(x, codes.to(x.dtype) * 0.01) + functional.linear(x, thin).sum()
        heads = y.view(1, 512, 8, 128).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads)

    run = torch.compile(forward) if compiled else forward

    def step() -> None:
        run(x).float().square().mean().backward()
        optimizer.step()
        torch.cuda.synchronize()

    step()
    found = profiled(step, CUDA)
    groups = {group_of(each, RANK) for each in found}
    assert {ATTENTION_FORWARD, ATTENTION_BACKWARD, PRODUCTS, PRODUCTS_THIN, CODES, OPTIMIZER} <= groups, found
    assert 0 < busy_time(found) <= sum(each.busy for each in found) + 1
