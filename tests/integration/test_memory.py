"""Memory in a run: chosen settings, a dry step that changes nothing, and out of memory without losing steps."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from threading import Lock, current_thread
from time import sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import write_job
from tests.support.narrow import make_pairs, small_encoding
from trainer_core.__main__ import main
from trainer_core.conditioning import batches
from trainer_core.conditioning.batches import BatchLoader, BatchPlan, Draw, RankPlan
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import BatchingConfig, LoraConfig, MemoryConfig, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import OutOfMemoryError
from trainer_core.memory.compilation import Compilation
from trainer_core.planning import choose as choose_module
from trainer_core.planning.choose import Budget
from trainer_core.planning.plan import GIB
from trainer_core.planning.preparation import prepare_training
from trainer_core.planning.workload import largest_draws, workload_of_encoded
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.ranks import SINGLE_PROCESS
from trainer_core.run import TrainResult, train_lora
from trainer_core.runs.folder import RunFolder
from trainer_core.training import pair_losses as losses_module
from trainer_core.training import step as step_module
from trainer_core.training import validation as validation_module


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Four steps with dropout, and a validation after every second one."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=4,
        lora=LoraConfig(lora_rank=2, lora_dropout=0.1),
        batching=BatchingConfig(gradient_accumulation_steps=2),
        validation=ValidationConfig(
            validation_step_interval=2,
            validation_num_inference_steps=1,
            num_validation_images=1,
            strength_sweep="none",
        ),
    )


def named(config: TrainConfig, name: str, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).with_name(name)), **changes)


def lora_of(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.lora_file is not None
    return load_file(result.lora_file)


def is_equal(first: TrainResult, second: TrainResult) -> bool:
    one, other = lora_of(first), lora_of(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def runs_out_at(call: int, monkeypatch: pytest.MonkeyPatch, module: object, function: str) -> None:
    """Makes a function of a module run out of memory at call number `call`, counted from 1."""
    original, calls = getattr(module, function), iter(range(1, 10**6))

    def predict(*arguments):
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return original(*arguments)

    monkeypatch.setattr(module, function, predict)


def test_out_of_memory_in_a_step_keeps_the_steps_before_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train_lora(config)
    broken = named(config, "broken")
    with monkeypatch.context() as patch:
        runs_out_at(6, patch, losses_module, "predict_velocities")
        with pytest.raises(OutOfMemoryError, match=r"in step 3\. The run is saved up to step 2\. What helps most: "):
            train_lora(broken)
    kept = RunFolder(Path(broken.run_dir)).latest_checkpoint()
    assert kept is not None and kept.step == 2
    assert is_equal(train_lora(broken), unbroken)


def test_out_of_memory_in_the_validation_keeps_its_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = train_lora(config)
    broken = named(config, "broken")
    with monkeypatch.context() as patch:
        runs_out_at(3, patch, validation_module, "predict_velocity")
        with pytest.raises(
            OutOfMemoryError, match=r"the validation of step 2\. .*validation_resolution.* helps most: "
        ):
            train_lora(broken)
    kept = RunFolder(Path(broken.run_dir)).latest_checkpoint()
    assert kept is not None and kept.step == 2
    assert is_equal(train_lora(broken), unbroken)


def test_a_dry_step_changes_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on CUDA makes a dry step when it starts or resumes. Here one is made before every step."""
    plain = train_lora(config)
    made = []
    original = step_module.step_gradients

    def with_dry_step(networks, loader, done, config, observer):
        before = torch.get_rng_state()
        step_module.rehearse(networks, loader.read(loader.plan[3]), config)
        made.append(all(weight.grad is None for weight in networks.lora.values()))
        assert torch.equal(before, torch.get_rng_state())
        return original(networks, loader, done, config, observer)

    monkeypatch.setattr("trainer_core.run.step_gradients", with_dry_step)
    assert is_equal(train_lora(named(config, "dry")), plain)
    assert made == [True] * 4


