"""Settings that are declared as unused change nothing and are accepted. Nodes hide exactly those."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import nn

from tests.support.narrow import planned_size
from trainer_core import config as every_class
from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.conditioning.sizes import large_enough, target_box, target_size
from trainer_core.config import (
    CaptionConfig,
    EmaConfig,
    EncodingConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RolloutConfig,
    SizeConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.data.caption_edits import edited
from trainer_core.errors import ConfigError, DatasetError
from trainer_core.geometry import Size
from trainer_core.planning.choose import Budget
from trainer_core.planning.start import foreseen_plan
from trainer_core.planning.workload import Workload, pair_size
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.settings import Settings, hint_of, limits_of, unused_fields
from trainer_core.training.edit_weight import combined_weights
from trainer_core.training.ema import ema_bytes, start_ema, update_ema, weights_to_validate
from trainer_core.training.objective import add_noise, penalty_at
from trainer_core.training.optimizer import optimizer_builder, set_learning_rate
from trainer_core.training.rollout import draw_offsets, reflexflow_loss, roll_out, rollout_probability
from trainer_core.training.schedule import learning_rate_at

CPU = torch.device("cpu")
LATENTS = torch.linspace(-1, 1, 2 * 16 * 4 * 4).view(2, 16, 4, 4)


def trained(config: OptimizerConfig) -> list[float]:
    """Weights after each of four steps."""
    if config.optimizer == "adamw-8bit":  # needs CUDA; takes the settings that adamw takes
        config = dataclasses.replace(config, optimizer="adamw")
    weight = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.1]]))
    optimizer, found = optimizer_builder(config, CPU)([weight]), list[float]()
    for step in range(4):
        set_learning_rate(optimizer, learning_rate_at(step, 4, config))
        weight.grad = weight.detach() - 1
        optimizer.step()
        found += weight.detach().flatten().tolist()
    return found


def noised(config: NoiseConfig) -> list[Any]:
    noisy = add_noise(LATENTS, config, 0, [0, 1], range(2))
    weights = combined_weights(LATENTS, (LATENTS.flip(3),), LATENTS[:, :1].abs(), None, config)
    penalty = penalty_at(noisy.sigma, config)(LATENTS).flatten().tolist()
    return [noisy.sigma.tolist(), penalty, None if weights is None else weights.tolist()]


def rolled(config: RolloutConfig) -> list[Any]:
    found = list[Any]()
    for step in (0, 1, 3, 9):
        found.append(rollout_probability(step, config))
        for index, latents in enumerate(LATENTS.split(1)):
            noisy = add_noise(latents, NoiseConfig(), 0, [index])
            (offset,) = draw_offsets(config, step, 0, [index])
            out = roll_out(lambda point, sigma: point * sigma.view(-1, 1, 1, 1) + 0.1, noisy, offset, config)
            found += [offset, out.noisy.latents.tolist()]
            if out.forwards and config.scheduled_sampling_reflexflow:  # as training/pair_losses.py
                loss = reflexflow_loss(latents, latents, out, weights=None, penalty=torch.square, rollout=config)
                found.append(loss.tolist())
    return found


def adapted(config: LoraConfig) -> dict[str, Any]:
    """The new adapter's weights, and scale and dropout of each layer."""
    transformer = load_transformer(BaseModel(ModelConfig(mixed_precision="no", tokenizer="not read")), CPU)
    weights = inject_lora(transformer, plan_adapter(transformer, config), seed=0)
    layers = [each for each in transformer.modules() if hasattr(each, "scaling")]
    scales = [(dict(each.scaling), str(getattr(each, "lora_dropout", ""))) for each in layers]  # type: ignore[call-overload]
    return {**{name: weight.detach().numpy().tobytes() for name, weight in weights.items()}, "scales": scales}


def averaged(config: EmaConfig) -> list[Any]:
    weights = {"a": nn.Parameter(torch.ones(2))}
    average = start_ema(weights, config)
    for step in range(1, 9):
        weights["a"].data += step
        update_ema(average, weights, step, config)
    kept = {name: weight.tolist() for name, weight in average.items()}
    return [ema_bytes([(2, 3)], config), kept, list(weights_to_validate(None, None, config))]  # type: ignore[arg-type]


def cropped(config: SizeConfig) -> list[Any]:
    encoding, found = EncodingConfig(sizes=config), list[Any]()
    sizes = (Size(300, 200), Size(900, 600), Size(2400, 3200))
    for size in sizes:
        bucket = target_size(size, encoding)
        found += [bucket, target_box(size, bucket, encoding, "key")]
    pairs: Any = [SimpleNamespace(key=str(size), target="x.png", sizes=[size]) for size in sizes]
    try:
        return [*found, large_enough(pairs, config)[1]]
    except DatasetError as error:
        return [*found, str(error)]


