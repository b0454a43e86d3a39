"""Guidance's two passes as one batch equal two passes, and no sampling step reads a number from the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.narrow import NARROW, fill
from trainer_core.memory.compilation import Compilation
from trainer_core.qwen_image import sampling
from trainer_core.qwen_image.base_model import empty_transformer
from trainer_core.qwen_image.frozen_forward import optimise_frozen_forward
from trainer_core.qwen_image.latents import pack, unpack
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.qwen_image.sampling import QWEN_SCHEDULE, guides_together, sample_latents
from trainer_core.qwen_image.types import Condition


def network(dtype: torch.dtype, *, zero_cond_t: bool = False) -> nn.Module:
    made = empty_transformer({**NARROW, "zero_cond_t": zero_cond_t})
    rotary = made.pos_embed
    made.to_empty(device="cpu")
    fill(made, 0)
    made.pos_embed = rotary
    optimise_frozen_forward(made)
    follow_comfyui(made)
    return made.to(dtype).eval().requires_grad_(False)


def condition(tokens: int, seed: int) -> Condition:
    """Two references, the second with odd sides, and a prompt."""
    generator = torch.Generator().manual_seed(0)
    references = tuple(torch.randn(1, 16, *size, generator=generator) for size in ((12, 8), (7, 9)))
    prompt = torch.randn(1, tokens, 128, generator=torch.Generator().manual_seed(seed))
    return Condition(references, prompt)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of each forward pass."""
    counts: list[int] = []
    one, several = sampling.predict_velocity, sampling.predict_velocities
    monkeypatch.setattr(sampling, "predict_velocity", lambda *given: counts.append(1) or one(*given))
    monkeypatch.setattr(sampling, "predict_velocities", lambda *given: counts.append(len(given[1])) or several(*given))
    return counts


def drawn(transformer: Any, prompt: Condition, negative: Condition, **changes: Any) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(5))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULE)
    settings = {"scheduler": scheduler, "num_steps": 3, "guidance": 4.0, "negative": negative, **changes}
    return sample_latents(transformer, noise, prompt, **settings)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4), (4, 9)])
def test_one_batch_equals_two_passes(
    dtype: torch.dtype, tolerance: float, zero_cond_t: bool, lengths: tuple[int, int], passes: list[int]
) -> None:
    transformer = network(dtype, zero_cond_t=zero_cond_t)
    prompt, negative = condition(lengths[0], 1), condition(lengths[1], 2)
    apart = drawn(transformer, prompt, negative, together=False)
    together = drawn(transformer, prompt, negative, together=True)
    assert passes == [1] * 6 + [2] * 3
    unguided = drawn(transformer, prompt, negative, guidance=1.0)
    assert (apart - unguided).norm() > 0.05 * apart.norm()  # guidance has an effect
    assert (together - apart).norm() < tolerance * apart.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance_is_computed_in_float32_as_in_comfyui(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines' formula in float64, with velocities in the network's dtype. In bfloat16 it would be 1e-3 off."""
    transformer, predicted = network(dtype), list[Tensor]()
    predict = sampling.predict_velocity
    monkeypatch.setattr(sampling, "predict_velocity", lambda *given: predicted.append(predict(*given)) or predicted[-1])
    found = drawn(transformer, condition(9, 1), condition(4, 2), num_steps=1, together=False)
    assert [each.dtype for each in predicted] == [dtype] * 2 and found.dtype == torch.float32
    first, negative = (pack(each.double()) for each in predicted)
    combined = negative + 4.0 * (first - negative)
    guided = combined * first.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found.double(), noise - unpack(guided, 12, 8), rtol=1e-5, atol=1e-5)


def test_a_batch_that_does_not_fit_after_all_becomes_two_passes(
    monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    transformer = network(torch.float32)
    prompt, negative = condition(9, 1), condition(4, 2)
    apart = drawn(transformer, prompt, negative, together=False)
    passes.clear()

    def too_large(*_: Any) -> list[Tensor]:
        passes.append(2)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "predict_velocities", too_large)
    assert torch.equal(drawn(transformer, prompt, negative, together=True), apart)
    assert passes == [2] + [1] * 6


def test_a_batch_is_used_on_cuda_with_few_tokens_enough_memory_and_uncompiled_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnCuda:
        """Stands in for latents [1, 16, 12, 8] on a GPU."""

        device, shape = torch.device("cuda"), (1, 16, 12, 8)

    transformer, tokens = network(torch.float32), 9 + 24 + 24 + 20
    free = 2 * tokens * sampling.FORWARD_WIDTHS * transformer.inner_dim * 4
    for bound, memory, expected in ((tokens, 2 * free, True), (tokens - 1, 2 * free, False), (tokens, free, False)):
        monkeypatch.setattr(sampling, "TOGETHER_TOKENS", bound)
        monkeypatch.setattr(sampling, "free_bytes", lambda _, memory=memory: memory)
        assert guides_together(transformer, condition(9, 1), OnCuda()) is expected
        assert not guides_together(transformer, condition(9, 1), torch.randn(1, 16, 12, 8))
        compilation = Compilation(list(transformer.transformer_blocks))
        compilation.start()
        assert not guides_together(transformer, condition(9, 1), OnCuda())
        compilation.stop("the test goes on")


class Reads(TorchDispatchMode):
    """Counts reads of a number from a tensor, for which CUDA would wait."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("together", [False, True])
def test_no_step_reads_a_number(together: bool) -> None:
    transformer, counts = network(torch.float32), []
    for steps in (2, 5):
        with Reads() as reads:
            drawn(transformer, condition(9, 1), condition(4, 2), num_steps=steps, together=together)
        counts.append(reads.number)
    assert counts[0] == counts[1]
