"""LoRA, rsLoRA, DoRA and LoKr: a fresh adapter changes nothing, and a trained one has the same effect as its file."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lokr.layer import Linear as PeftLokr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.adapter_cases import KINDS, inputs, randomise
from trainer_core.adapters.dora import DoraLinear
from trainer_core.adapters.inject import for_file, inject_lora, inject_planned, load_into, without_lora
from trainer_core.adapters.lora import LoraLinear
from trainer_core.adapters.plan import LayerPlan, plan_adapter
from trainer_core.adapters.reader import changed_weight, read_adapter
from trainer_core.adapters.writer import LoraMetadata, check_file, export_lora, to_file_tensors
from trainer_core.config import LoraConfig, ModelConfig, TrainConfig
from trainer_core.errors import ConfigError, ExportError, ModelFileError
from trainer_core.precision.frozen_linear import dense_weight
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import (
    load_transformer,
    predict_velocity,
)

CPU = torch.device("cpu")
PRECISIONS = ["int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def adapted(model: ModelConfig, lora: LoraConfig) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A transformer and the parameters of its randomised adapter."""
    transformer = load_transformer(BaseModel(model), CPU)
    parameters = inject_lora(transformer, plan_adapter(transformer, lora), seed=0)
    randomise(parameters)
    return transformer, parameters


def export(model: ModelConfig, lora: LoraConfig, path: Path, config: LoraConfig | None = None) -> tuple[Path, Tensor]:
    """Exports a randomised adapter. Returns the file, and the velocity with the adapter."""
    transformer, parameters = adapted(model, lora)
    settings = TrainConfig(run_dir="run", encoded="x", model=model, lora=config or lora)
    export_lora(for_file(transformer, parameters), path, LoraMetadata(settings, 1))
    return path, predict_velocity(transformer, *inputs()).detach()


def velocity(model: ModelConfig, lora: LoraConfig) -> Tensor:
    """The velocity with a fresh adapter, which starts from `init_lora` if that is set."""
    transformer = load_transformer(BaseModel(model), CPU)
    inject_lora(transformer, plan_adapter(transformer, lora), seed=0)
    return predict_velocity(transformer, *inputs()).detach()


def names_in_file(path: Path) -> set[str]:
    return {name.removeprefix("diffusion_model.").removesuffix(".weight") for name in load_file(path)}


def close(found: Tensor, wanted: Tensor, relative: float = 1e-5) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < relative


def test_a_fresh_one_changes_nothing_and_alone_is_trainable(kind: str, model: ModelConfig):
    transformer = load_transformer(BaseModel(model), CPU)
    before = predict_velocity(transformer, *inputs())
    parameters = inject_lora(transformer, plan_adapter(transformer, KINDS[kind]), seed=0)
    assert torch.equal(predict_velocity(transformer, *inputs()).detach(), before)
    trainable = {id(weight) for weight in transformer.parameters() if weight.requires_grad}
    assert trainable == {id(weight) for weight in parameters.values()}
    assert all(weight.dtype == torch.float32 for weight in parameters.values())


def test_every_parameter_gets_a_gradient(kind: str, model: ModelConfig):
    transformer, parameters = adapted(model, KINDS[kind])
    predict_velocity(transformer, *inputs()).square().sum().backward()
    assert [name for name, weight in parameters.items() if weight.grad is None or not weight.grad.any()] == []


def test_without_it_the_base_is_back(kind: str, model: ModelConfig):
    base = predict_velocity(load_transformer(BaseModel(model), CPU), *inputs())
    transformer, parameters = adapted(model, KINDS[kind])
    with without_lora(transformer):
        assert torch.equal(predict_velocity(transformer, *inputs()).detach(), base)
    assert all(weight.requires_grad for weight in parameters.values())
    assert not close(predict_velocity(transformer, *inputs()).detach(), base, 0.01)


def test_names_are_those_of_the_file(kind: str, model: ModelConfig, tmp_path: Path):
    _, parameters = adapted(model, KINDS[kind])
    path, _ = export(model, KINDS[kind], tmp_path / "x.safetensors")
    assert names_in_file(path) == set(parameters)


