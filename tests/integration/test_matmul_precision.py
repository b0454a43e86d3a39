"""The setting matmul_precision: what is refused, what `auto` chooses, and that a run keeps its choice."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import StopAfter, equal, lora_tensors, named, twelve_steps
from trainer_core import products
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import ModelConfig, TrainConfig
from trainer_core.errors import ConfigError, JobError, MissingPackageError
from trainer_core.planning import preparation
from trainer_core.planning.preparation import check_training
from trainer_core.precision import eight_bit
from trainer_core.products import LEAST_COSINE
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora

CUDA = torch.device("cuda")
Timed = Callable[[float, float], None]


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    model = dataclasses.replace(model, base_model_precision="int8-quanto", mixed_precision="bf16")
    return dataclasses.replace(twelve_steps(encoded, model, tmp_path / "run"), max_train_steps=4)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """Sets the seconds that a layer takes in bf16 and in 8 bits, as if this machine had a card that multiplies both."""

    def set_times(exact: float, fast: float) -> None:
        monkeypatch.setattr(products, "_is_able", lambda _: True)
        monkeypatch.setattr(products, "_layer_seconds", lambda *_, in_8_bits: fast if in_8_bits else exact)
        monkeypatch.setattr(products, "no_graphs_because", lambda *_: "")

    return set_times


def choice(config: TrainConfig) -> str:
    return json.loads((Path(config.run_dir) / "run.json").read_text(encoding="utf-8"))["matmul_precision"]


def with_products(config: TrainConfig, name: str, wish: str) -> TrainConfig:
    return named(config, name, model=dataclasses.replace(config.model, matmul_precision=wish))


def test_auto_takes_what_is_faster_and_says_why(
    config: TrainConfig, timed: Timed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    timed(0.003, 0.002)
    fast = lora_tensors(train_lora(config))
    assert choice(config) == "8bit"
    said = next(message for message in caplog.messages if message.startswith("Quantised layers"))
    assert said.startswith("Quantised layers multiply 8-bit numbers: the products of a layer with ")
    assert "take 2.00 ms in 8 bits and 3.00 ms in bf16" in said and f"(at least {LEAST_COSINE:.2f} is needed)" in said
    assert equal(fast, lora_tensors(train_lora(with_products(config, "8bit", "8bit"))))
    timed(0.002, 0.003)
    slow = named(config, "slow")
    exact = lora_tensors(train_lora(slow))
    assert choice(slow) == "bf16" and "take 3.00 ms in 8 bits and 2.00 ms in bf16" in caplog.messages[-1]
    assert equal(exact, lora_tensors(train_lora(with_products(config, "bf16", "bf16"))))
    assert not equal(exact, fast)


def test_auto_rounds_nothing_in_a_run_in_float32(config: TrainConfig, timed: Timed) -> None:
    timed(0.003, 0.002)
    exact = named(config, "float32", model=dataclasses.replace(config.model, mixed_precision="no"))
    train_lora(exact)
    assert choice(exact) == "bf16"


@pytest.mark.parametrize(("has_room", "taken"), [(True, "8bit"), (False, "bf16")])
def test_steps_that_launch_too_much_must_be_cuda_graphs(
    has_room: bool,
    taken: str,
    config: TrainConfig,
    timed: Timed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A layer is faster in 8 bits, but a step without graphs is not."""
    caplog.set_level(logging.INFO)
    timed(0.003, 0.002)
    rehearsed = products._rehearsed

    def slow(*given: object, in_8_bits: bool) -> object:
        return rehearsed(*given, in_8_bits=in_8_bits)._replace(seconds=0.9 if in_8_bits else 0.6)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "_rehearsed", slow)
    monkeypatch.setattr(products, "no_graphs_because", lambda *_: "" if has_room else "there is no room")
    train_lora(config)
    assert choice(config) == taken
    assert ("0.90 s in 8 bits and 0.60 s in bf16, and it can't be a CUDA graph, because there" in caplog.text) == (
        not has_room
    )


