"""Settings and fixtures of the GPU tests."""

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

# Each pytest process compiles; with torch's default, each would also start one compiler process per core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")


@pytest.fixture
def same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test computes attention with another kernel than the tests before it, and none with cuDNN's, whose backward
    pass adds in no fixed order."""
    from trainer_core.qwen_image import attention_choice

    kernels = tuple(each for each in attention_choice.CUDA if each.name == "efficient")
    monkeypatch.setattr(attention_choice, "CUDA", kernels)
    monkeypatch.setattr(attention_choice, "_of_process", {})
    monkeypatch.setattr(attention_choice, "_in_use", [attention_choice._Choices({}, lambda _: None)])
    monkeypatch.setattr(attention_choice, "installed_kernels", lambda **_: ())


@pytest.fixture
def in_fixed_order(same_attention: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Equal steps have equal bits, also with so many tokens that attention's backward pass divides them."""
    from trainer_core.qwen_image import attention_choice

    (kernel,) = attention_choice.CUDA

    def backward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.use_deterministic_algorithms(True)  # with warn_only, torch's attention adds in any order
        try:
            return kernel.backward(*tensors)
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

    monkeypatch.setattr(attention_choice, "CUDA", (dataclasses.replace(kernel, backward=backward),))
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(False)
