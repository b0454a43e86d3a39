"""Optimizers and learning-rate schedules against the libraries they come from, and optimizer state in checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from schedulefree import AdamWScheduleFreeReference
from torch import nn

from trainer_core.config import JobConfig, ModelConfig, OptimizerConfig, TrainConfig, from_json
from trainer_core.config.optimizer import WAVES, OptimizerName, SchedulerName
from trainer_core.errors import ConfigError, JobError, MissingPackageError, RunFolderError
from trainer_core.planning.preparation import check_training
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.rng import stream
from trainer_core.training.optimizer import optimizer_builder, optimizer_bytes, set_learning_rate
from trainer_core.training.optimizer_state import optimizer_tensors, restore_optimizer, weights_to_use
from trainer_core.training.schedule import learning_rate_at

ON_CPU = [name for name in get_args(OptimizerName) if name != "adamw-8bit"]
SHAPES = {"a.lora_A": (4, 24), "a.lora_B": (32, 4), "b.lora_A": (4, 96), "b.lora_B": (16, 4)}


def optimizer_config(name: OptimizerName, **changes: Any) -> OptimizerConfig:
    rate = {"prodigy": 1.0, "lion": 3e-3}.get(name, 1e-2)
    return OptimizerConfig(**{"optimizer": name, "learning_rate": rate, "lr_warmup_steps": 3, **changes})


def fresh_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """The weights of a fresh adapter: A is random, B is zero."""
    return {
        name: nn.Parameter(
            torch.zeros(shape, dtype=dtype)
            if name.endswith("B")
            else torch.randn(shape, generator=stream(0, "weights", name)).to(dtype)
        )
        for name, shape in SHAPES.items()
    }


def build_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return optimizer_builder(config, torch.device("cpu"))(list(parameters.values()))


def take_steps(parameters: dict[str, nn.Parameter], optimizer: Any, config: OptimizerConfig, steps: range) -> None:
    """Takes steps with noisy gradients towards one, at the learning rates that training uses."""
    for step in steps:
        set_learning_rate(optimizer, learning_rate_at(step, 20, config))
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=stream(step, "gradient", name)).to(parameter.dtype)
            parameter.grad = parameter.detach() - 1 + 0.1 * noise
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", [name for name in get_args(SchedulerName) if name not in WAVES])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 11), (10, 60)])
def test_courses_are_diffusers_without_the_step_at_zero(name: SchedulerName, warmup: int, steps: int) -> None:
    warmup = 0 if name == "constant" else warmup
    config = OptimizerConfig(
        learning_rate=3e-4,
        lr_scheduler=name,
        lr_warmup_steps=warmup,
        lr_num_cycles=3,
        lr_power=1.7,
        lr_end=2e-6,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    extra = {"lr_end": 2e-6} if name == "polynomial" else {}
    if extra:
        from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

        theirs = get_polynomial_decay_schedule_with_warmup(optimizer, warmup + 1, steps + 1, power=1.7, **extra)
    else:
        theirs = get_scheduler(
            name, optimizer, num_warmup_steps=warmup + 1, num_training_steps=steps + 1, num_cycles=3, power=1.7
        )
    for step in range(steps + 1):
        optimizer.step()
        theirs.step()
        assert learning_rate_at(step, steps, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)


# Rates that SimpleTuner 4.8's own schedulers set before steps 0, 1, 50, 99, 100, 150, 200, 500 and 999, with
# learning_rate 1e-4, lr_end 4e-7 and lr_warmup_steps 100
SIMPLETUNER = {
    "cosine_wave": [1e-4, 9.9975e-5, 5.02e-5, 4.24e-7, 4e-7, 5.0199e-5, 1e-4, 4e-7, 9.9975e-5],
    "sine_wave": [5.02e-5, 5.1764e-5, 1e-4, 5.1764e-5, 5.02e-5, 4e-7, 5.0199e-5, 5.02e-5, 4.8635e-5],
}


@pytest.mark.parametrize("name", WAVES)
def test_waves_are_simpletuners_cosine_and_sine(name: SchedulerName) -> None:
    config = OptimizerConfig(learning_rate=1e-4, lr_scheduler=name, lr_warmup_steps=0, lr_wave_steps=100, lr_end=4e-7)
    steps = (0, 1, 50, 99, 100, 150, 200, 500, 999)
    assert [learning_rate_at(step, 1000, config) for step in steps] == pytest.approx(SIMPLETUNER[name], abs=1.01e-9)
    assert learning_rate_at(500, 10, config) == learning_rate_at(500, 1000, config)
    after = dataclasses.replace(config, lr_warmup_steps=10)
    assert [learning_rate_at(10 + step, 1000, after) for step in steps] == pytest.approx(SIMPLETUNER[name], abs=1.01e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "prodigy"}, "learning_rate must be 0.1 to 10 with optimizer prodigy.*set it to 1, got 0.0001"),
        ({"learning_rate": 1.0}, "learning_rate must be above 0 and below 1.*prodigy.*got 1.0"),
        (
            {"optimizer": "adamw-schedulefree", "lr_scheduler": "cosine"},
            "with optimizer adamw-schedulefree.*got 'cosine'",
        ),
        (
            {"optimizer": "adamw-schedulefree", "adam_beta1": 0.0},
            "adam_beta1 must be above 0 with optimizer adamw-schedulefree",
        ),
        (
            {"lr_scheduler": "constant"},
            "lr_warmup_steps must be 0 with lr_scheduler constant.*constant_with_warmup.*got 10",
        ),
        ({"lr_scheduler": "polynomial", "lr_end": 1e-3}, r"lr_end must be below learning_rate \(0.0001\).*got 0.001"),
        ({"lr_scheduler": "sine_wave", "lr_end": 1e-3}, r"lr_end must be at most learning_rate \(0.0001\).*got 0.001"),
        (
            {"optimizer": "adamw-schedulefree", "lr_scheduler": "cosine_wave"},
            "with optimizer adamw-schedulefree.*got 'cosine_wave'",
        ),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"lr_num_cycles": 0}, "lr_num_cycles must be 1 or more, got 0"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_run(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**change)


def test_a_warm_up_as_long_as_the_run_is_refused_where_the_rate_should_fall() -> None:
    cosine = OptimizerConfig(lr_scheduler="cosine", lr_warmup_steps=50)
    with pytest.raises(ConfigError, match=r"lr_warmup_steps must be less than max_train_steps \(50\) with"):
        TrainConfig(run_dir="run", encoded="x.json", max_train_steps=50, optimizer=cosine)
    job = {"model": {}, "dataset": {"target_dir": "a", "reference_dirs": ["b"]}, "cache_dir": "c", "run_dir": "r"}
    with pytest.raises(ConfigError, match=r"lr_warmup_steps must be less.*got 50"):
        from_json(JobConfig, {**job, "max_train_steps": 40, "optimizer": dataclasses.asdict(cosine)})
    TrainConfig(run_dir="run", encoded="x.json", max_train_steps=4)  # allowed: the run may be extended later


@pytest.mark.parametrize("name", ON_CPU)
def test_the_state_goes_through_tensors_bit_for_bit(name: OptimizerName) -> None:
    config = optimizer_config(name)
    parameters = fresh_parameters()
    optimizer = build_optimizer(parameters, config)
    take_steps(parameters, optimizer, config, range(6))
    tensors = {key: value.clone() for key, value in optimizer_tensors(optimizer, parameters).items()}
    restored = {key: nn.Parameter(value.detach().clone()) for key, value in parameters.items()}
    again = build_optimizer(restored, config)
    restore_optimizer(again, restored, tensors)
    take_steps(parameters, optimizer, config, range(6, 12))
    take_steps(restored, again, config, range(6, 12))
    assert all(torch.equal(parameters[key], restored[key]) for key in parameters)
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    last, last_again = (optimizer_tensors(each, own) for each, own in ((optimizer, parameters), (again, restored)))
    assert last.keys() == last_again.keys() and all(torch.equal(last[key], last_again[key]) for key in last)


@pytest.mark.parametrize("name", ON_CPU)
def test_every_optimizer_gets_nearer_and_its_state_weighs_what_the_table_says(name: OptimizerName) -> None:
    config = optimizer_config(name, weight_decay=0.0)
    parameters = fresh_parameters()
    before = sum(float((parameter.detach() - 1).square().sum()) for parameter in parameters.values())
    optimizer = build_optimizer(parameters, config)
    take_steps(parameters, optimizer, config, range(20))
    with weights_to_use(optimizer, parameters):
        after = sum(float((parameter.detach() - 1).square().sum()) for parameter in parameters.values())
    assert after < 0.95 * before
    held = {
        key: value for key, value in optimizer_tensors(optimizer, parameters).items() if not key.startswith("group/")
    }
    weighed = sum(value.nbytes for value in held.values())
    zeros = 4 * sum(p.numel() for key, p in parameters.items() if key.endswith("B"))  # Prodigy keeps no copy of zeros
    expected = optimizer_bytes(name, SHAPES.values()) - (zeros if name == "prodigy" else 0)
    assert expected <= weighed <= expected + 16 * len(held)


def test_state_of_other_layers_is_refused() -> None:
    config, parameters = optimizer_config("prodigy"), fresh_parameters()
    optimizer = build_optimizer(parameters, config)
    take_steps(parameters, optimizer, config, range(2))
    tensors = optimizer_tensors(optimizer, parameters)
    with pytest.raises(RunFolderError, match="does not match the layers"):
        restore_optimizer(optimizer, {"c.lora_A": parameters["a.lora_A"]}, tensors)


def test_prodigy_finds_a_rate_of_its_own_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    config, parameters = optimizer_config("prodigy"), fresh_parameters()
    optimizer = build_optimizer(parameters, config)
    first = set_learning_rate(optimizer, 1.0)
    take_steps(parameters, optimizer, config, range(12))
    assert set_learning_rate(optimizer, 1.0) > 100 * first
    assert set_learning_rate(optimizer, 0.5) == 0.5 * optimizer.param_groups[0]["d"]
    assert capsys.readouterr().out == ""


def test_schedule_free_weights_to_use_are_the_authors_average() -> None:
    """The authors' reference implementation stores the average x; ours computes it from y and z."""
    config = optimizer_config("adamw-schedulefree", weight_decay=0.02)
    ours, theirs = fresh_parameters(torch.float64), fresh_parameters(torch.float64)
    optimizer = build_optimizer(ours, config)
    plain = AdamWScheduleFreeReference(theirs.values(), lr=1e-2, weight_decay=0.02)
    plain.train()
    take_steps(ours, optimizer, config, range(15))
    take_steps(theirs, plain, config, range(15))
    plain.eval()
    trained = {name: parameter.detach().clone() for name, parameter in ours.items()}
    with weights_to_use(optimizer, ours):
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name])
            assert not torch.equal(parameter, trained[name])
    assert all(torch.equal(ours[name], trained[name]) for name in ours)


