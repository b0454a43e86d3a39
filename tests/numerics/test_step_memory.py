"""Recomputation, offloading and streaming change where tensors are, but not what is computed."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.adapter_gradients import LORA, gradients, predict, with_adapter
from tests.support.narrow import NARROW, fill
from trainer_core.adapters.inject import for_file
from trainer_core.adapters.plan import plan_adapter
from trainer_core.adapters.writer import to_file_tensors
from trainer_core.config import BaseModelPrecision, LoraConfig, MemoryConfig, ModelConfig, TrainConfig
from trainer_core.errors import MissingPackageError
from trainer_core.memory import offload as offload_module
from trainer_core.memory.offload import CHUNK_BYTES, HostCopies, OffloadedTensor, offloaded_bytes
from trainer_core.memory.placement import apply_memory, blocks_on_host, check_compiler, stream_blocks
from trainer_core.memory.recompute import Recomputation
from trainer_core.memory.streaming import BlockStream, _pin
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer

CPU = torch.device("cpu")
LAYERS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow transformer of five blocks with different weights."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("base")
    transformer = QwenImageTransformer2DModel(**{**NARROW, "num_layers": LAYERS})
    fill(transformer, seed=3)
    transformer.save_pretrained(folder / "transformer")
    for part in ("vae", "text_encoder"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    return folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A velocity, and the adapter's gradients and tensors for its file."""

    velocity: Tensor
    gradients: dict[str, Tensor]
    tensors: dict[str, Tensor]


def run(base: Path, precision: BaseModelPrecision = "none", adapter: LoraConfig = LORA, **memory: object) -> Outcome:
    """Forward and backward with these memory settings. Without any, nothing is recomputed."""
    config = TrainConfig(
        run_dir="-",
        encoded="-",
        model=ModelConfig(base=str(base), base_model_precision=precision, mixed_precision="no", device="cpu"),
        gradient_checkpointing=bool(memory),
        memory=MemoryConfig(**memory),
        lora=adapter,
    )
    on_host = blocks_on_host(config.memory, LAYERS, checkpointing=config.gradient_checkpointing)
    transformer = load_transformer(BaseModel(config.model), CPU, on_host=on_host)
    stream = stream_blocks(transformer, on_host, CPU, config.memory)
    lora = with_adapter(transformer, adapter)
    apply_memory(transformer, stream, CPU, config)
    found = gradients(transformer, lora)
    with torch.no_grad():
        velocity = predict(transformer)  # after the step, to detect a broken stream
    return Outcome(velocity, found, for_file(transformer, lora))


def assert_equal(one: Outcome, other: Outcome) -> None:
    assert torch.equal(one.velocity, other.velocity)
    assert len(one.gradients) > 50
    for found, wanted in ((one.gradients, other.gradients), (one.tensors, other.tensors)):
        assert found.keys() == wanted.keys()
        assert [name for name, each in found.items() if not torch.equal(each, wanted[name])] == []


@pytest.fixture(scope="module")
def plain(base: Path) -> Outcome:
    return run(base)


@pytest.mark.parametrize("blocks", [-1, 0, 1, 3, LAYERS, 99])
def test_computing_again_is_bit_equal(base: Path, plain: Outcome, blocks: int):
    assert_equal(run(base, gradient_checkpointing_blocks=blocks), plain)


def test_fewer_blocks_keep_more(base: Path):
    """Blocks that are not recomputed keep their saved tensors until the end of the forward pass."""

    def saved(blocks: int) -> int:
        transformer = load_transformer(BaseModel(ModelConfig(base=str(base), mixed_precision="no", device="cpu")), CPU)
        with_adapter(transformer)
        transformer.enable_gradient_checkpointing(Recomputation(list(transformer.transformer_blocks), blocks))
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            predict(transformer)
        return total

    kept = [saved(blocks) for blocks in (LAYERS, 3, 1, 0)]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] / 10


@pytest.mark.parametrize("streamed", [1, 2, 3, LAYERS])
@pytest.mark.parametrize("buffers", [2, 3, 8])
def test_streaming_is_bit_equal(base: Path, plain: Outcome, streamed: int, buffers: int):
    assert_equal(run(base, blocks_to_stream=streamed, stream_buffers=buffers), plain)