def test_the_file_is_the_whole_effect(kind: str, model: ModelConfig, tmp_path: Path):
    """The velocity is the same with the file loaded into a fresh model, and with the file merged into the weights."""
    path, wanted = export(model, KINDS[kind], tmp_path / "x.safetensors")
    fresh, merged = load_transformer(BaseModel(model), CPU), load_transformer(BaseModel(model), CPU)
    load_into(fresh, path)
    assert close(predict_velocity(fresh, *inputs()), wanted)
    names = [name for name, _ in merged.named_modules()]
    for name, part in read_adapter(path, names).items():
        layer = merged.get_submodule(name)
        layer.weight.data = changed_weight(part, layer.weight.data)
    assert close(predict_velocity(merged, *inputs()), wanted)


def test_half_the_strength_is_half_the_change_of_weights(kind: str, model: ModelConfig, tmp_path: Path):
    path, _ = export(model, KINDS[kind], tmp_path / "x.safetensors")
    half, merged = load_transformer(BaseModel(model), CPU), load_transformer(BaseModel(model), CPU)
    load_into(half, path, 0.5)
    names = [name for name, _ in merged.named_modules()]
    for name, part in read_adapter(path, names).items():
        layer = merged.get_submodule(name)
        layer.weight.data = (layer.weight.data + changed_weight(part, layer.weight.data)) / 2
    assert close(predict_velocity(half, *inputs()), predict_velocity(merged, *inputs()))


def test_started_from_its_own_file_it_goes_on(kind: str, model: ModelConfig, tmp_path: Path):
    path, wanted = export(model, KINDS[kind], tmp_path / "x.safetensors")
    again = dataclasses.replace(KINDS[kind], lora_alpha=2.0, init_lora=str(path), use_rslora=False)
    assert close(velocity(model, again), wanted)


def test_the_number_of_parameters_is_known_beforehand(kind: str, model: ModelConfig, tmp_path: Path):
    _, parameters = adapted(model, KINDS[kind])
    count = sum(weight.numel() for weight in parameters.values())
    empty = BaseModel(model).network
    assert sum(map(math.prod, plan_adapter(empty, KINDS[kind]).shapes())) == count
    path, _ = export(model, KINDS[kind], tmp_path / "x.safetensors")
    other_rank = dataclasses.replace(KINDS[kind], lora_rank=3, rank_pattern=(), init_lora=str(path))
    assert sum(map(math.prod, plan_adapter(empty, other_rank).shapes())) == count


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["dora", "lokr"])
def test_on_quantised_weights(name: str, precision: str, model: ModelConfig, tmp_path: Path):
    """A fresh adapter changes nothing; a trained one acts on the dequantised weights."""
    quantised = dataclasses.replace(model, base_model_precision=precision)
    transformer = load_transformer(BaseModel(quantised), CPU)
    base = predict_velocity(transformer, *inputs())
    parameters = inject_lora(transformer, plan_adapter(transformer, KINDS[name]), seed=0)
    assert torch.equal(predict_velocity(transformer, *inputs()).detach(), base)
    randomise(parameters)
    found = predict_velocity(transformer, *inputs()).detach()
    assert not close(found, base, 0.01)
    dense = load_transformer(BaseModel(model), CPU)
    stored = to_file_tensors(for_file(transformer, parameters), KINDS[name], torch.float32)
    save_file(stored, tmp_path / "x.safetensors")
    for layer, part in read_adapter(tmp_path / "x.safetensors", [each for each, _ in dense.named_modules()]).items():
        weight = dense_weight(transformer.get_submodule(layer).get_base_layer())
        dense.get_submodule(layer).weight.data = changed_weight(part, weight)
    assert close(found, predict_velocity(dense, *inputs()), 2e-3)


