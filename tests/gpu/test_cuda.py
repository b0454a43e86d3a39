"""The CUDA path on a real GPU, with narrow models. Collected only on machines with one: see tests/conftest.py."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from tests.support.both_passes import quantised_layer, weights_of_both_passes
from tests.support.failing_backward import Doubled, check_failing_backward
from tests.support.narrow import small_encoding
from tests.support.runs import Steps, StopAfter, equal, lora_tensors
from trainer_core import dry_step
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BaseModelPrecision,
    BatchingConfig,
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.device import release_memory
from trainer_core.events import SILENT
from trainer_core.memory.compilation import Compilation, _compiled, compiled_code_kept
from trainer_core.memory.offload import HostCopies, OffloadedTensor
from trainer_core.memory.streaming import _CopyQueue, _pin
from trainer_core.precision.frozen_linear import _Product
from trainer_core.precision.quantise import quantise
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.run import train_lora
from trainer_core.sample import SampleRequest, sample_edit


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Eight steps on the GPU."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=dataclasses.replace(model, device="cuda"),
        max_train_steps=8,
        lora=LoraConfig(lora_rank=4, lora_targets="attention-mlp"),
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_warmup_steps=0),
        batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=2),
        checkpoints=CheckpointConfig(checkpoint_step_interval=3),
    )


def losses(config: TrainConfig) -> list[float]:
    observer = Steps()
    train_lora(config, observer)
    return [report.loss for report in observer.reports]


def elsewhere(config: TrainConfig, name: str, **model: object) -> TrainConfig:
    return dataclasses.replace(
        config, run_dir=str(Path(config.run_dir).parent / name), model=dataclasses.replace(config.model, **model)
    )


def test_the_card_and_the_cpu_take_the_same_course(config: TrainConfig) -> None:
    on_cpu = losses(elsewhere(config, "cpu", device="cpu"))
    torch.testing.assert_close(torch.tensor(losses(config)), torch.tensor(on_cpu), rtol=2e-3, atol=2e-3)


def test_bf16_stays_near_float32(config: TrainConfig) -> None:
    near = losses(elsewhere(config, "bf16", mixed_precision="bf16"))
    torch.testing.assert_close(torch.tensor(near), torch.tensor(losses(config)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["int8-quanto", "nf4-bnb"])
@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_quantised_bases_train(config: TrainConfig, precision: str, mixed_precision: str) -> None:
    quantised = losses(elsewhere(config, "q", base_model_precision=precision, mixed_precision=mixed_precision))
    bound = 0.03 if precision == "int8-quanto" else 0.15
    torch.testing.assert_close(torch.tensor(quantised), torch.tensor(losses(config)), rtol=bound, atol=bound)


@pytest.mark.usefixtures("in_fixed_order")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_stopped_and_continued(config: TrainConfig, optimizer: str) -> None:
    settings = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, optimizer=optimizer))
    unbroken, broken = train_lora(settings), elsewhere(settings, "broken")
    first = train_lora(broken, StopAfter(5))
    assert 0 < first.steps_done < 8 and first.lora_file is None
    assert equal(lora_tensors(train_lora(broken)), lora_tensors(unbroken))


@pytest.mark.usefixtures("in_fixed_order")
@pytest.mark.parametrize("precision", ["int8-quanto", "nf4-bnb"])
def test_a_run_with_8_bit_products_takes_the_same_course_after_a_stop(config: TrainConfig, precision: str) -> None:
    model = {"base_model_precision": precision, "mixed_precision": "bf16"}
    fast, exact = (elsewhere(config, wish, matmul_precision=wish, **model) for wish in ("8bit", "bf16"))
    torch.testing.assert_close(torch.tensor(losses(fast)), torch.tensor(losses(exact)), rtol=3e-2, atol=3e-2)
    broken = elsewhere(fast, "broken")
    assert train_lora(broken, StopAfter(5)).lora_file is None
    assert equal(lora_tensors(train_lora(broken)), lora_tensors(train_lora(fast)))


def test_auto_decides_and_says_why(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train_lora(elsewhere(config, "auto", base_model_precision="int8-quanto", mixed_precision="bf16"))
    said = [message for message in caplog.messages if message.startswith("Quantised layers multiply ")]
    assert len(said) == 1 and "ms in 8 bits" in said[0]


def test_who_waits_for_the_processor_is_told_what_to_do(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card always waits for the kernels of so narrow a model."""
    monkeypatch.setattr(dry_step, "allocator_allows_graphs", lambda: False)
    monkeypatch.setattr(dry_step, "_CAPTURING_SECONDS", 0)  # a short run gets no graphs
    notes: list[str] = []
    observer = Steps()
    monkeypatch.setattr(observer, "on_note", notes.append)
    train_lora(config, observer)
    assert [note for note in notes if "Start ComfyUI with --disable-cuda-malloc" in note]


