"""A step whose compiled backward pass fails, with a block that compiles in a second."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from trainer_core.memory.compilation import Compilation
from trainer_core.memory.recompute import Recomputation

compile_with = torch.compile


class Doubled(nn.Module):
    """A block that compiles fast: it has a block's inputs and outputs."""

    COMPILED: ClassVar = {"doubled": (1,)}

    def forward(self, picture: Tensor, prompt: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """2 sin(picture), and the prompt."""
        return self.doubled(picture), prompt

    def doubled(self, picture: Tensor) -> Tensor:
        """2 sin(picture)."""
        return 2 * picture.sin()


def check_failing_backward(device: str, recomputed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the step is repeated with uncompiled blocks. Its graph is compiled when it is first needed."""
    from torch._dynamo.backends.common import aot_autograd

    def broken(*_: object) -> None:
        raise ValueError("no code for this backward pass")

    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", lambda forward, options=None: compile_with(forward, backend=backend))
    block, calls = Doubled(), []
    blocks, run = Compilation([block, Doubled()]), Recomputation([block], recomputed)
    picture, prompt = (torch.ones(1, tokens, 2, device=device) for tokens in (4, 3))

    def gradient() -> Tensor:
        calls.append(blocks.is_active)
        given = picture.detach().requires_grad_()
        run(block, given, prompt, None)[0].sum().backward()
        assert given.grad is not None
        return given.grad

    blocks.start()
    found = blocks.attempt(gradient, clean_up=lambda: None)
    torch.testing.assert_close(found, 2 * picture.cos())
    assert calls == [True, False] and not blocks.is_active
