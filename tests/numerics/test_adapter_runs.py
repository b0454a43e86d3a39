"""Runs with each kind of adapter: a resumed run equals the uninterrupted one, and a run can start from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import Steps, StopAfter
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
    resume_key,
)
from trainer_core.files import read_metadata
from trainer_core.memory import placement
from trainer_core.memory.streaming import BlockStream
from trainer_core.run import train_lora

KINDS = {
    "rslora": LoraConfig(lora_rank=4, use_rslora=True, rank_pattern=("1 = 2",)),
    "dora": LoraConfig(lora_rank=4, lora_type="dora", lora_dropout=0.1),
    "lokr": LoraConfig(lora_rank=2, lora_type="lokr", lokr_factor=4),
}


@pytest.fixture(params=list(KINDS))
def config(request: pytest.FixtureRequest, encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Four steps on quantised weights, with a checkpoint after step 2."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=dataclasses.replace(model, base_model_precision="int8-quanto"),
        max_train_steps=4,
        lora=KINDS[request.param],
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_warmup_steps=1),
        batching=BatchingConfig(gradient_accumulation_steps=1),
        checkpoints=CheckpointConfig(checkpoint_step_interval=2),
        validation=ValidationConfig(validation_step_interval=0, num_validation_images=0),
    )


def test_stopped_and_continued_equals_the_unbroken_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    """The broken run streams its two blocks, here through one buffer."""
    monkeypatch.setattr(placement, "BlockStream", lambda blocks, device, _: BlockStream(blocks, device, 1))
    unbroken = train_lora(config)
    streamed = MemoryConfig(memory="manual", blocks_to_stream=2)
    broken = dataclasses.replace(config, run_dir=config.run_dir + "-broken", memory=streamed)
    assert train_lora(broken, StopAfter(2)).lora_file is None
    continued = train_lora(broken)
    assert unbroken.lora_file is not None and continued.lora_file is not None
    first, second = load_file(unbroken.lora_file), load_file(continued.lora_file)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert read_metadata(continued.lora_file)["qwen_edit_trainer.lora_type"] == config.lora.lora_type


def test_a_run_goes_on_from_the_file_of_another(config: TrainConfig):
    """Its first loss is that of the trained adapter, not of the base. The file may move without a new run."""
    before, after = Steps(), Steps()
    result = train_lora(config, before)
    start = dataclasses.replace(config.lora, init_lora=str(result.lora_file), lora_dropout=0.0)
    again = dataclasses.replace(config, run_dir=config.run_dir + "-again", lora=start, max_train_steps=1)
    train_lora(again, after)
    assert after.reports[0].loss < before.reports[0].loss
    moved = dataclasses.replace(start, init_lora=f"elsewhere/{Path(start.init_lora).name}")
    assert resume_key(dataclasses.replace(again, lora=moved)) == resume_key(again)