def test_memory_that_cannot_be_locked_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stream = torch.nn.Module()  # any object that supports weak references
    host = torch.empty(2**20, dtype=torch.uint8)
    _pin(stream, [host], torch.device("cuda"))
    _pin(stream, [host], torch.device("cuda"))  # pinning the same memory twice is a CUDA error
    assert "can't be pinned" in caplog.text
    assert torch.ones(2, device="cuda").add(1).tolist() == [2, 2]


def test_the_first_copy_waits_for_work_that_uses_its_memory() -> None:
    """The buffer gets the memory of a freed tensor that a kernel still has to write to."""
    device = torch.device("cuda")
    source = (torch.arange(2**20) % 251).byte().pin_memory()
    _CopyQueue(device, 1).copy(0, source.to(device), source)  # CUDA may wait for the device when it makes streams
    torch.cuda.empty_cache()
    spoiled = torch.empty(source.shape, dtype=torch.uint8, device=device)
    place = spoiled.data_ptr()
    spoiled.fill_(7)  # CUDA may wait for the device when it loads a kernel
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles: about half a second
    spoiled.fill_(7)
    filled = torch.cuda.Event()
    filled.record()
    del spoiled
    buffer = torch.empty(source.shape, dtype=torch.uint8, device=device)
    queue = _CopyQueue(device, 1)
    queue.copy(0, buffer, source)
    assert buffer.data_ptr() == place, "proves nothing: the buffer has other memory"
    assert not filled.query(), "proves nothing: the memory was written before the copy was enqueued"
    queue.wait(0)
    assert torch.equal(buffer.cpu(), source)


def test_a_copy_back_that_nobody_fetches_spoils_nothing() -> None:
    """After an aborted step, a copy back is still under way when the memory that it writes to is used again."""
    copies = HostCopies(torch.device("cuda"), small_bytes=1)
    tensor = torch.full((2**20,), 1, dtype=torch.uint8, device="cuda")
    copies.fetch(copies.keep(tensor))  # CUDA may wait for the device when it makes events and pins memory
    kept = copies.keep(tensor)
    assert isinstance(kept, OffloadedTensor)
    assert copies._stream is not None
    with torch.cuda.stream(copies._stream):
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)  # cycles: about half a second
    copies._begin(kept)
    assert kept.coming is not None and kept.came is not None
    place, came = kept.coming.data_ptr(), kept.came
    del kept
    taken = [torch.empty_like(tensor)]
    while taken[-1].data_ptr() != place:
        assert len(taken) < 100, "proves nothing: nobody gets the memory"
        taken.append(torch.empty_like(tensor))
    taken[-1].fill_(9)
    assert not came.query(), "proves nothing: the copy was done before the memory was used again"
    torch.cuda.synchronize()
    assert (taken[-1] == 9).all()


