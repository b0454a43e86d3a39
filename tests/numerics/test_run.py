"""The training run: the same result after any stop and with any batch size, and weights that are never spoilt."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.forked import Forked
from tests.support.narrow import make_pairs, networks_of, read_rows, small_encoding
from tests.support.runs import Steps, StopAfter, equal, lora_tensors, named, twelve_steps
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    EmaConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    TrainConfig,
    ValidationConfig,
    to_json,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError, NonFiniteLossError
from trainer_core.events import SILENT, StepReport, Stop
from trainer_core.qwen_image import attention, attention_choice
from trainer_core.qwen_image.attention_kernels import CPU
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import TrainResult, train_lora
from trainer_core.training import pair_losses as losses_module
from trainer_core.training import validation as validation_module


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    return twelve_steps(encoded, model, tmp_path / "run")


def test_stopped_at_every_moment_and_continued_equals_the_unbroken_run(
    config: TrainConfig, unbroken: TrainResult
) -> None:
    moments = range(0, 25, 4)
    broken = named(config, "broken")
    pauses = []
    for asked in [*moments, 10**9]:
        result = train_lora(broken, StopAfter(asked))
        pauses.append(result.steps_done)
        if result.lora_file:
            break
        assert result.stopped is Stop.PAUSE
    assert len(set(pauses)) >= 2, f"the run was never interrupted: {pauses}"
    assert equal(lora_tensors(result), lora_tensors(unbroken))
    without_time = [{**row, "seconds": 0} for row in read_rows(Path(broken.run_dir) / "metrics.jsonl")]
    assert without_time == [{**row, "seconds": 0} for row in read_rows(unbroken.run_dir / "metrics.jsonl")]


def test_a_continued_run_computes_attention_as_before(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels that are equally fast on a card change places in the next timing. Here the CPU counts as a card."""

    def rounded(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, length = CPU.forward(*tensors)
        return 1.001 * out, length

    def start(fastest: int) -> None:
        """As a new process would, in which one of the kernels is faster."""
        attention_choice._of_process.clear()
        attention_choice._in_use[0].kernels.clear()
        monkeypatch.setattr(attention_choice, "_shortest", lambda _, kernels, __: kernels[fastest])

    kernels = CPU, dataclasses.replace(CPU, name="rounded", forward=rounded)
    monkeypatch.setattr(attention, "kernel_for", attention_choice._on_card)
    monkeypatch.setattr(attention_choice, "CUDA", kernels)
    monkeypatch.setattr(attention_choice, "installed_kernels", lambda **_: ())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    config = dataclasses.replace(config, max_train_steps=6)
    unbroken = []
    for fastest in (0, 1):
        start(fastest)
        unbroken.append(lora_tensors(train_lora(named(config, f"unbroken {fastest}"))))
    assert not equal(*unbroken)
    start(1)
    assert train_lora(named(config, "broken"), StopAfter(9)).lora_file is None
    start(0)
    assert equal(lora_tensors(train_lora(named(config, "broken"))), unbroken[1])
    start(0)


def test_killed_at_arbitrary_moments_and_continued_equals_the_unbroken_run(config: TrainConfig, tmp_path: Path) -> None:
    """SIGKILL at three arbitrary moments, counted in forward passes and calls."""
    longer = dataclasses.replace(config, max_train_steps=16, optimizer=OptimizerConfig(learning_rate=3e-3))
    unbroken, killed = train_lora(longer), named(longer, "killed")
    (tmp_path / "config.json").write_text(json.dumps(to_json(killed)))
    metrics = Path(killed.run_dir) / "metrics.jsonl"
    for passes, calls in ((5, 1234), (9, 77), (7, 2718)):
        moment = ("predict_velocities", passes, calls)
        process = Forked("tests.support.killed", *moment, "tests.support.train_config", tmp_path / "config.json")
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    assert 0 < len(read_rows(metrics)) < 16, "the kills came too early or too late to interrupt the run"
    result = train_lora(killed)
    assert unbroken.lora_file is not None and result.lora_file is not None
    assert equal(lora_tensors(result), lora_tensors(unbroken))
    assert [row["step"] for row in read_rows(metrics)] == list(range(1, 17))


def test_same_seed_same_run_whatever_the_process_drew(config: TrainConfig, unbroken: TrainResult) -> None:
    torch.rand(17)
    before = torch.get_rng_state()
    assert equal(lora_tensors(train_lora(config)), lora_tensors(unbroken))
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(lora_tensors(train_lora(named(config, "other", seed=6))), lora_tensors(unbroken))


def test_validation_changes_nothing_that_follows(config: TrainConfig, unbroken: TrainResult) -> None:
    never = ValidationConfig(validation_step_interval=0, num_validation_images=0)
    without = train_lora(named(config, "without", validation=never))
    assert equal(lora_tensors(unbroken), lora_tensors(without))
    assert without.samples is None and unbroken.samples is not None
    assert unbroken.samples.grid_file.is_file()
    often = dataclasses.replace(
        config.validation, validation_step_interval=2, validation_resolution="64x128,96", num_validation_images=2
    )
    assert equal(lora_tensors(train_lora(named(config, "often", validation=often))), lora_tensors(without))


def test_memory_settings_change_nothing(config: TrainConfig, unbroken: TrainResult) -> None:
    plain = train_lora(named(config, "plain", gradient_checkpointing=False))
    assert equal(lora_tensors(plain), lora_tensors(unbroken))


def test_one_batch_of_four_equals_four_of_one(model: ModelConfig, tmp_path: Path) -> None:
    """Pictures of different sizes, prompts of different lengths, and a micro-batch in two epochs."""
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 6, ((96, 96), (192, 96), (96, 192))))
    encoded = encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=0), tmp_path / "cache")
    assert len({encoded.load(entry).prompt_embeds.shape for entry in encoded.pairs}) > 1
    reports = {}
    for size in (1, 4):
        observer = Steps()
        train_lora(
            TrainConfig(
                run_dir=str(tmp_path / f"by {size}"),
                encoded=str(encoded.manifest),
                model=model,
                max_train_steps=4,
                lora=LoraConfig(lora_rank=4, lora_targets="all"),
                optimizer=OptimizerConfig(learning_rate=1e-3),
                batching=BatchingConfig(train_batch_size=size, gradient_accumulation_steps=4 // size),
            ),
            observer,
        )
        reports[size] = [(report.loss, report.grad_norm) for report in observer.reports]
    torch.testing.assert_close(torch.tensor(reports[1]), torch.tensor(reports[4]), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(
    config: TrainConfig, optimizer: OptimizerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW skips the update itself; the loop waits before the update of others."""
    chosen = dataclasses.replace(config.optimizer, optimizer=optimizer)
    config = dataclasses.replace(config, optimizer=chosen, ema=EmaConfig(use_ema=True))
    original = losses_module.velocity_loss

    class Poisoner(Steps):
        def on_step(self, report: StepReport) -> None:
            if report.step == 4:
                monkeypatch.setattr(losses_module, "velocity_loss", lambda *tensors: original(*tensors) * float("nan"))

    with pytest.raises(NonFiniteLossError, match=r"in step 5.*loss nan.*weights of step 4.*learning_rate"):
        train_lora(config, Poisoner())
    monkeypatch.setattr(losses_module, "velocity_loss", original)
    checkpoints = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert checkpoints[-1] == "step-000004"
    found, unbroken = (
        train_lora(each) for each in (config, dataclasses.replace(config, run_dir=str(tmp_path / "unbroken")))
    )
    assert equal(lora_tensors(found), lora_tensors(unbroken))
    assert found.ema_file and unbroken.ema_file and equal(load_file(found.ema_file), load_file(unbroken.ema_file))


def test_a_line_lost_between_checkpoint_and_metrics_comes_back(config: TrainConfig, unbroken: TrainResult) -> None:
    paused = train_lora(config, StopAfter(8))
    metrics = Path(config.run_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert len(lines) == paused.steps_done > 1
    metrics.write_text("".join(lines[:-1]) + lines[-1][:20])
    train_lora(config)
    rows, expected = read_rows(metrics), read_rows(unbroken.run_dir / "metrics.jsonl")
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


def test_metrics_and_tensorboard_and_samples_are_written(unbroken: TrainResult) -> None:
    rows = read_rows(unbroken.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation_loss" in row] == [5, 10, 12]
    assert {"loss", "grad_norm", "learning_rate", "loss_by_sigma", "seconds"} <= rows[0].keys()
    assert [path.name for path in sorted((unbroken.run_dir / "samples").glob("*.png"))] == [
        f"step-{step:06d}.png" for step in (5, 10, 12)
    ]
    assert list((unbroken.run_dir / "tensorboard").glob("events*"))
    assert json.loads((unbroken.run_dir / "config.json").read_text())["seed"] == 5


def test_training_lowers_the_loss_on_pairs_it_has_not_seen(config: TrainConfig) -> None:
    lively = dataclasses.replace(
        config,
        max_train_steps=60,
        lora=LoraConfig(lora_rank=16, lora_targets="all"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        validation=ValidationConfig(validation_step_interval=10, num_validation_images=0),
    )
    observer = Steps()
    train_lora(lively, observer)
    losses = [report.validation_loss for report in observer.reports if report.validation_loss is not None]
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_dataset_of_another_flavour_or_with_lost_entries_is_refused(
    config: TrainConfig, base_of: Any, encoded: EncodedDataset
) -> None:
    with pytest.raises(ValueError, match=r"encoded for Qwen-Image-Edit \(edit-v1\), but the model is 2509 \(edit-v2\)"):
        train_lora(dataclasses.replace(config, model=base_of("edit-v2")))
    entry = encoded.pairs[0]
    path = encoded.cache_dir / "latents" / entry.target[:2] / f"{entry.target}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(DatasetError, match=entry.key):
            train_lora(config)
    finally:
        path.write_bytes(whole)


def test_validation_loss_is_the_same_number_for_the_same_weights(config: TrainConfig) -> None:
    from trainer_core.conditioning.encoded import load_encoded
    from trainer_core.qwen_image.transformer import load_transformer

    transformer = load_transformer(BaseModel(config.model), torch.device("cpu"))
    losses = []
    for _ in range(2):
        torch.rand(3)
        validator = validation_module.Validator(
            load_encoded(Path(config.encoded)), BaseModel(config.model), config.validation
        )
        losses.append(validator.loss(transformer, torch.device("cpu"), SILENT))
    assert losses[0] == losses[1] > 0


def test_tokens_stand_where_the_policy_has_them(model: ModelConfig) -> None:
    """ComfyUI and diffusers place odd sides and larger references differently. Training follows its policy."""
    odd, even = [[(1, 6, 7), (1, 8, 9)]], [[(1, 6, 8), (1, 6, 8)]]
    config, cpu = TrainConfig(run_dir="x", encoded="y", model=model), torch.device("cpu")
    placed = {}
    for policy in ("comfyui", "diffusers"):
        embed = networks_of(config, policy).transformer.pos_embed
        placed[policy] = [embed(shapes, max_txt_seq_len=5, device=cpu) for shapes in (odd, even)]
    for part in (0, 1):  # the positions of the pictures, and of the prompt
        assert not torch.equal(placed["comfyui"][0][part], placed["diffusers"][0][part])
        assert torch.equal(placed["comfyui"][1][part], placed["diffusers"][1][part])
