"""The adapter: a fresh one changes nothing, nothing else is trained, and its file has the same effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_core.adapters.inject import inject_lora, load_into, without_lora
from trainer_core.adapters.plan import plan_adapter, target_modules
from trainer_core.adapters.writer import LoraMetadata, check_file, export_lora, read_with_diffusers, to_file_tensors
from trainer_core.config import ExportConfig, LoraConfig, ModelConfig, TrainConfig
from trainer_core.errors import ConfigError, ExportError, ModelFileError
from trainer_core.files import read_metadata
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition

CPU = torch.device("cpu")


def inputs() -> tuple[torch.Tensor, torch.Tensor, Condition]:
    generator = torch.Generator().manual_seed(3)
    latents, reference = (torch.randn(1, 16, 12, 12, generator=generator) for _ in range(2))
    prompt = torch.randn(1, 9, 128, generator=generator)
    return latents, torch.full((1,), 0.6), Condition((reference,), prompt)


def randomise(lora: dict[str, torch.nn.Parameter], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in lora.values():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("targets", ["image-attention", "attention", "attention-mlp", "all"])
def test_a_fresh_adapter_changes_nothing_and_alone_is_trainable(model: ModelConfig, targets: str) -> None:
    transformer = load_transformer(BaseModel(model), CPU)
    before = predict_velocity(transformer, *inputs())
    lora = inject_lora(transformer, plan_adapter(transformer, LoraConfig(lora_rank=4, lora_targets=targets)), seed=0)
    after = predict_velocity(transformer, *inputs())
    assert torch.equal(before, after.detach())
    trainable = {id(weight) for weight in transformer.parameters() if weight.requires_grad}
    assert trainable == {id(weight) for weight in lora.values()}
    assert all(weight.dtype == torch.float32 for weight in lora.values())


@pytest.mark.parametrize("targets", ["image-attention", "attention", "attention-mlp", "all"])
def test_every_adapter_gets_a_gradient(model: ModelConfig, targets: str) -> None:
    """Layers of the last block that have no effect on the output get no adapter."""
    transformer = load_transformer(BaseModel(model), CPU)
    lora = inject_lora(transformer, plan_adapter(transformer, LoraConfig(lora_rank=2, lora_targets=targets)), seed=0)
    randomise(lora)
    predict_velocity(transformer, *inputs()).square().sum().backward()
    dead = [name for name, weight in lora.items() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert dead == []
    skipped = {"transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.add_q_proj"}
    assert skipped.isdisjoint(name.rsplit(".", 1)[0] for name in lora)


def test_first_weights_depend_on_seed_and_name_alone(model: ModelConfig) -> None:
    def fresh(seed: int, targets: str) -> dict[str, torch.nn.Parameter]:
        torch.rand(5)  # the process-wide generator must not matter
        transformer = load_transformer(BaseModel(model), CPU)
        plan = plan_adapter(transformer, LoraConfig(lora_rank=4, lora_targets=targets))
        return inject_lora(transformer, plan, seed)

    few, many, other = fresh(0, "image-attention"), fresh(0, "all"), fresh(1, "image-attention")
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert not any(torch.equal(few[name], other[name]) for name in few if name.endswith("lora_A"))
    assert all(not weight.any() for name, weight in many.items() if name.endswith("lora_B"))


def test_output_is_base_plus_scaled_product(model: ModelConfig) -> None:
    transformer = load_transformer(BaseModel(model), CPU)
    lora = inject_lora(
        transformer, plan_adapter(transformer, LoraConfig(lora_rank=4, lora_alpha=10, lora_targets="all")), seed=0
    )
    randomise(lora)
    adapted = predict_velocity(transformer, *inputs()).detach()
    with without_lora(transformer):
        base = predict_velocity(transformer, *inputs()).detach()
    merged = load_transformer(BaseModel(model), CPU)
    assert torch.equal(predict_velocity(merged, *inputs()), base)
    for module in target_modules(merged, LoraConfig(lora_targets="all")):
        change = lora[f"{module}.lora_B"] @ lora[f"{module}.lora_A"] * 2.5
        merged.get_submodule(module).weight.data += change.detach()
    torch.testing.assert_close(predict_velocity(merged, *inputs()), adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, base, atol=1e-2)


@pytest.fixture
def trained(model: ModelConfig, tmp_path: Path) -> tuple[dict[str, torch.nn.Parameter], torch.nn.Module, LoraMetadata]:
    transformer = load_transformer(BaseModel(model), CPU)
    config = TrainConfig(
        run_dir=str(tmp_path / "fox"),
        encoded="x.json",
        model=model,
        lora=LoraConfig(lora_rank=4, lora_alpha=10, lora_targets="attention-mlp"),
        export=ExportConfig(trigger_words="foxify"),
    )
    lora = inject_lora(transformer, plan_adapter(transformer, config.lora), seed=0)
    randomise(lora)
    return lora, transformer, LoraMetadata(config, 12)


def test_a_file_carries_the_whole_effect(trained, model: ModelConfig, tmp_path: Path) -> None:
    lora, transformer, metadata = trained
    path = export_lora(lora, tmp_path / "fox.safetensors", metadata)
    stored = load_file(path)
    assert {name.removeprefix("diffusion_model.").removesuffix(".weight") for name in stored} == set(lora)
    header = read_metadata(path)
    assert header["modelspec.trigger_phrase"] == "foxify" and header["ss_network_dim"] == "4"
    fresh = load_transformer(BaseModel(model), CPU)
    load_into(fresh, path)
    expected = predict_velocity(transformer, *inputs())
    torch.testing.assert_close(predict_velocity(fresh, *inputs()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["diffusion_model", "transformer"])
def test_the_prefix_of_names_is_a_choice(prefix: str, trained, tmp_path: Path) -> None:
    """Both files have the same weights, and diffusers reads the same from both."""
    lora, _, metadata = trained
    config = dataclasses.replace(metadata.config, export=ExportConfig(layer_prefix=prefix))
    path = export_lora(lora, tmp_path / "fox.safetensors", dataclasses.replace(metadata, config=config))
    wanted = to_file_tensors(lora, config.lora, torch.float32)
    stored, in_diffusers = load_file(path), read_with_diffusers(path)
    assert stored.keys() == {f"{prefix}.{name}" for name in wanted}
    assert in_diffusers.keys() == {f"transformer.{name}" for name in wanted}
    for name, tensor in wanted.items():
        assert torch.equal(stored[f"{prefix}.{name}"], tensor)
        assert torch.equal(in_diffusers[f"transformer.{name}"], tensor)


def test_half_strength_is_half_the_change_of_the_weights(trained, model: ModelConfig, tmp_path: Path) -> None:
    lora, _, metadata = trained
    path = export_lora(lora, tmp_path / "fox.safetensors", metadata)
    half, other = load_transformer(BaseModel(model), CPU), load_transformer(BaseModel(model), CPU)
    load_into(half, path, 0.5)
    stored = {name: tensor * (0.5 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(stored, tmp_path / "half.safetensors")
    load_into(other, tmp_path / "half.safetensors")
    torch.testing.assert_close(predict_velocity(half, *inputs()), predict_velocity(other, *inputs()))


@pytest.mark.parametrize("damage", ["scaled", "lost", "renamed"])
def test_a_file_that_would_not_load_gets_no_name(trained, tmp_path: Path, damage: str) -> None:
    lora, _, metadata = trained
    path = tmp_path / "fox.safetensors"
    path.write_bytes(b"an earlier file")

    def spoil(file: Path) -> None:
        tensors = load_file(file)
        first = next(name for name in tensors if "lora_B" in name)
        tensor = tensors.pop(first)
        if damage == "scaled":
            tensors[first] = tensor * 1.1
        if damage == "renamed":
            tensors[first.replace("transformer_blocks", "blocks")] = tensor
        elif damage == "lost":
            tensors.pop(first.replace("lora_B", "lora_A"))
        save_file(tensors, file)
        check_file(file, lora, metadata.config.lora, 1e-5)

    with pytest.raises(ExportError, match="not saved"):
        export_lora(lora, path, metadata, spoil)
    assert path.read_bytes() == b"an earlier file"
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".safetensors"] == ["fox.safetensors"]


def test_a_file_of_another_model_is_refused(trained, tmp_path: Path) -> None:
    _, _, metadata = trained
    other = {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(4, 48)}
    other["transformer.transformer_blocks.7.attn.to_q.lora_B.weight"] = torch.ones(48, 4)
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match="another model"):
        load_into(load_transformer(BaseModel(metadata.config.model), CPU), tmp_path / "other.safetensors")


def test_patterns(model: ModelConfig) -> None:
    transformer = load_transformer(BaseModel(model), CPU)
    only = LoraConfig(lora_targets="pattern", lora_target_pattern=r".*\.0\.attn\.to_q")
    assert target_modules(transformer, only) == ["transformer_blocks.0.attn.to_q"]
    for pattern, words in (("(", "not a regular expression"), ("nothing", "matches no layer")):
        with pytest.raises(ConfigError, match=words):
            target_modules(transformer, dataclasses.replace(only, lora_target_pattern=pattern))


def test_zero_timestep_references_belong_to_edit_v3_alone(base_of: Callable[[str], ModelConfig]) -> None:
    outputs = {
        name: predict_velocity(load_transformer(BaseModel(base_of(name)), CPU), *inputs())
        for name in ("edit-v2", "edit-v3")
    }
    assert not torch.allclose(outputs["edit-v2"], outputs["edit-v3"], atol=1e-3)  # equal weights, different modulation