@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-quanto", "int4-quanto", "int2-quanto", "nf4-bnb"])
def test_quantised_weights_stream_too(base: Path, precision: BaseModelPrecision):
    assert_equal(run(base, precision, blocks_to_stream=LAYERS, activation_offload=True), run(base, precision))


@pytest.mark.parametrize("precision", ["none", "int8-quanto"])
def test_a_dora_of_streamed_weights(base: Path, plain: Outcome, tmp_path: Path, precision: BaseModelPrecision):
    """It also reads the weights when it is injected, when it starts from a plain LoRA, and when its file is written."""
    start = tmp_path / "lora.safetensors"
    save_file(to_file_tensors(plain.tensors, LORA, torch.float32), start)
    dora = dataclasses.replace(LORA, lora_type="dora", init_lora=str(start))
    wanted = run(base, precision, dora)
    assert sum(name.endswith("dora_scale") for name in wanted.tensors) > 50
    assert_equal(run(base, precision, dora, blocks_to_stream=LAYERS), wanted)


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "int4-quanto", "nf4-bnb"])
def test_streamed_weights_keep_their_addresses_and_share_them(base: Path, precision: BaseModelPrecision):
    memory = MemoryConfig(blocks_to_stream=LAYERS)
    numbers = blocks_on_host(memory, LAYERS, checkpointing=True)
    model = ModelConfig(base=str(base), base_model_precision=precision, mixed_precision="no", device="cpu")
    transformer = load_transformer(BaseModel(model), CPU, on_host=numbers)
    loaded = {block.attn.to_q.weight.untyped_storage().data_ptr() for block in transformer.transformer_blocks}
    stream = stream_blocks(transformer, numbers, CPU, memory)
    assert stream is not None
    assert {each.data_ptr() for each in stream._host} == loaded  # not copied again
    frozen = sum(each.nbytes for block in transformer.transformer_blocks for each in block.state_dict().values())
    assert frozen <= stream.host_bytes < frozen * (1.2 if precision == "none" else 2)  # many small tensors, aligned
    assert stream.device_bytes < stream.host_bytes * 0.45

    def addresses() -> list[int]:
        return [block.attn.to_q.weight.data_ptr() for block in transformer.transformer_blocks]

    before = addresses()
    with torch.no_grad():
        predict(transformer)
    assert addresses() == before
    assert before[0] == before[2] == before[4] != before[1] == before[3]


def test_each_weight_comes_over_once_a_pass(base: Path, monkeypatch: pytest.MonkeyPatch):
    """Each pass copies a block once, but the backward pass finds the last two blocks still in their buffers."""
    copies: list[int] = []
    copy = BlockStream._fetch

    def counted(self: BlockStream, index: int) -> None:
        if self._block_in[index % len(self._buffers)] != index:
            copies.append(index)
        copy(self, index)

    monkeypatch.setattr(BlockStream, "_fetch", counted)
    run(base, blocks_to_stream=LAYERS)
    forward_and_backward = [0, 1, 2, 3, 4, 2, 1, 0]
    assert copies[: len(forward_and_backward)] == forward_and_backward


class Counting(HostCopies):
    """Counts the tensors that it offloads."""

    kept = 0

    def keep(self, tensor: Tensor) -> object:
        kept = super().keep(tensor)
        self.kept += kept is not tensor
        return kept


def test_offloading_is_bit_equal_and_uses_its_memory_again(base: Path, plain: Outcome):
    transformer = load_transformer(BaseModel(ModelConfig(base=str(base), mixed_precision="no", device="cpu")), CPU)
    lora = with_adapter(transformer)
    offload = Counting(CPU, small_bytes=1)
    transformer.enable_gradient_checkpointing(
        Recomputation(list(transformer.transformer_blocks), LAYERS, offload=offload)
    )
    for _ in range(2):
        for weight in lora.values():
            weight.grad = None
        found = gradients(transformer, lora)
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.gradients.items())
    assert offload.kept > 4 * LAYERS
    assert offload.host_bytes == CHUNK_BYTES
    assert all(entry.kept() is None for entry in offload._stack)


