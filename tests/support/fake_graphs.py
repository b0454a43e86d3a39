"""CUDA graphs without CUDA: what was captured runs as usual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _leaf(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.detach().requires_grad_(given.requires_grad)


class FakePasses:
    """Runs the passes that were captured."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute, self.replays = compute, 0

    def forward(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        self.replays += 1
        with torch.enable_grad():
            self.out = self.compute(*map(_leaf, inputs))
        return self.out.detach()

    def backward(self, gradient: Tensor) -> None:
        self.out.backward(gradient)


class FakePool:
    """Captures without CUDA. As with CUDA, capturing runs the function but changes no value. Raises `error` if given,
    in the capture of this number."""

    def __init__(self, error: Exception | None = None, *, at: int = 0) -> None:
        self.error, self.at = error, at
        self.captured: list[FakePasses] = []
        self.held_bytes = self.freed = 0

    def capture(self, compute: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> FakePasses:
        if self.error and self.at == len(self.captured):
            raise self.error
        passes = FakePasses(compute)
        out = passes.forward(inputs)
        passes.backward(torch.zeros_like(out))
        passes.replays = 0
        self.captured.append(passes)
        self.held_bytes += 1
        return passes

    def free(self) -> None:
        self.held_bytes, self.freed = 0, self.freed + 1
