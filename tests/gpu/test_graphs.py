"""Steps that replay CUDA graphs equal ordinary ones, bit for bit, with weights and activations in every place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.lora_files import write_lora
from tests.support.narrow import make_pairs, small_encoding
from tests.support.runs import Steps, StopAfter, equal, lora_tensors
from trainer_core import dry_step
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PreservationConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.device import release_memory
from trainer_core.memory.capture import CapturedPasses, CapturePool, Copies
from trainer_core.memory.step_graphs import StepGraphs
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora

CUDA, GIB = torch.device("cuda"), 2**30
pytestmark = pytest.mark.usefixtures("in_fixed_order")
KEPT = MemoryConfig(memory="manual", gradient_checkpointing_blocks=0, compile_blocks="off")
PLACES = {
    "kept": KEPT,
    "recomputed": dataclasses.replace(KEPT, gradient_checkpointing_blocks=-1),
    "streamed": dataclasses.replace(KEPT, gradient_checkpointing_blocks=-1, blocks_to_stream=2),
}


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Six steps on the GPU with two micro-batches each, a learning rate that changes, and validations between them."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=dataclasses.replace(model, device="cuda", mixed_precision="bf16", base_model_precision="int8-quanto"),
        max_train_steps=6,
        lora=LoraConfig(lora_rank=4, lora_targets="attention-mlp"),
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_warmup_steps=2, lr_scheduler="cosine"),
        batching=BatchingConfig(gradient_accumulation_steps=2),
        checkpoints=CheckpointConfig(checkpoint_step_interval=2),
        validation=ValidationConfig(validation_step_interval=4, num_validation_images=0),
        memory=KEPT,
    )


@pytest.fixture(scope="module")
def keeping(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    """Pairs with preservation prompts."""
    folder = tmp_path_factory.mktemp("keeping")
    encoding = small_encoding(preservation_prompts=("make it night", "draw it in ink"))
    return encode_dataset(pair_folders(make_pairs(folder / "pairs", 4)), BaseModel(model), encoding, folder / "cache")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps run as CUDA graphs however short the run is and however much that saves. Collects the sizes of replays."""
    found: list[int] = []
    forward = CapturedPasses.forward

    def counted(self: CapturedPasses, inputs: tuple[Tensor | None, ...]) -> Tensor:
        found.append(sum(each.numel() for each in inputs if each is not None))
        return forward(self, inputs)

    monkeypatch.setattr(dry_step, "_CAPTURING_SECONDS", 0)
    monkeypatch.setattr(dry_step, "_LEAST_FASTER", 1e9)
    monkeypatch.setattr(CapturedPasses, "forward", counted)
    return found


def elsewhere(config: TrainConfig, name: str, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent / name), **changes)


