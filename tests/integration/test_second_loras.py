"""Few-step LoRAs of previews, and frozen LoRAs of the base model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.lora_files import write_lora
from tests.support.runs import PauseAt, equal, lora_tensors, named, twelve_steps
from trainer_core.adapters.frozen_loras import load_with_frozen_loras
from trainer_core.adapters.plan import read_parts
from trainer_core.adapters.reader import changed_weight
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BaseModelPrecision,
    FrozenLoraConfig,
    LoraConfig,
    LoraType,
    MemoryConfig,
    ModelConfig,
    TrainConfig,
    ValidationConfig,
    completed_key,
    resume_key,
)
from trainer_core.errors import ConfigError, ModelFileError, RunFolderError, SettingsError
from trainer_core.events import SilentObserver
from trainer_core.files import read_metadata
from trainer_core.planning.preparation import prepare_model
from trainer_core.precision.frozen_linear import FrozenLinear
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.run import train_lora
from trainer_core.training import validation as validation_module

CPU = torch.device("cpu")


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    return twelve_steps(encoded, model, tmp_path / "run")


def frozen(model: ModelConfig, *files: Path, strength: float = 0.7, **changes: Any) -> ModelConfig:
    loras = tuple(FrozenLoraConfig(file=str(file), strength=strength) for file in files)
    return dataclasses.replace(model, frozen_loras=loras, **changes)


class Drawn:
    """Records the arguments of each sampling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        original = validation_module.sample_latents

        def sample(*args: Any, **settings: Any) -> Tensor:
            self.calls.append(settings)
            return original(*args, **settings)

        monkeypatch.setattr(validation_module, "sample_latents", sample)