def test_pairs_are_read_one_at_a_time_after_a_dry_step(
    encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry step leaves a prefetched micro-batch unused. The cache of pairs and the VAE are not thread-safe."""
    original, reading, readers = EncodedDataset.load, Lock(), []

    def load(*arguments: Any, **named: Any) -> Any:
        assert reading.acquire(blocking=False), "two threads read at the same time"
        try:
            readers.append(current_thread())
            sleep(0.05)
            return original(*arguments, **named)
        finally:
            reading.release()

    monkeypatch.setattr(EncodedDataset, "load", load)
    plan = RankPlan(BatchPlan(encoded, BatchingConfig(), 0), SINGLE_PROCESS, 1)
    monkeypatch.setattr(batches, "MEMORY_BYTES", 1)
    with BatchLoader(encoded, plan) as loader:
        for number in (2, 0, 1, 2):
            assert loader[number].draws == plan[number]
    assert len(set(readers)) == 1


def test_where_two_threads_must_not_compute_pairs_are_read_by_the_caller(
    encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch crashes if references are encoded on MPS while another thread trains on it."""
    original, readers = EncodedDataset.load, []

    def load(*arguments: Any, **named: Any) -> Any:
        readers.append(current_thread())
        return original(*arguments, **named)

    monkeypatch.setattr(EncodedDataset, "load", load)
    plan = RankPlan(BatchPlan(encoded, BatchingConfig(), 0), SINGLE_PROCESS, 1)
    with BatchLoader(encoded, plan, in_background=False) as loader:
        assert [loader[number].draws for number in (0, 1)] == [plan[0], plan[1]]
        assert loader.read(plan[2]).draws == plan[2]
    assert set(readers) == {current_thread()}


def test_the_largest_micro_batch_is_found(model: ModelConfig, tmp_path: Path) -> None:
    """Not smaller than any of the run, with the longest prompts of its size."""
    pairs = pair_folders(make_pairs(tmp_path / "pairs", 6, ((96, 96), (192, 96), (96, 192))))
    encoded = encode_dataset(pairs, BaseModel(model), small_encoding(num_eval_images=0), tmp_path / "cache")
    batching = BatchingConfig(train_batch_size=2)
    plan = BatchPlan(encoded, batching, 0)
    micro_batches = [plan[number] for number in range(40)]

    def latents(draws: tuple[Draw, ...]) -> int:
        return sum(h * w for draw in draws for _, h, w in encoded.pairs[draw.pair].shapes)

    def prompts(draws: tuple[Draw, ...]) -> list[int]:
        keys = (encoded.pairs[draw.pair].prompt(draw.caption) for draw in draws)
        return sorted(encoded.prompt_tokens(key) for key in keys)

    work = workload_of_encoded(encoded, batching, ValidationConfig(), encoded)
    largest = largest_draws(encoded, work)
    assert len({latents(draws) for draws in micro_batches}) > 2
    assert len(largest) == 2 and latents(largest) >= max(map(latents, micro_batches))
    of_this_size = [draws for draws in micro_batches if latents(draws) == latents(largest)]
    assert prompts(largest) >= max(map(prompts, of_this_size))
    assert prompts(largest)[-1] == work.train.text_tokens


def test_the_longest_of_all_captions_is_found(encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unequal length, as in a data set with captions of several lines."""
    monkeypatch.setattr(EncodedDataset, "prompt_tokens", lambda _, key: int(key[:3], 16))
    work = workload_of_encoded(encoded, BatchingConfig(), ValidationConfig(), encoded)
    (draw,) = largest_draws(encoded, work)
    found = encoded.pairs[draw.pair]
    same_size = [entry for entry in encoded.pairs if entry.shapes == found.shapes]
    assert found.prompt(draw.caption)[:3] == max(key[:3] for entry in same_size for key in entry.prompts)


def test_compiled_code_that_fails_in_a_validation_repeats_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on without it."""
    original, drawn = validation_module.sample_latents, []

    def sample(*arguments: Any, **named: Any) -> torch.Tensor:
        drawn.append(1)
        return original(*arguments, **named)

    def compiled(forward: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if drawn:
                raise RuntimeError("no code for this graph")
            return forward(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(validation_module, "sample_latents", sample)
    monkeypatch.setattr("trainer_core.run.dry_step", lambda _, networks, *__: networks.compilation.start())
    assert train_lora(config).steps_done == 4
    assert len(drawn) == 3  # the base model's picture once, and the LoRA's in two validations
    assert caplog.text.count("run uncompiled from now on") == 1 and "no code for this graph" in caplog.text


def test_a_step_that_is_repeated_exchanges_its_gradients_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the other processes of a distributed run would wait for it forever."""
    original, attempts, exchanged = step_module.add_up_step, [], []

    def attempt(_: Compilation, compute: Any, clean_up: Any) -> Any:
        attempts.append(True)
        compute()
        clean_up()
        try:
            return compute()
        finally:
            attempts.pop()

    def add_up(*arguments: Any, **named: Any) -> Any:
        exchanged.append(bool(attempts))
        return original(*arguments, **named)

    unbroken = train_lora(config)
    monkeypatch.setattr(Compilation, "attempt", attempt)
    monkeypatch.setattr(step_module, "add_up_step", add_up)
    assert is_equal(train_lora(named(config, "repeated")), unbroken)
    assert exchanged == [False] * 4


def test_auto_chooses_and_trains_the_same(
    config: TrainConfig, encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plenty of memory. config.json keeps the settings as the user gave them."""
    auto = named(config, "auto", gradient_checkpointing=False)
    needs = {}
    for streamed in (0, 1):
        memory = MemoryConfig(
            memory="manual", blocks_to_stream=streamed, activation_offload=True, gradient_checkpointing_blocks=2
        )
        frugal = dataclasses.replace(config, memory=memory, gradient_checkpointing=True)
        needs[streamed] = prepare_training(frugal).memory_plan().needed_device_bytes
    assert needs[1] <= needs[0]
    plenty = Budget(64 * GIB, 64 * GIB)
    monkeypatch.setattr("trainer_core.planning.preparation.budget_of", lambda *_, **__: plenty)
    result = train_lora(auto)
    written = json.loads((Path(auto.run_dir) / "config.json").read_text())
    assert written["gradient_checkpointing"] is False and written["memory"]["memory"] == "auto"
    assert is_equal(result, train_lora(config))


def test_settings_of_ones_own_that_do_not_fit_are_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run starts nevertheless, because the plan includes a margin."""
    monkeypatch.setattr("trainer_core.planning.preparation.budget_of", lambda *_, **__: Budget(GIB // 4, 64 * GIB))
    assert train_lora(named(config, "manual", memory=MemoryConfig(memory="manual"))).lora_file is not None
    said = [record.getMessage() for record in caplog.records if "does not fit" in record.getMessage()]
    assert len(said) == 1
    assert "What helps most:" in said[0]


def test_auto_refuses_before_anything_is_loaded(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_core.planning.preparation.budget_of", lambda *_, **__: Budget(GIB // 4, 64 * GIB))
    monkeypatch.setattr("trainer_core.run.build_networks", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(OutOfMemoryError, match=r"still needs \d+\.\d GiB of VRAM"):
        train_lora(config)
    assert not Path(config.run_dir).exists()


def test_plan_on_the_command_line(model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, model)
    assert main(["plan", str(job)]) == 0
    text = capsys.readouterr().out
    assert "(target 96 x 96, 1 reference: 72 picture tokens" in text and "The run fits" in text
    assert main(["plan", str(job), "--vram", "0.7", "--set", "memory.blocks_to_stream=1"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not (tmp_path / "runs").exists()


def test_free_memory_is_what_the_machine_says() -> None:
    shared = choose_module.budget_of(torch.device("cpu"))
    assert shared.is_shared and shared.host_bytes > GIB // 8
    card = choose_module.budget_of(torch.device("cpu"), 12)
    assert not card.is_shared and 11 * GIB < card.device_bytes < 12 * GIB


@pytest.fixture(autouse=True)
def _log_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