def test_trained_weights_come_back_after_an_error_too() -> None:
    config, parameters = optimizer_config("adamw-schedulefree"), fresh_parameters()
    optimizer = build_optimizer(parameters, config)
    take_steps(parameters, optimizer, config, range(3))
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(KeyError), weights_to_use(optimizer, parameters):
        raise KeyError
    assert all(torch.equal(parameters[name], trained[name]) for name in parameters)
    take_steps(parameters, optimizer, config, range(3, 4))  # the optimizer is in training mode again


def test_adamw_8bit_without_cuda_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    config = TrainConfig(
        run_dir="run",
        encoded="x.json",
        model=ModelConfig(base=str(tmp_path / "nothing here"), device="cpu"),
        optimizer=OptimizerConfig(optimizer="adamw-8bit"),
    )
    with pytest.raises(JobError, match=r"optimizer 'adamw-8bit' must run on a CUDA device, got cpu.*lion"):
        check_training(config, BaseModel(config.model))


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("lion", "lion_pytorch", "lion-pytorch"),
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("adamw-schedulefree", "schedulefree", "schedulefree"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(
    name: OptimizerName, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=f"optimizer {name} needs.*pip install {package}"):
        build_optimizer(fresh_parameters(), optimizer_config(name))


def test_8bit_state_is_counted_as_bitsandbytes_keeps_it() -> None:
    assert optimizer_bytes("adamw-8bit", [(16, 4096)]) == 16 * 4096 * 2 + 16 * 4096 // 256 * 8
    assert optimizer_bytes("adamw-8bit", [(4, 64)]) == 4 * 64 * 8  # too small to be stored in 8-bit blocks


def test_numbers_of_the_group_come_back_by_whatever_name() -> None:
    """A library's next version may store its values in the parameter group under other names."""
    weight = torch.nn.Parameter(torch.ones(2))
    weights = {"layer.lora_A": weight}
    optimizer, restored = (torch.optim.AdamW([weight], lr=0.1) for _ in range(2))
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0].update(new_name=2.5, counted=7)
    restore_optimizer(restored, weights, optimizer_tensors(optimizer, weights))
    assert restored.param_groups[0]["new_name"] == 2.5
    assert restored.param_groups[0]["counted"] == 7
