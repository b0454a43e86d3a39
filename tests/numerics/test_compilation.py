"""Compiled blocks: one compilation for all sizes, equal results, little memory, and no run is lost to a failure.

Graphs are traced and partitioned as on a GPU, but run without generated code, which would take minutes on a CPU.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.support.failing_backward import Doubled, check_failing_backward
from tests.support.narrow import NARROW, fill
from tests.support.random_base import relative_error
from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import BaseModelPrecision, LoraConfig
from trainer_core.errors import NonFiniteLossError
from trainer_core.events import SILENT
from trainer_core.memory import compilation
from trainer_core.memory.compilation import Compilation, code_folder, compiled_code_kept, start_compiler
from trainer_core.memory.recompute import Recomputation
from trainer_core.precision.quantise import quantise
from trainer_core.qwen_image.base_model import empty_transformer
from trainer_core.qwen_image.frozen_forward import optimise_frozen_forward
from trainer_core.qwen_image.transformer import SENSITIVE_LAYERS, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

# Four heads make all widths multiples of 64: bitsandbytes' CPU kernel dequantises other widths wrongly.
SHAPE = {**NARROW, "num_layers": 3, "num_attention_heads": 4}
WIDTH = 64  # a modulation row has six, and the joined factors A of queries, keys and values have twelve rows
SIZES = [(8, 12, 20), (16, 8, 33), (10, 14, 21), (6, 8, 50)]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled functions go through torch's tracer and partitioner, and no further.

    Sharing of graphs between blocks is turned off, which ours must not depend on.
    """
    torch.compiler.reset()
    counters.clear()
    if hasattr(torch._dynamo.config, "inline_inbuilt_nn_modules"):  # torch 2.13 has no such setting any more
        monkeypatch.setattr("torch._dynamo.config.inline_inbuilt_nn_modules", False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    yield
    torch.compiler.reset()


def built(
    precision: BaseModelPrecision, *, recomputed: int, dropout: float = 0.0
) -> tuple[nn.Module, dict[str, nn.Parameter], Compilation]:
    """A narrow transformer with an adapter, its trained weights, and its compilation, which has not started."""
    transformer = empty_transformer(SHAPE).to_empty(device="cpu")
    transformer.pos_embed = empty_transformer(NARROW).pos_embed
    fill(transformer, seed=3)
    optimise_frozen_forward(transformer.requires_grad_(False).eval())
    quantise(transformer, precision, SENSITIVE_LAYERS, torch.device("cpu"), SILENT)
    adapter = LoraConfig(lora_rank=4, lora_dropout=dropout)
    lora = inject_lora(transformer, plan_adapter(transformer, adapter), seed=1)
    for name, weight in lora.items():
        if name.endswith("lora_B"):
            weight.data.copy_(torch.randn(weight.shape, generator=stream(0, "up", name)) * 0.05)
    blocks = list(transformer.transformer_blocks)
    transformer.enable_gradient_checkpointing(Recomputation(blocks, recomputed, dropout=dropout > 0))
    transformer.train(dropout > 0)
    return transformer, lora, Compilation(blocks, dropout=dropout > 0)


def step(transformer: nn.Module, lora: dict[str, nn.Parameter], size: tuple[int, int, int]) -> dict[str, Tensor]:
    """The velocity and the adapter's gradients for a picture of `size` (rows, columns, prompt tokens)."""
    rows, columns, prompt = size
    draws = stream(0, "task", str(size))
    latents, reference = (torch.randn(1, 16, rows, columns, generator=draws) for _ in range(2))
    condition = Condition((reference,), torch.randn(1, prompt, 128, generator=draws))
    for weight in lora.values():
        weight.grad = None
    velocity = predict_velocity(transformer, latents, torch.tensor([0.4]), condition)  # type: ignore[arg-type]
    velocity.square().sum().backward()
    return {"velocity": velocity.detach(), **{name: each.grad for name, each in lora.items() if each.grad is not None}}


@pytest.mark.parametrize("precision", ["int8-quanto", "nf4-bnb"])
def test_seven_graphs_serve_all_sizes_with_equal_results(precision: BaseModelPrecision) -> None:
    """For the modulation and the parts before and after attention one with gradients and one without. The second pass
    of the part after attention has one more, because it leaves out a product."""
    transformer, lora, blocks = built(precision, recomputed=1)
    wanted = [step(transformer, lora, size) for size in SIZES]
    blocks.start()
    for size, expected in zip(SIZES, wanted, strict=True):
        found = step(transformer, lora, size)
        assert found.keys() == expected.keys() and len(found) > 20
        assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == 7
    assert not counters["graph_break"]
    assert kept_weights(transformer, lora) == []


def test_with_dropout_a_block_and_its_recomputation_run_the_same_graphs() -> None:
    """Two graphs may draw in different orders: on an H200 they dropped other values in the recomputation."""
    transformer, lora, blocks = built("none", recomputed=3, dropout=0.5)
    blocks.start()
    with torch.random.fork_rng():
        step(transformer, lora, SIZES[0])
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("precision", ["int4-quanto", "fp8-quanto"])
def test_kept_activations_hold_no_part_of_a_dequantised_weight(precision: BaseModelPrecision) -> None:
    transformer, lora, blocks = built(precision, recomputed=0)
    blocks.start()
    step(transformer, lora, SIZES[0])
    assert kept_weights(transformer, lora) == []


def kept_weights(transformer: nn.Module, lora: dict[str, nn.Parameter]) -> list[tuple[torch.Size, torch.dtype]]:
    """What a step keeps for the gradients that is neither a stored weight nor an activation.

    On an H200, NF4's unpacked codes took 13 GiB beside the plan's 20.
    """
    rows, columns, prompt = SIZES[0]
    target = rows * columns // 4  # tokens; the reference has as many
    tokens = {target, 2 * target, prompt, 2 * target + prompt}
    velocity = (1, 16, rows, columns)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        step(transformer, lora, SIZES[0])
    frozen = {each.data_ptr() for each in (*transformer.parameters(), *transformer.buffers())}
    others = [each for each in kept if each.data_ptr() not in frozen and each.numel() > 12 * WIDTH]
    assert len(others) > 20
    return [(each.shape, each.dtype) for each in others if each.shape != velocity and not tokens & set(each.shape)]


def fails_when_called(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Makes every compiled function raise this error."""

    def broken(*_: object, **__: object) -> object:
        def compiled(*_: object) -> None:
            raise error

        return compiled

    monkeypatch.setattr(torch, "compile", broken)


def test_a_compiler_that_refuses_ends_no_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As torch.compile does with a version of Python that is too new for it."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuse)
    transformer, lora, blocks = built("none", recomputed=1)
    blocks.start()
    assert blocks.attempt(lambda: step(transformer, lora, SIZES[0]), clean_up=lambda: None)
    assert "compiled ones fail (RuntimeError: torch.compile is not supported on Python 3.99+)" in caplog.text


def test_a_failing_compiler_ends_no_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    transformer, lora, blocks = built("none", recomputed=1)
    wanted = step(transformer, lora, SIZES[0])
    fails_when_called(monkeypatch, RuntimeError("no C compiler found\nmore lines"))
    blocks.start()
    calls = []
    with caplog.at_level(logging.WARNING):
        found = blocks.attempt(
            lambda: calls.append(1) or step(transformer, lora, SIZES[0]), clean_up=lambda: calls.append(2)
        )
    assert calls == [1, 2, 1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not blocks.is_active
    assert "run uncompiled from now on, because compiled ones fail (RuntimeError: no C compiler found)" in caplog.text


@pytest.mark.parametrize("recomputed", [0, 1])
def test_a_backward_pass_that_fails_ends_no_step(recomputed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with and without recomputation."""
    check_failing_backward("cpu", recomputed, monkeypatch)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "compiled ones need more VRAM than is free"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=["memory", "disk"],
)
def test_forward_passes_go_on_where_compiled_code_fails(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A validation is not repeated: the block that failed runs uncompiled at once."""
    transformer, _, blocks = built("none", recomputed=1)
    latents, condition = torch.randn(1, 16, 8, 8), Condition((), torch.randn(1, 9, 128))
    with torch.no_grad():
        wanted = predict_velocity(transformer, latents, torch.tensor([0.4]), condition)  # type: ignore[arg-type]
        fails_when_called(monkeypatch, error)
        blocks.start()
        with pytest.raises(type(error)):
            predict_velocity(transformer, latents, torch.tensor([0.4]), condition)  # type: ignore[arg-type]
        with blocks.forward_only():
            found = predict_velocity(transformer, latents, torch.tensor([0.4]), condition)  # type: ignore[arg-type]
    assert torch.equal(found, wanted) and not blocks.is_active
    assert caplog.text.count("run uncompiled from now on") == 1 and words in caplog.text


def test_memory_that_runs_out_beside_compiled_blocks_ends_no_step(caplog: pytest.LogCaptureFixture) -> None:
    """What compiled blocks keep may be what a later, uncompiled operation lacks."""
    _, _, blocks = built("none", recomputed=1)
    blocks.start()

    def compute() -> bool:
        if blocks.is_active:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return True

    assert blocks.attempt(compute, clean_up=lambda: None)
    assert "because compiled ones need more VRAM than is free" in caplog.text


@pytest.mark.parametrize(
    "error", [NonFiniteLossError("loss"), MemoryError(), OSError("a picture is gone"), RuntimeError("a mistake")]
)
def test_other_errors_are_raised_at_once_and_not_blamed_on_the_compiler(error: Exception) -> None:
    blocks, calls = Compilation([Doubled(), Doubled()]), []
    blocks.start()

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        blocks.attempt(fail, clean_up=lambda: calls.append(2))
    assert calls == [1] and blocks.is_active


def test_without_compiled_blocks_nothing_is_repeated() -> None:
    _, _, blocks = built("none", recomputed=1)
    calls = []
    with pytest.raises(torch.OutOfMemoryError):
        blocks.attempt(lambda: calls.append(1) or run_out(), clean_up=lambda: None)
    assert calls == [1]


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled code, which does not exist yet, on a machine that can compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(compilation, "can_compile", lambda device: device.type == "cuda")
    return tmp_path / "qwen_edit_trainer" / "compiled"


def test_compiled_code_goes_to_the_folder_and_stays_within_its_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "CACHE_BYTES", 250)
    with compiled_code_kept(torch.device("cuda")):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
        assert os.environ["TRITON_CACHE_DIR"].startswith(str(folder))
        for number in range(4):
            path = folder / "ab" / str(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(100))
            os.utime(path, (number, number))
    assert sorted(path.name for path in (folder / "ab").iterdir()) == ["2", "3"]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before" and "TRITON_CACHE_DIR" not in os.environ


def test_nothing_is_kept_where_nothing_is_compiled(folder: Path) -> None:
    with compiled_code_kept(torch.device("cpu")):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"
    assert not folder.exists()


@pytest.mark.parametrize("hindrance", ["a file in its place", "no home folder"])
def test_a_folder_that_cannot_be_written_prevents_no_compilation(
    hindrance: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch then uses the folder that it would use anyway."""
    if hindrance == "no home folder":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        monkeypatch.setattr(Path, "home", raise_no_home)
    else:
        folder.parent.write_text("a file")
    with compiled_code_kept(torch.device("cuda")):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"
    assert "Compiled code is not kept for later runs, because" in caplog.text and "can't be written" in caplog.text


def test_the_compilers_processes_find_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import async_compile

    seen: list[str] = []
    monkeypatch.setattr(
        async_compile, "maybe_warm_pool", lambda: seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]), raising=False
    )
    with compiled_code_kept(torch.device("cuda")):
        start_compiler()
    assert seen == [str(folder)]


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_compiler_that_cannot_start_ends_no_run(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry step then finds out whether the blocks can be compiled."""

    def fail() -> None:
        raise OSError("no process can be started")

    broken = SimpleNamespace(maybe_warm_pool=fail) if is_installed else None
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", broken)
    monkeypatch.setattr(torch._inductor, "async_compile", broken, raising=False)
    start_compiler()


def test_other_compiled_code_in_comfyui_keeps_its_settings(folder: Path) -> None:
    import torch._functorch.config as functorch

    assert not functorch.autograd_cache_allow_custom_autograd_functions
    with compiled_code_kept(torch.device("cuda")):
        assert functorch.autograd_cache_allow_custom_autograd_functions
    assert not functorch.autograd_cache_allow_custom_autograd_functions


def raise_no_home() -> None:
    raise RuntimeError("Could not determine home directory.")


def test_compiled_code_is_outside_the_folders_that_graphs_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert code_folder() == tmp_path / "qwen_edit_trainer" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert code_folder() == Path.home() / ".cache" / "qwen_edit_trainer" / "compiled"
