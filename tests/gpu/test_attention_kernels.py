"""Attention's kernels on a card: torch's, and those of the packages that are installed here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tests.support.random_base import relative_error
from trainer_core.qwen_image import attention_choice
from trainer_core.qwen_image.attention import OfPair, attend
from trainer_core.qwen_image.attention_kernels import CUDA, Kernel, no_pass
from trainer_core.qwen_image.attention_packages import installed_kernels

CARD = torch.device("cuda", 0)
HEADS, WIDTH = 3, 128
PACKAGES = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn",
    "sageattention": "sageattention",
}


def right_passes(kernel: Kernel) -> Kernel:
    return attention_choice._tested(kernel, CARD, torch.bfloat16, WIDTH)


def usable() -> list[Kernel]:
    """All kernels of this machine, without the passes that don't run or are wrong."""
    return [
        right_passes(each) for each in (*CUDA, *installed_kernels(in_8_bits=False), *installed_kernels(in_8_bits=True))
    ]


def inputs(queries: int, keys: int) -> list[Tensor]:
    """A gradient, queries, keys and values in bfloat16."""
    draws = torch.Generator().manual_seed(queries)
    sizes = (queries, queries, keys, keys)
    return [torch.randn(1, each, HEADS, WIDTH, generator=draws).to(CARD, torch.bfloat16) for each in sizes]


@pytest.fixture
def in_use() -> Iterator[dict[attention_choice.Place, Kernel | None]]:
    """The choices of a run, which ends with the test."""
    with attention_choice.kept_choices({}, lambda _: None):
        yield attention_choice._in_use[-1].kernels


def test_torch_has_a_kernel_here() -> None:
    """Which ones depends on the card and on torch, but the flash kernel is for all since RTX 30."""
    found = {each.name: (each.forward is not no_pass, each.backward is not no_pass) for each in map(right_passes, CUDA)}
    assert found["flash"] == found["efficient"] == (True, True)
    assert found["cudnn"][0] == found["cudnn"][1]


@pytest.mark.parametrize("name", PACKAGES)
def test_an_installed_package_is_right_here(name: str) -> None:
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    found = {each.name: each for each in usable()}
    if name not in found:
        pytest.skip("the package can't be imported, or is too old; the log says why")
    assert found[name].forward is not no_pass


@pytest.mark.parametrize("queries", [1, 77, 256, 1000])
def test_each_backward_pass_fits_each_forward_pass(queries: int) -> None:
    """Also where the number of queries is no multiple of what a kernel fills up to."""
    gradient, *tensors = inputs(queries, 333)
    out, _, *wanted = attention_choice._by_definition(gradient, *tensors)
    kernels = usable()
    for first in (each for each in kernels if each.forward is not no_pass):
        found, length = first.forward(*tensors)
        bound = 0.02 if first.is_exact else 0.1
        assert length.shape == (1, HEADS, queries) and length.dtype == torch.float32 and length.is_contiguous()
        assert relative_error(found.float(), out.float()) < bound, first.name
        for second in (each for each in kernels if each.backward is not no_pass):
            gradients = second.backward(gradient, *tensors, found, length)
            for each, other in zip(gradients, wanted, strict=True):
                error = relative_error(each.float(), other.float())
                assert error < bound, (first.name, second.name, error)


def test_a_chosen_kernel_computes_pairs_of_unequal_size(in_use: dict[attention_choice.Place, Kernel | None]) -> None:
    gradient, *tensors = inputs(300, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(CARD)
    pairs = [OfPair(each, each) for each in (order[:120], order[120:])]
    leaves = [each.requires_grad_() for each in tensors]
    out = attend(*leaves, pairs)
    found = torch.autograd.grad(out, leaves, gradient)
    assert in_use and all(kernel and "/" in kernel.name for kernel in in_use.values())
    for pair in pairs:
        mine = [each[:, pair.queries].detach() for each in (gradient, *tensors)]
        right, _, *wanted = attention_choice._by_definition(*mine)
        assert relative_error(out[:, pair.queries].detach().float(), right.float()) < 0.02
        for each, other in zip(found, wanted, strict=True):
            assert relative_error(each[:, pair.queries].float(), other.float()) < 0.02


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_the_timing_chooses_and_a_run_keeps_it(in_8_bits: bool) -> None:
    _, query, key, _ = inputs(500, 600)
    kept: list[dict[str, str]] = []
    state = torch.cuda.get_rng_state(CARD)
    with attention_choice.kept_choices({}, kept.append):
        kernel = attention_choice.kernel_for(query, key, in_8_bits=in_8_bits)
    assert kernel is not None and kept == [{"512x1024" + " 8bit" * in_8_bits: kernel.name}]
    assert torch.equal(torch.cuda.get_rng_state(CARD), state)
    other = {"512x1024" + " 8bit" * in_8_bits: "efficient/flash"}
    with attention_choice.kept_choices(other, kept.append):
        again = attention_choice.kernel_for(query, key, in_8_bits=in_8_bits)
    assert again is not None and again.name == "efficient/flash" and len(kept) == 1


def test_kernels_run_in_cuda_graphs() -> None:
    """A replay with other inputs gives what ordinary calls give for them."""
    gradient, *tensors = inputs(300, 300)
    others = inputs(300, 300)[0], *inputs(301, 300)[1:]
    others = [each[:, :300] for each in others]
    for kernel in (each for each in usable() if each.forward is not no_pass):
        backward = CUDA[0].backward if kernel.backward is no_pass else kernel.backward
        graph, given = torch.cuda.CUDAGraph(), [each.clone() for each in (gradient, *tensors)]

        def passes(given: list[Tensor] = given, kernel: Kernel = kernel, backward=backward) -> list[Tensor]:
            out, length = kernel.forward(*given[1:])
            return [out, *backward(given[0], *given[1:], out, length)]

        for _ in range(2):
            passes()  # compiles
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = passes()
        for each, values in zip(given, others, strict=True):
            each.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        for each, other in zip(found, passes(), strict=True):
            assert relative_error(each.float(), other.float()) < 1e-2, kernel.name
        del graph