def ordinary(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], list[float]]:
    """The LoRA of the run without graphs, and the losses of its steps."""
    observer = Steps()
    with monkeypatch.context() as patch:
        patch.setattr(dry_step, "_CAPTURING_SECONDS", float("inf"))
        tensors = lora_tensors(train_lora(elsewhere(config, "ordinary"), observer))
    return tensors, [report.loss for report in observer.reports]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_with_graphs_equals_one_without(
    place: str,
    config: TrainConfig,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Most micro-batches are replayed, those of several sizes, before and after a validation."""
    settings, observer = dataclasses.replace(config, memory=PLACES[place]), Steps()
    tensors, losses = ordinary(settings, monkeypatch)
    assert not replays
    graphed = train_lora(settings, observer)
    assert "without CUDA graphs" not in caplog.text
    assert len(replays) >= 6 and len(set(replays)) > 1
    assert [report.loss for report in observer.reports] == losses
    assert equal(lora_tensors(graphed), tensors)


def test_rolled_out_pairs_are_replayed_too(
    config: TrainConfig, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = RolloutConfig(
        scheduled_sampling_max_step_offset=3, scheduled_sampling_probability=0.7, scheduled_sampling_reflexflow=True
    )
    settings = dataclasses.replace(config, rollout=rollout)
    tensors, losses = ordinary(settings, monkeypatch)
    observer = Steps()
    assert equal(lora_tensors(train_lora(settings, observer)), tensors)
    assert replays and [report.loss for report in observer.reports] == losses


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_turns_that_preserve_with_graphs_and_compiled_blocks(
    compiled: str, keeping: EncodedDataset, config: TrainConfig, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's passes run beside the graphs, with the adapter disabled, and leave everything as it was."""
    settings = dataclasses.replace(
        config,
        encoded=str(keeping.manifest),
        max_train_steps=10,
        preservation=PreservationConfig(preservation_probability=0.5),
        memory=dataclasses.replace(KEPT, compile_blocks=compiled),
        validation=ValidationConfig(validation_step_interval=0, num_validation_images=0, strength_sweep="none"),
    )
    observer, uncompiled = Steps(), dataclasses.replace(settings, memory=KEPT)
    tensors, losses = ordinary(uncompiled, monkeypatch)
    graphed = train_lora(settings, observer)
    assert replays and any(report.preservation_loss for report in observer.reports)
    if compiled == "off":
        assert equal(lora_tensors(graphed), tensors) and [report.loss for report in observer.reports] == losses
    else:  # compiled code rounds at other places
        assert [report.loss for report in observer.reports] == pytest.approx(losses, rel=0.05, abs=0.01)


def test_previews_with_a_few_step_lora_of_compiled_blocks(
    config: TrainConfig, model: ModelConfig, tmp_path: Path
) -> None:
    """Blocks are uncompiled for the pictures and compiled again afterwards. The training stays the same."""
    file = write_lora(tmp_path / "few-4steps.safetensors", dataclasses.replace(model, mixed_precision="bf16"))
    memory = dataclasses.replace(KEPT, compile_blocks="on", gradient_checkpointing_blocks=-1, blocks_to_stream=2)
    plain = dataclasses.replace(
        config,
        memory=memory,
        validation=ValidationConfig(
            validation_step_interval=3, num_validation_images=1, validation_num_inference_steps=2
        ),
    )
    few = dataclasses.replace(plain, validation=dataclasses.replace(plain.validation, validation_lora=str(file)))
    first, second = train_lora(elsewhere(plain, "plain")), train_lora(elsewhere(few, "few"))
    assert equal(lora_tensors(first), lora_tensors(second))
    assert first.samples and second.samples and first.samples.psnr_base != second.samples.psnr_base


def test_a_run_that_was_stopped_between_replays_continues_alike(
    config: TrainConfig, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of the second start are captured at other steps than those of the first."""
    tensors, _ = ordinary(config, monkeypatch)
    first = train_lora(config, StopAfter(5))
    assert 0 < first.steps_done < 6 and replays
    assert equal(lora_tensors(train_lora(config)), tensors)


def test_memory_of_graphs_is_given_back(config: TrainConfig, replays: list[int]) -> None:
    train_lora(elsewhere(config, "first"))  # CUDA's libraries keep workspaces, which they allocate once
    release_memory()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    train_lora(config)
    release_memory()
    assert replays
    assert torch.cuda.memory_allocated() <= before[0] + 2**20
    assert torch.cuda.memory_reserved() <= before[1] + 2**22


@pytest.mark.parametrize("place", ["kept", "streamed"])
@pytest.mark.parametrize("failure", ["waits", "memory"])
def test_a_pass_that_cannot_be_captured_runs_as_usual(
    failure: str,
    place: str,
    config: TrainConfig,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = dataclasses.replace(config, memory=PLACES[place])
    tensors, _ = ordinary(settings, monkeypatch)
    linear = nn.functional.linear
    calls: list[int] = []

    def failing(x: Tensor, *others: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing() and (calls.append(1) or len(calls) == 8):
            if failure == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            float(x.sum())  # the host waits for the device
        return linear(x, *others)

    monkeypatch.setattr(nn.functional, "linear", failing)
    assert equal(lora_tensors(train_lora(settings)), tensors)
    assert not replays and caplog.text.count("Steps run without CUDA graphs from now on, because") == 1
    # What torch needs after a capture: random numbers, and cached memory for other sizes.
    assert torch.rand(2, device="cuda").isfinite().all()
    limit = torch.cuda.memory_reserved() + 4 * GIB
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(CUDA).total_memory)
    try:
        cached = torch.empty(int(2.4 * GIB), dtype=torch.uint8, device="cuda")
        del cached
        assert torch.empty(int(3.2 * GIB), dtype=torch.uint8, device="cuda").numel()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_ordinary_step_gets_the_memory_of_the_graphs(
    config: TrainConfig, replays: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, _ = ordinary(config, monkeypatch)
    forward = CapturedPasses.forward

    def runs_out(self: CapturedPasses, inputs: tuple[Tensor | None, ...]) -> Tensor:
        if len(replays) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, inputs)

    monkeypatch.setattr(CapturedPasses, "forward", runs_out)
    assert equal(lora_tensors(train_lora(config)), tensors)
    assert len(replays) == 5 and "because a step needs the VRAM that graphs hold" in caplog.text


def small_step(width: int) -> tuple[StepGraphs, Callable[[int, float], Tensor], nn.Parameter]:
    """Graphs, a step for inputs with a number of rows and a value, and the weight that it trains."""
    weight = nn.Parameter(torch.eye(width, device=CUDA) / width)
    graphs = StepGraphs([weight], CapturePool(CUDA, Copies()))

    def step(rows: int, value: float) -> Tensor:
        x = torch.full((rows, width), value, device=CUDA, requires_grad=True)
        graphs("kind", lambda x: (x @ weight).sin() @ weight, x).sum().backward()
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.clone(), None
        return gradient

    return graphs, step, weight


def test_graphs_share_their_memory() -> None:
    """The largest size comes first, as in a dry step. Smaller ones need next to nothing more."""
    graphs, step, _ = small_step(512)
    rows = (4096, 4000, 3000, 2048)
    wanted = {each: step(each, 0.5) for each in rows}
    graphs.start()
    step(4096, 1.0)
    first = graphs.held_bytes
    assert first > 0
    for each in rows[1:]:
        step(each, 1.0)
    assert graphs.held_bytes <= 1.3 * first
    assert len(graphs._graphs) == len(rows)
    assert all(torch.equal(step(each, 0.5), wanted[each]) for each in rows)
    graphs.stop()
    assert graphs.held_bytes == 0 and torch.equal(step(3000, 0.5), wanted[3000])


def test_changed_weights_are_used() -> None:
    graphs, step, weight = small_step(64)
    step(8, 0.5)
    graphs.start()
    step(8, 0.5)
    with torch.no_grad():
        weight.mul_(1.5)
    replayed = step(8, 0.25)
    graphs.stop()
    assert torch.equal(step(8, 0.25), replayed)
