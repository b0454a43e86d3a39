"""Where a kernel, CUDA graphs or compiled blocks can't be used, the trainer goes on without them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.support.failing_backward import Doubled
from trainer_core import dry_step
from trainer_core.config import LoraConfig, TrainConfig
from trainer_core.memory.compilation import Compilation
from trainer_core.planning.choose import Budget
from trainer_core.qwen_image import attention_choice, query_key
from trainer_core.qwen_image.attention_kernels import Kernel

CPU = torch.device("cpu")


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), ImportError("no Triton here")])
def test_a_kernel_that_triton_cannot_compile_is_not_used(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch brings Triton, but many machines have no C compiler."""
    caplog.set_level(logging.INFO)

    def fail() -> None:
        raise error

    query_key._kernels_work.cache_clear()
    monkeypatch.setattr(query_key, "find_spec", lambda _: True)
    monkeypatch.setattr(query_key, "_kernels", fail)
    assert not query_key._kernels_work(CPU, torch.float32, 64)
    assert "computed without Triton, which fails on this machine" in caplog.text and str(error) in caplog.text
    assert not query_key._kernels_work(CPU, torch.float32, 96)
    query_key._kernels_work.cache_clear()


def test_memory_that_runs_out_says_nothing_about_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    kernel = Kernel("full", no_memory, no_memory)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        attention_choice._tested(kernel, CPU, torch.float32, 8)
    query_key._kernels_work.cache_clear()
    monkeypatch.setattr(query_key, "find_spec", lambda _: True)
    monkeypatch.setattr(query_key, "_kernels", lambda: SimpleNamespace(forward=no_memory))
    with pytest.raises(torch.OutOfMemoryError):
        query_key._kernels_work(CPU, torch.float32, 64)


def test_blocks_that_run_uncompiled_again_tell_it() -> None:
    told: list[bool] = []
    blocks = Compilation([Doubled()])
    blocks.on_stop = lambda: told.append(blocks.is_active)
    blocks.start()
    blocks.stop("the test wants it")
    assert told == [False]


@pytest.mark.parametrize(
    ("dropout", "pixels", "allocator", "words"),
    [
        (0.1, 0, "native", "dropout draws new values"),
        (0.0, 1024, "native", "encoded on the fly"),
        (0.0, 0, "cudaMallocAsync", "--disable-cuda-malloc"),
    ],
)
def test_why_there_are_no_graphs(
    dropout: float, pixels: int, allocator: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    config = TrainConfig(run_dir="run", encoded="data", lora=LoraConfig(lora_dropout=dropout))
    prepared = SimpleNamespace(config=config, work=SimpleNamespace(on_the_fly_pixels=pixels))
    assert words in dry_step.no_graphs_because(prepared, torch.device("cuda"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dropout", "pixels", "allocator", "room", "launched", "is_so"),
    [
        (0.0, 0, "cudaMallocAsync", 100, 0.99, True),
        (0.0, 0, "native", 100, 0.99, False),
        (0.1, 0, "cudaMallocAsync", 100, 0.99, False),
        (0.0, 1024, "cudaMallocAsync", 100, 0.99, False),
        (0.0, 0, "cudaMallocAsync", 10, 0.99, False),
        (0.0, 0, "cudaMallocAsync", 100, 0.91, False),
    ],
)
def test_whether_a_run_would_gain_from_graphs(
    dropout: float,
    pixels: int,
    allocator: str,
    room: int,
    launched: float,
    is_so: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(dry_step, "budget_of", lambda *_: Budget(room, 0))
    monkeypatch.setattr(dry_step, "plan_memory", lambda *_, graphs: SimpleNamespace(needed_device_bytes=20 * graphs))
    config = TrainConfig(run_dir="run", encoded="data", lora=LoraConfig(lora_dropout=dropout))
    work = SimpleNamespace(on_the_fly_pixels=pixels)
    prepared = SimpleNamespace(config=config, work=work, model=SimpleNamespace(size=None))
    measured = dry_step.Measured(2.0, 1, {}, 2.0 * launched)
    found = dry_step._would_gain_from_graphs(prepared, torch.device("cuda"), measured)  # type: ignore[arg-type]
    assert found == is_so