def test_previews_take_few_steps_and_the_training_stays_the_same(
    config: TrainConfig, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a pause: the base model's pictures are kept, and drawn again if the file's content changes."""
    plain = train_lora(named(config, "plain"))
    file, drawn = write_lora(tmp_path / "Lightning-8steps.safetensors", model), Drawn(monkeypatch)
    few = dataclasses.replace(config.validation, validation_lora=str(file), strength_sweep="none")
    result = train_lora(named(config, "few", validation=few), PauseAt(6))
    result = train_lora(named(config, "few", validation=few))
    assert equal(lora_tensors(plain), lora_tensors(result))
    assert len(drawn.calls) == 4  # the base model's picture once, and one at each of the steps 5, 10 and 12
    assert {(call["num_steps"], call["guidance"], call["scheduler"].shift) for call in drawn.calls} == {(8, 1.0, 3.0)}
    assert plain.samples and result.samples and plain.samples.psnr_base != result.samples.psnr_base
    train_lora(named(config, "other", validation=few), PauseAt(6))
    train_lora(named(config, "other", validation=dataclasses.replace(few, validation_lora_strength=0.5)))
    assert len(drawn.calls) == 4 + 5  # the base model's picture once more


@pytest.mark.parametrize(
    ("name", "given", "steps"),
    [
        ("Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors", 0, 4),
        ("Qwen-Image-Lightning-8steps-V2.0.safetensors", 0, 8),
        ("lightning_8-step.safetensors", 0, 8),
        ("turbo.safetensors", 0, 4),
        ("my-4stepsons-2511.safetensors", 0, 4),
        ("Lightning-4steps.safetensors", 6, 6),
        ("face-250 steps.safetensors", 0, 4),
        ("edit-12008-steps.safetensors", 0, 4),
    ],
)
def test_the_number_of_steps(name: str, given: int, steps: int) -> None:
    config = ValidationConfig(validation_lora=f"/loras/{name}", validation_lora_steps=given, validation_guidance=5)
    assert config.drawing == (steps, 1.0, "comfyui", 0.0)


def test_the_few_step_lora_is_counted(config: TrainConfig, model: ModelConfig, tmp_path: Path) -> None:
    from trainer_core.planning.preparation import prepare_training

    file = write_lora(tmp_path / "few.safetensors", model)
    numbers = sum(tensor.numel() for tensor in load_file(file).values())
    few = dataclasses.replace(config.validation, validation_lora=str(file))
    plan = prepare_training(dataclasses.replace(config, validation=few)).memory_plan()
    sampling, training = plan.phase("sampling"), plan.phase("training")
    assert sampling and training and sampling.parts["few-step LoRA"] == 4 * numbers == plan.host["few-step LoRA"]
    assert "few-step LoRA" not in training.parts


@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("precision", ["none", "int8-quanto"])
def test_every_kind_of_adapter_has_few_step_previews(
    lora_type: LoraType, precision: BaseModelPrecision, config: TrainConfig, model: ModelConfig, tmp_path: Path
) -> None:
    """With streamed blocks. The training is the same as without."""
    file = write_lora(tmp_path / "few-2steps.safetensors", model)
    config = dataclasses.replace(
        config,
        max_train_steps=3,
        model=dataclasses.replace(model, base_model_precision=precision, mixed_precision="bf16"),
        lora=LoraConfig(lora_rank=4, lora_type=lora_type, lora_targets="attention"),
        memory=MemoryConfig(memory="manual", blocks_to_stream=1),
    )
    few = dataclasses.replace(config.validation, validation_lora=str(file))
    first, second = train_lora(named(config, "plain")), train_lora(named(config, "few", validation=few))
    assert equal(lora_tensors(first), lora_tensors(second))
    assert first.samples and second.samples and first.samples.psnr_lora != second.samples.psnr_lora


def test_what_cannot_be_switched_is_refused(config: TrainConfig, model: ModelConfig, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "dora.safetensors", model, "dora")
    with pytest.raises(ModelFileError, match=r"dora.safetensors is a DoRA.*Choose a LoRA or LoKr"):
        train_lora(
            dataclasses.replace(config, validation=dataclasses.replace(config.validation, validation_lora=str(file)))
        )
    missing = FrozenLoraConfig(file=str(tmp_path / "gone.safetensors"))
    with pytest.raises(ModelFileError, match=r"gone\.safetensors is missing"):
        train_lora(dataclasses.replace(config, model=dataclasses.replace(model, frozen_loras=(missing,))))
    with pytest.raises((ConfigError, SettingsError), match="file"):
        FrozenLoraConfig(file="")


@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr"])
def test_a_frozen_lora_is_part_of_the_base_weights(lora_type: LoraType, model: ModelConfig, tmp_path: Path) -> None:
    """Bit for bit the model whose weights were merged beforehand, with several LoRAs one after the other."""
    first = write_lora(tmp_path / "first.safetensors", model, lora_type)
    second = write_lora(tmp_path / "second.safetensors", model)
    chosen = frozen(model, first, second)
    found = load_with_frozen_loras(BaseModel(chosen), CPU)
    wanted = load_transformer(BaseModel(model), CPU)
    changed = set()
    for file in (first, second):
        for name, part in read_parts(wanted, file).items():
            weight = wanted.get_submodule(name).weight.data
            weight += 0.7 * (changed_weight(part, weight) - weight)
            changed.add(name)
    assert len(changed) > 20
    for (name, one), (_, other) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_on_a_frozen_lora_equals_one_on_a_merged_model(
    config: TrainConfig, model: ModelConfig, tmp_path: Path
) -> None:
    """After a pause too; and its header names the LoRA."""
    file = write_lora(tmp_path / "style.safetensors", model)
    chosen = dataclasses.replace(config, model=frozen(model, file))
    train_lora(chosen, PauseAt(6))
    result = train_lora(chosen)
    merged = tmp_path / "merged model"
    shutil.copytree(model.base, merged)
    weights = load_with_frozen_loras(BaseModel(frozen(model, file)), CPU).state_dict()
    place = next((merged / "transformer").glob("*.safetensors"))
    stored = load_file(place)
    save_file(
        {name: weights.get(name, tensor).contiguous() for name, tensor in stored.items()}, place, {"format": "pt"}
    )
    other = train_lora(named(config, "merged", model=dataclasses.replace(model, base=str(merged))))
    assert equal(lora_tensors(result), lora_tensors(other))
    assert result.samples and other.samples and result.samples.psnr_base == other.samples.psnr_base
    assert result.lora_file
    assert read_metadata(result.lora_file)["qwen_edit_trainer.frozen_loras"] == "style.safetensors at 0.7"


def test_a_run_goes_on_only_with_the_same_frozen_loras(config: TrainConfig, model: ModelConfig, tmp_path: Path) -> None:
    """The file may be elsewhere. A run of an older version, which knew none, goes on."""
    file = write_lora(tmp_path / "style.safetensors", model)
    moved = shutil.copyfile(file, (tmp_path / "elsewhere").mkdir() or tmp_path / "elsewhere" / file.name)
    key = resume_key(dataclasses.replace(config, model=frozen(model, file)))
    assert key == resume_key(dataclasses.replace(config, model=frozen(model, moved)))
    old = resume_key(config)
    assert old["model"].pop("frozen_loras") == []
    assert completed_key(old) == resume_key(config)
    train_lora(dataclasses.replace(config, model=frozen(model, file)), PauseAt(3))
    for others in ((), (FrozenLoraConfig(file=str(file), strength=0.6),)):
        with pytest.raises(RunFolderError, match="frozen_loras"):
            train_lora(dataclasses.replace(config, model=dataclasses.replace(model, frozen_loras=others)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_a_file_are_rounded_again(dtype: torch.dtype, model: ModelConfig, tmp_path: Path) -> None:
    """With the precision `file`: layers that no LoRA changes keep their codes."""
    lora = write_lora(tmp_path / "style.safetensors", model)
    weights, network = {}, load_transformer(BaseModel(model), CPU)
    largest = 127 if dtype == torch.int8 else 448
    for name, tensor in network.state_dict().items():
        weights[name] = tensor
        if tensor.ndim == 2 and name.startswith("transformer_blocks"):
            scale = tensor.abs().amax(1, keepdim=True) / largest
            codes = tensor / scale
            weights[name] = (codes.round() if dtype == torch.int8 else codes).to(dtype)
            weights[f"{name.removesuffix('.weight')}.weight_scale"] = scale
    base = tmp_path / "base"
    shutil.copytree(model.base, base)
    place = next((base / "transformer").glob("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in {**load_file(place), **weights}.items()}, place)
    coded = dataclasses.replace(model, base=str(base), base_model_precision="file")
    plain, changed = (load_with_frozen_loras(BaseModel(each), CPU) for each in (coded, frozen(coded, lora)))
    parts = read_parts(network, lora)
    compared = 0
    for name, layer in changed.named_modules():
        if isinstance(layer, FrozenLinear):
            before = plain.get_submodule(name)
            assert isinstance(before, FrozenLinear) and layer.weight.dtype == dtype
            if name not in parts:
                assert torch.equal(layer.weight.view(torch.uint8), before.weight.view(torch.uint8))
                continue
            weight = before.dequantised(torch.float32)
            weight = weight + 0.7 * (changed_weight(parts[name], weight) - weight)
            error = (layer.dequantised(torch.float32) - weight).norm() / weight.norm()
            assert error < (0.01 if dtype == torch.int8 else 0.04)
            compared += 1
    assert compared > 20


def test_quantised_weights_are_cached_for_each_set_of_loras(model: ModelConfig, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "style.safetensors", model)
    cached = dataclasses.replace(
        model, base_model_precision="int8-quanto", quantised_cache_gb=1, quantised_cache_dir=str(tmp_path / "cache")
    )
    loads = [cached, frozen(cached, lora), frozen(cached, lora, strength=0.3)]
    first, again = ([load_with_frozen_loras(BaseModel(each), CPU) for each in loads] for _ in range(2))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    codes = [network.transformer_blocks[0].attn.to_q.weight for network in first]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[1], codes[2])
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.transformer_blocks[0].attn.to_q.weight, other.transformer_blocks[0].attn.to_q.weight)


def test_preparing_reads_all_files_and_tells_all_problems(config: TrainConfig, tmp_path: Path) -> None:
    wrong = [tmp_path / f"{name}.safetensors" for name in ("frozen", "few")]
    for path in wrong:
        save_file({"unknown.weight": torch.zeros(2, 2)}, path)
    bad = dataclasses.replace(
        config,
        model=frozen(config.model, wrong[0]),
        validation=dataclasses.replace(config.validation, validation_lora=str(wrong[1])),
    )
    with pytest.raises(Exception, match=r"frozen\.safetensors") as caught:
        prepare_model(bad, BaseModel(bad.model))
    assert "few.safetensors" in str(caught.value)


def test_a_stop_while_pictures_are_drawn_leaves_the_network_as_it_was(
    config: TrainConfig, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lora(tmp_path / "few-4steps.safetensors", model)
    few = dataclasses.replace(config.validation, validation_lora=str(file))
    plain = train_lora(named(config, "plain"))

    class StopInPicture(SilentObserver):
        drawing = False

        def on_progress(self, phase: str, done: int, total: int) -> None:
            self.drawing = "validation pictures" in phase

        def should_stop(self) -> Any:
            from trainer_core.events import Stop

            return Stop.PAUSE if self.drawing else Stop.NO

    train_lora(named(config, "few", validation=few), StopInPicture())
    assert equal(lora_tensors(train_lora(named(config, "few", validation=few))), lora_tensors(plain))