@pytest.mark.parametrize(
    "precision", [each for each in get_args(BaseModelPrecision) if each.endswith(("quanto", "bnb"))]
)
def test_codes_and_both_passes_are_alike_at_full_width(precision: BaseModelPrecision) -> None:
    """quanto's codes equal those made on the CPU, so blocks may move. The backward pass uses the forward's weights."""
    layer = quantised_layer(precision, 3072, 1024, "cuda")
    forward, backward = weights_of_both_passes(layer)
    assert torch.equal(forward, layer.dequantised(torch.bfloat16)) and torch.equal(backward, forward)
    if precision != "nf4-bnb":
        on_cpu = quantised_layer(precision, 3072, 1024, "cpu")
        for name, tensor in layer.quantised.tensors.items():
            assert torch.equal(tensor.cpu(), on_cpu.quantised.tensors[name]), name
        assert torch.equal(forward.cpu(), on_cpu.dequantised(torch.bfloat16))


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb"])
def test_a_block_in_host_memory_is_one_piece_and_equal(model: ModelConfig, precision: BaseModelPrecision) -> None:
    """It is quantised on the card and moved as a whole."""
    cuda = torch.device("cuda")
    base = BaseModel(dataclasses.replace(model, device="cuda", base_model_precision=precision))
    block = load_transformer(base, cuda, on_host=[0]).transformer_blocks[0]
    wanted = load_transformer(base, cuda).transformer_blocks[0].state_dict()
    found = block.state_dict()
    assert found.keys() == wanted.keys()
    assert all(each.device.type == "cpu" and torch.equal(each, wanted[name].cpu()) for name, each in found.items())
    assert len({each.untyped_storage().data_ptr() for each in found.values()}) == 1


def test_compiled_code_is_read_from_disk_in_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of our own functions' backward passes, unless their code has changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda = torch.device("cuda")
    network = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)).to(cuda).requires_grad_(False)
    quantise(network, "int8-quanto", (), cuda, SILENT)

    def caches() -> tuple[int, ...]:
        torch.compiler.reset()
        counters.clear()
        with compiled_code_kept(cuda):
            _compiled(network.forward, None)(torch.randn(8, 128, device=cuda, requires_grad=True)).sum().backward()
        return tuple(counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("miss", "hit", "bypass"))

    assert caches() == (1, 0, 0)
    assert caches() == (0, 1, 0)
    backward = _Product.backward
    monkeypatch.setattr(_Product, "backward", lambda ctx, gradient: backward(ctx, 2 * gradient))
    assert caches() == (1, 0, 0)


def test_memory_is_given_back(config: TrainConfig) -> None:
    train_lora(elsewhere(config, "first"))  # CUDA's libraries keep workspaces, which they allocate once
    release_memory()
    before = torch.cuda.memory_allocated()
    train_lora(config)
    release_memory()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("recomputed", [0, 1])
def test_a_compiled_backward_pass_that_fails_ends_no_step(recomputed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, autograd runs the backward pass in a thread of its own."""
    check_failing_backward("cuda", recomputed, monkeypatch)


def test_memory_that_compiled_blocks_lack_ends_no_step() -> None:
    blocks = Compilation([Doubled(), Doubled()])
    blocks.start()
    too_much = torch.cuda.get_device_properties(0).total_memory

    def compute() -> int:
        taken = torch.empty(too_much if blocks.is_active else 1, dtype=torch.uint8, device="cuda")
        return taken.nbytes

    assert blocks.attempt(compute, clean_up=lambda: None) == 1


def test_sampling_with_the_lora(config: TrainConfig) -> None:
    from tests.support.narrow import picture

    result = train_lora(elsewhere(config, "bf16", mixed_precision="bf16"))
    assert result.lora_file is not None and all(
        tensor.isfinite().all() for tensor in load_file(result.lora_file).values()
    )
    request = SampleRequest(
        model=dataclasses.replace(config.model, mixed_precision="bf16"),
        references=(picture(3),),
        prompt="turn it into a negative",
        lora_file=result.lora_file,
        resolution=96,
        match_target_res=small_encoding().match_target_res,
        sampling=ValidationConfig(validation_num_inference_steps=4),
    )
    assert sample_edit(request).size == (96, 96)
