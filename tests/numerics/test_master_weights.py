"""Float32 master weights, which the optimizer updates, and bfloat16 copies, with which the network computes."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import torch
from torch import nn

from tests.support.runs import StopAfter, equal, lora_tensors
from trainer_core.adapters.master_weights import master_weights
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import BatchingConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from trainer_core.run import train_lora


def layer() -> nn.Linear:
    made = nn.Linear(6, 5, bias=False)
    nn.init.uniform_(made.weight, -1, 1)
    return made


def test_under_float32_there_is_one_set_of_weights():
    made = layer()
    weights = master_weights({"a": made.weight}, torch.float32)
    assert weights.masters["a"] is weights.copies["a"] is made.weight


def test_the_masters_keep_what_bfloat16_would_lose():
    made = layer()
    first = made.weight.detach().clone()
    weights = master_weights({"a": made.weight}, torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16 and torch.equal(weights.masters["a"], first)
    for _ in range(64):
        with torch.no_grad():
            weights.masters["a"].add_(1e-4)
        weights.publish()
    torch.testing.assert_close(weights.masters["a"].data, first + 64e-4, rtol=0, atol=1e-5)
    assert torch.equal(made.weight, weights.masters["a"].bfloat16())


def test_gradients_are_added_up_in_float32():
    made = layer()
    weights = master_weights({"a": made.weight}, torch.bfloat16)
    inputs = [torch.full((1, 6), size, dtype=torch.bfloat16) for size in (1.0, 2**-9, 2**-9)]
    for each in inputs:
        made(each).sum().backward()
    assert made.weight.grad is None
    gradient = weights.masters["a"].grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((5, 6), 1 + 2**-8)), "in bfloat16 the sum would stay at 1"


def test_nothing_keeps_the_weights_alive():
    gc.disable()  # reference counting alone must free them
    try:
        made = layer()
        weights = master_weights({"a": made.weight}, torch.bfloat16)
        gone = [weakref.ref(each["a"]) for each in (weights.masters, weights.copies)]
        del made, weights
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_a_bf16_run_goes_on_bit_for_bit(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path):
    config = TrainConfig(
        run_dir=str(tmp_path / "whole"),
        encoded=str(encoded.manifest),
        model=dataclasses.replace(model, mixed_precision="bf16"),
        max_train_steps=4,
        lora=LoraConfig(lora_rank=4),
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_warmup_steps=0),
        batching=BatchingConfig(gradient_accumulation_steps=2),
    )
    broken = dataclasses.replace(config, run_dir=str(tmp_path / "broken"))
    first = train_lora(broken, StopAfter(3))
    assert first.lora_file is None and 0 < first.steps_done < 4
    assert equal(lora_tensors(train_lora(broken)), lora_tensors(train_lora(config)))