def test_offloaded_tensors_of_many_sizes_take_what_the_largest_step_takes(monkeypatch: pytest.MonkeyPatch):
    """Steps of many lengths, one that is aborted, and one that needs more memory than all before."""
    monkeypatch.setattr(offload_module, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(offload_module, "SMALL_BYTES", 1)
    offload = HostCopies(CPU, small_bytes=1)
    largest = 0
    for length in (*range(100, 160), 150, 90, 3000, 100):
        tensors = [torch.randn(each) for each in (length, 700 + length)] * 5
        kept = [offload.keep(tensor) for tensor in tensors]
        largest = max(largest, offloaded_bytes(tensor.nbytes for tensor in tensors))
        if length == 150:
            kept.clear()
            continue  # an aborted step fetches nothing
        for one, other in zip(reversed(kept), reversed(tensors), strict=True):
            assert torch.equal(offload.fetch(one), other)
        assert offload.host_bytes <= largest
    assert offload.host_bytes == largest


def test_a_tensor_that_is_not_in_one_piece_comes_back():
    offload = HostCopies(CPU, small_bytes=1)
    tensor = torch.randn(30, 20).t()
    assert torch.equal(offload.fetch(offload.keep(tensor)), tensor)


@pytest.mark.parametrize(("begun", "fetched", "waits"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_memory_of_a_copy_that_is_not_fetched_is_used_after_it(begun: bool, fetched: bool, waits: int):
    """tests/gpu shows on a card that the memory would be spoilt otherwise."""
    waited: list[object] = []
    copied: Any = object() if begun else None
    user: Any = SimpleNamespace(wait_event=waited.append)
    kept = OffloadedTensor(torch.empty(1), torch.Size([1]), torch.float32, torch.empty(1), copied, user, fetched)
    del kept
    assert waited == [copied] * waits


def test_dropout_drops_the_same_twice(base: Path):
    def dropped(blocks: int, streamed: int = 0) -> dict[str, Tensor]:
        from trainer_core.adapters.inject import inject_lora

        numbers = tuple(range(streamed))
        model = BaseModel(ModelConfig(base=str(base), mixed_precision="no", device="cpu"))
        transformer = load_transformer(model, CPU, on_host=numbers)
        stream = stream_blocks(transformer, numbers, CPU, MemoryConfig(blocks_to_stream=streamed))
        lora = inject_lora(transformer, plan_adapter(transformer, LoraConfig(lora_rank=4, lora_dropout=0.5)), seed=1)
        for weight in lora.values():
            nn.init.constant_(weight, 0.02)
        transformer.train()
        transformer.enable_gradient_checkpointing(
            Recomputation(list(transformer.transformer_blocks), blocks, stream=stream, dropout=True)
        )
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return gradients(transformer, lora)

    kept, again, streamed = dropped(0), dropped(LAYERS), dropped(LAYERS, LAYERS)
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())
    assert all(torch.equal(gradient, streamed[name]) for name, gradient in kept.items())


def test_a_streamed_block_with_gradients_is_not_left_unguarded(base: Path):
    numbers = tuple(range(LAYERS))
    transformer = load_transformer(
        BaseModel(ModelConfig(base=str(base), mixed_precision="no", device="cpu")), CPU, on_host=numbers
    )
    stream_blocks(transformer, numbers, CPU, MemoryConfig(blocks_to_stream=LAYERS))
    with pytest.raises(AssertionError, match="held"):
        predict(transformer)


def test_host_memory_is_pinned_for_the_card_that_reads_it(monkeypatch: pytest.MonkeyPatch):
    """With device cuda:1, CUDA would otherwise also take memory on cuda:0, and not wait for the last copy."""
    second, current, seen = torch.device("cuda:1"), [], []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: seen.append(("pin", *current)) or 0,
        cudaHostUnregister=lambda *_: seen.append(("unpin",)),
    )
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(("wait", device)))
    owner = nn.Module()
    _pin(owner, [torch.zeros(4)], second)
    del owner
    gc.collect()
    assert seen == [("pin", second), ("wait", second), ("unpin",)]


@pytest.mark.parametrize(("platform", "package"), [("linux", "triton"), ("win32", "triton-windows")])
def test_compiling_without_triton_names_the_package(platform: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer_core.packages.find_spec", lambda _: None)
    monkeypatch.setattr("sys.platform", platform)
    check_compiler(MemoryConfig(), CPU)
    with pytest.raises(
        MissingPackageError, match=f"compile_blocks needs the package {package}, .* pip install {package}$"
    ):
        check_compiler(MemoryConfig(compile_blocks="on"), torch.device("cuda"))