@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_dora_is_pefts(scaling: float):
    """Output and gradients equal peft's on an ordinary weight, which peft's own DoRA supports."""
    found = []
    for custom in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = nn.Sequential(nn.Linear(24, 16))
            settings = peft.LoraConfig(
                r=4, lora_alpha=4 * scaling, target_modules=["0"], use_dora=True, init_lora_weights=False
            )
            if custom:
                settings._register_custom_module({nn.Linear: DoraLinear})
            peft.inject_adapter_in_model(settings, network)
            torch.manual_seed(4)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.rand_like(parameter)
            x = torch.randn(5, 24, requires_grad=True)
        y = network(x)
        y.square().sum().backward()
        grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        found.append([y.detach(), x.grad, *grads])
    assert type(network[0]) is DoraLinear
    assert len(found[0]) == len(found[1]) == 5
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_pefts(dtype: torch.dtype, scaling: float, dropout: float):
    """Output and gradients are bit-equal to those of peft's own layer."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(24, 16))
    plan = {"0": LayerPlan(24, 16, 4, scaling)}
    parameters = inject_planned(network, plan, "lora", dropout=dropout)
    layer = network[0]
    assert type(layer) is LoraLinear
    for parameter in parameters.values():
        parameter.data.normal_()
    network.to(dtype)
    given, found = torch.randn(5, 24, dtype=dtype), []
    for forward in (layer, partial(peft.tuners.lora.layer.Linear.forward, layer)):
        torch.manual_seed(4)
        x = given.clone().requires_grad_()
        y = forward(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters.values()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    with without_lora(network):
        assert torch.equal(network(given), layer.base_layer(given))


def test_lokr_is_pefts(model: ModelConfig):
    """Our forward equals peft's, which computes the whole weight change."""
    transformer, _ = adapted(model, KINDS["lokr"])
    for layer in (transformer.get_submodule(f"transformer_blocks.0.{name}") for name in ("attn.to_q", "img_mlp.net.2")):
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(layer(x), PeftLokr.forward(_with_pefts_delta(layer), x), rtol=1e-4, atol=1e-5)


def _with_pefts_delta(layer: nn.Module) -> nn.Module:
    layer._get_delta_activations = PeftLokr._get_delta_activations.__get__(layer)
    return layer


@pytest.mark.parametrize("name", ["dora", "lokr"])
@pytest.mark.parametrize("damage", ["lost", "scaled", "not a number"])
def test_a_file_that_would_do_something_else_gets_no_name(name: str, damage: str, model: ModelConfig, tmp_path: Path):
    transformer, parameters = adapted(model, KINDS[name])
    tensors = for_file(transformer, parameters)

    def spoil(file: Path) -> None:
        stored = load_file(file)
        ending = "dora_scale" if name == "dora" else "lokr_w1"
        first = next(each for each in stored if each.endswith(ending))
        stored[first] = stored[first] * (torch.nan if damage == "not a number" else 1.1)
        if damage == "lost":
            del stored[first]
        save_file(stored, file)
        check_file(file, tensors, KINDS[name], 1e-5)

    settings = TrainConfig(run_dir="run", encoded="x", model=model, lora=KINDS[name])
    with pytest.raises(ExportError, match="not saved"):
        export_lora(tensors, tmp_path / "x.safetensors", LoraMetadata(settings, 1), spoil)
    assert list(tmp_path.glob("*.safetensors")) == []


RENAMED = {
    "diffusers": lambda layer, part: f"transformer.{layer}.{part}.weight",
    "no prefix": lambda layer, part: f"{layer}.{part}.weight",
    "kohya": lambda layer, part: (
        f"lora_unet_{layer.replace('.', '_')}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"
    ),
    "LyCORIS": lambda layer, part: (
        f"lycoris_{layer.replace('.', '_')}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"
    ),
    "raw peft": lambda layer, part: f"base_model.model.{layer}.{part}.default.weight",
    "diffusers of old": lambda layer, part: f"transformer.{layer}.lora.{'down' if part == 'lora_A' else 'up'}.weight",
}


@pytest.mark.parametrize("layout", list(RENAMED))
def test_starts_from_files_of_any_layout(layout: str, model: ModelConfig, tmp_path: Path):
    """The file has its own alpha, and a rank other than the configured one."""
    lora = dataclasses.replace(KINDS["lora"], rank_pattern=(), alpha_pattern=(), lora_alpha=0)
    path, wanted = export(model, lora, tmp_path / "x.safetensors")
    renamed = {}
    for key, tensor in load_file(path).items():
        layer, part = key.removeprefix("diffusion_model.").removesuffix(".weight").rsplit(".", 1)
        name = RENAMED[layout](layer, part)
        renamed[name] = tensor * 2 if part == "lora_B" else tensor
        stem = name.split(".lora")[0].split(".default")[0]
        renamed[f"{stem}.alpha"] = torch.tensor(2.0)  # with rank 4, a scale of 1/2
    save_file(renamed, tmp_path / "y.safetensors")
    start = dataclasses.replace(lora, lora_rank=16, init_lora=str(tmp_path / "y.safetensors"))
    assert close(velocity(model, start), wanted)
    sampled = load_transformer(BaseModel(model), CPU)
    load_into(sampled, tmp_path / "y.safetensors")
    assert close(predict_velocity(sampled, *inputs()), wanted)


