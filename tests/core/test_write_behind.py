"""Results are written in background threads; which of them fetch results from the device."""

from __future__ import annotations

from pathlib import Path
from threading import Thread, current_thread
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trainer_core.conditioning.read_ahead import write_behind
from trainer_core.files import read_tensors


class OnDevice:
    """A result on a device. Records the threads that copy it to host memory."""

    def __init__(self, kind: str) -> None:
        self.device, self.fetched_in = SimpleNamespace(type=kind), list[Thread]()

    def detach(self) -> OnDevice:
        return self

    def cpu(self) -> Tensor:
        self.fetched_in.append(current_thread())
        return torch.ones(2)


@pytest.mark.parametrize(("kind", "in_background"), [("cuda", True), ("mps", False)])
def test_only_results_on_cuda_are_fetched_in_the_background(kind: str, in_background: bool, tmp_path: Path) -> None:
    result = OnDevice(kind)
    with write_behind() as write:
        write(tmp_path / "result.safetensors", {"latents": result})  # type: ignore[dict-item]
    assert [each is not current_thread() for each in result.fetched_in] == [in_background]
    assert torch.equal(read_tensors(tmp_path / "result.safetensors")["latents"], torch.ones(2))
