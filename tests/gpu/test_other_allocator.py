"""CUDA graphs while torch allocates with cudaMallocAsync, as ComfyUI lets it on most cards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tools.comfyui import REPO

PLACEMENTS = ["tests/gpu/test_placements.py", "-k", "test_graphs_are_bit_equal and int8"]


@pytest.mark.parametrize("tests", [["tests/gpu/test_graphs.py"], PLACEMENTS], ids=["runs", "placements"])
def test_graphs_work_with_cudas_allocator(tests: list[str]) -> None:
    if torch.cuda.get_allocator_backend() != "native":
        pytest.skip("this process has that allocator already")
    others = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    environment = {**others, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *tests]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