def test_a_dora_starts_from_a_plain_lora(model: ModelConfig, tmp_path: Path):
    path, wanted = export(model, KINDS["lora"], tmp_path / "x.safetensors")
    assert close(velocity(model, dataclasses.replace(KINDS["dora"], init_lora=str(path))), wanted)


def test_layers_that_the_file_lacks_start_fresh(model: ModelConfig, tmp_path: Path):
    few = dataclasses.replace(KINDS["lora"], lora_targets="image-attention")
    path, wanted = export(model, few, tmp_path / "x.safetensors")
    assert close(velocity(model, dataclasses.replace(KINDS["lora"], init_lora=str(path))), wanted)


def test_files_that_do_not_suit_are_refused(model: ModelConfig, tmp_path: Path):
    path, _ = export(model, KINDS["lora"], tmp_path / "x.safetensors")
    dora, _ = export(model, KINDS["dora"], tmp_path / "dora.safetensors")
    cases = [
        (KINDS["lokr"], path, ConfigError, "lora_type is lokr. Set lora_type to lora"),
        (KINDS["lora"], dora, ConfigError, "Set lora_type to dora"),
        (LoraConfig(), path, ConfigError, "Choose lora_targets that include them"),
        (LoraConfig(), tmp_path / "none.safetensors", ModelFileError, "is missing"),
    ]
    stored = load_file(path)
    save_file({"transformer.x.hada_w1_a": torch.ones(1, 1)}, tmp_path / "loha.safetensors")
    cases.append((LoraConfig(), tmp_path / "loha.safetensors", ModelFileError, "neither LoRA, DoRA nor LoKr"))
    save_file(
        {name: each[:-1] if "lora_B" in name else each for name, each in stored.items()}, tmp_path / "short.safetensors"
    )
    cases.append((KINDS["lora"], tmp_path / "short.safetensors", ModelFileError, "another model"))
    stored.pop(next(name for name in stored if "lora_A" in name))
    save_file(stored, tmp_path / "half.safetensors")
    cases.append((KINDS["lora"], tmp_path / "half.safetensors", ModelFileError, "is incomplete"))
    for lora, file, error, words in cases:
        with pytest.raises(error, match=words):
            plan_adapter(BaseModel(model).network, dataclasses.replace(lora, init_lora=str(file)))


def test_patterns_set_rank_and_scale(model: ModelConfig):
    lora = LoraConfig(lora_rank=4, rank_pattern=("0 = 2", r".*\.attn\.to_k = 8"), alpha_pattern=("0-1 = 16",))
    transformer = load_transformer(BaseModel(model), CPU)
    parameters = inject_lora(transformer, plan_adapter(transformer, lora), 0)
    ranks = {name: weight.shape[0] for name, weight in parameters.items() if name.endswith("lora_A")}
    assert ranks["transformer_blocks.0.attn.to_k.lora_A"] == 2
    assert ranks["transformer_blocks.1.attn.to_k.lora_A"] == 8
    assert ranks["transformer_blocks.1.attn.to_q.lora_A"] == 4
    assert lora.scale_of("transformer_blocks.0.attn.to_k", 2) == 8
    assert dataclasses.replace(lora, use_rslora=True).scale_of("transformer_blocks.1.attn.to_q", 4) == 8
    with pytest.raises(ConfigError, match="matches none of the 8 layers"):
        plan_adapter(BaseModel(model).network, dataclasses.replace(lora, rank_pattern=("7 = 2",)))


@pytest.mark.parametrize("line", ["0-9", "= 4", "9-3 = 4", "( = 4", "0 = x", "0 = 0", "0 = 2.5"])
def test_wrong_patterns(line: str):
    with pytest.raises(ConfigError, match="rank_pattern"):
        LoraConfig(rank_pattern=(line,))