def test_auto_stays_with_bf16_if_gradients_change(
    config: TrainConfig, timed: Timed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    timed(0.003, 0.002)
    quantised = eight_bit.quantised

    def coarse(x: torch.Tensor, dtype: torch.dtype, *others: Any, **gelu: Any) -> eight_bit.Coded:
        coded = quantised(x, dtype, *others, **gelu)
        return coded._replace(codes=coded.codes // 32 * 32)

    monkeypatch.setattr(eight_bit, "quantised", coarse)
    train_lora(config)
    assert choice(config) == "bf16"
    assert any(message.startswith("Quantised layers multiply bf16 numbers:") for message in caplog.messages)


def test_a_continued_run_keeps_its_choice(config: TrainConfig, timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(0.003, 0.002)
    assert train_lora(config, StopAfter(3)).lora_file is None
    timed(0.002, 0.003)  # another card
    resumed = lora_tensors(train_lora(config))
    assert choice(config) == "8bit"
    assert equal(resumed, lora_tensors(train_lora(with_products(config, "8bit", "8bit"))))


def test_a_run_that_an_older_version_began_goes_on_with_bf16(config: TrainConfig, timed: Timed) -> None:
    timed(0.003, 0.002)
    exact = with_products(config, "exact", "bf16")
    assert 0 < train_lora(exact, StopAfter(5)).steps_done < 4
    place = Path(exact.run_dir) / "run.json"
    state = json.loads(place.read_text(encoding="utf-8"))
    del state["matmul_precision"]
    del state["key"]["model"]["matmul_precision"]
    place.write_text(json.dumps(state), encoding="utf-8")
    resumed = train_lora(with_products(exact, "exact", "auto"))
    assert choice(exact) == "bf16"
    assert equal(lora_tensors(resumed), lora_tensors(train_lora(with_products(config, "whole", "bf16"))))


def test_a_run_in_8_bits_is_refused_where_it_cannot_go_on(
    config: TrainConfig, timed: Timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(0.003, 0.002)
    assert train_lora(config, StopAfter(3)).lora_file is None
    monkeypatch.setattr(products, "check_device", lambda _, *what: eight_bit.check_device(CUDA, *what))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 2080")
    with pytest.raises(
        ConfigError,
        match=r"This run.* needs a card with compute capability 8\.0 .*RTX 2080 has 7\.5\. Continue it where",
    ):
        train_lora(config)


def test_what_a_machine_lacks_is_refused_with_all_other_problems(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "check_device", lambda _, *what: eight_bit.check_device(CUDA, *what))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr("trainer_core.packages.find_spec", lambda _: None)
    wrong = with_products(config, "run", "8bit")
    wrong = dataclasses.replace(wrong, optimizer=dataclasses.replace(wrong.optimizer, optimizer="adamw-8bit"))
    with pytest.raises(JobError) as caught:
        check_training(wrong, BaseModel(wrong.model))
    assert "matmul_precision 8bit needs the package triton" in str(caught.value)
    assert "adamw-8bit" in str(caught.value)
    auto = with_products(config, "run", "auto")
    check_training(auto, BaseModel(auto.model))
    with pytest.raises(MissingPackageError):
        eight_bit.check_device(CUDA, "This")
    with pytest.raises(ConfigError, match="needs a CUDA device or the CPU, but the device is mps"):
        eight_bit.check_device(torch.device("mps"), "matmul_precision 8bit")


def test_8_bits_need_quantised_weights(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="matmul_precision must be auto or bf16 if base_model_precision is none"):
        dataclasses.replace(config.model, base_model_precision="none", matmul_precision="8bit")
    kept = dataclasses.replace(config.model, base_model_precision="file", matmul_precision="8bit")
    run = dataclasses.replace(config, model=kept)
    with pytest.raises(ConfigError, match=r"transformer has weights that are not quantised\. Set base_model_precision"):
        check_training(run, BaseModel(kept))