def planned(config: MemoryConfig) -> str:
    settings = TrainConfig(run_dir="run", encoded="data", memory=config)
    network = planned_size({"num_layers": 6}, settings.model, settings.lora)
    pair = pair_size(Size(512, 512), [Size(512, 512)], 100)
    budget, work = Budget(2**40, 2**40), Workload(train=pair, batch=1, validation=pair)
    return str(foreseen_plan(settings, network, work, budget).device)


def drawn_as(config: ValidationConfig) -> list[Any]:
    """How pictures are drawn, and with which LoRA."""
    return [config.drawing, config.validation_lora and config.validation_lora_strength]


def captioned(config: CaptionConfig) -> tuple[str, ...]:
    return edited(("one, two, three. four, five six, seven",), config)


OUTCOMES: dict[type[Settings], Callable[[Any], Any]] = {
    OptimizerConfig: trained,
    NoiseConfig: noised,
    RolloutConfig: rolled,
    LoraConfig: adapted,
    EmaConfig: averaged,
    SizeConfig: cropped,
    MemoryConfig: planned,
    ValidationConfig: drawn_as,
    CaptionConfig: captioned,
}
# Values with which the settings above have an effect, and with which every choice is accepted.
BASE: dict[type[Settings], dict[str, Any]] = {
    OptimizerConfig: {"learning_rate": 0.5},
    RolloutConfig: {"scheduled_sampling_probability": 1.0},
    LoraConfig: {"lora_target_pattern": r".*\.attn\.to_q", "lora_rank": 2},
}


def declared(cls: type[Settings]) -> dict[str, Any]:
    """The settings of a class with conditions, and what they declare."""
    return {field.name: field.metadata for field in dataclasses.fields(cls) if field.metadata.get("used_if")}


def values_of(cls: type[Settings], name: str) -> list[Any]:
    """All choices of a setting, or its default and another value."""
    hint, default = hint_of(cls, name), next(each.default for each in dataclasses.fields(cls) if each.name == name)
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint is bool:
        return [False, True]
    if hint is str:
        return [default, r".*\.attn\.to_k"]
    limits, others = limits_of(cls, name), (3,) if hint is int else (0.25, 0.75, 2.5)
    return [default, next(each for each in others if each != default and limits.accept(hint(each)))]


def cases(cls: type[Settings]) -> Iterator[Settings]:
    """A config for all combinations of the values that decide what is used, as far as they are accepted."""
    deciding = sorted({each.setting for metadata in declared(cls).values() for each in metadata["used_if"]})
    neutral = {name: each["unused"] for name, each in declared(cls).items() if each["unused"] is not None}
    for values in itertools.product(*(values_of(cls, name) for name in deciding)):
        try:
            yield cls(**{**BASE.get(cls, {}), **neutral, **dict(zip(deciding, values, strict=True))})
        except ConfigError:
            continue


CLASSES = [each for each in vars(every_class).values() if isinstance(each, type) and issubclass(each, Settings)]


@pytest.mark.parametrize("cls", filter(declared, CLASSES), ids=lambda cls: cls.__name__)
def test_an_unused_setting_changes_nothing_and_a_used_one_something(cls: type[Settings]):
    unseen = set(declared(cls))
    without_effect = {name for name, each in declared(cls).items() if each["unused"] is None}
    for config in cases(cls):
        given = dataclasses.asdict(config)
        unused = {each.name: each.metadata["unused"] for each in unused_fields(cls, given)}
        changes = {name: values_of(cls, name)[-1] for name, only in unused.items() if only is None}
        unseen -= unused.keys()
        for name, only in unused.items():
            if only is not None:
                with pytest.raises(ConfigError):
                    dataclasses.replace(config, **{name: next(v for v in values_of(cls, name) if v != only)})
        outcome = OUTCOMES[cls](config) if changes or without_effect - unused.keys() else None
        if changes:
            assert OUTCOMES[cls](dataclasses.replace(config, **changes)) == outcome, (config, changes)
        without_effect -= {name for name in without_effect - unused.keys() if has_effect(config, name, outcome)}
    assert (unseen, without_effect) == (set(), set())


def has_effect(config: Settings, name: str, outcome: Any) -> bool:
    """Whether another value of the setting has another outcome."""
    for value in values_of(type(config), name):
        try:
            other = dataclasses.replace(config, **{name: value})
        except ConfigError:
            continue
        if value != getattr(config, name) and OUTCOMES[type(config)](other) != outcome:
            return True
    return False
