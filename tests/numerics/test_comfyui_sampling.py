"""With the schedule `comfyui`, a preview equals what ComfyUI's KSampler draws from the same noise with the LoRA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.comfy_subprocess import Answer, run_in_comfyui
from tests.support.narrow import NARROW
from tests.support.random_base import relative_error, save_base
from trainer_core.adapters.frozen_loras import load_with_frozen_loras
from trainer_core.adapters.inject import inject_lora, load_into
from trainer_core.adapters.plan import plan_adapter
from trainer_core.adapters.second_lora import read_second_lora, with_second_lora
from trainer_core.adapters.writer import LoraMetadata, export_lora
from trainer_core.config import FrozenLoraConfig, LoraConfig, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.latents import normalise
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.qwen_image.sampling import sample_latents, schedule_of
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

CPU = torch.device("cpu")
# Relative. The largest errors found are 5e-7 and 1.3e-2. In bfloat16, ComfyUI rounds the weight with its changes.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
SHAPE = (1, 16, 12, 8)
LIGHTNING = "Qwen-Edit-Lightning-4steps.safetensors"
PLAIN = ValidationConfig(validation_schedule="comfyui", validation_num_inference_steps=7, validation_guidance=4.0)
FEW = ValidationConfig(validation_lora=LIGHTNING)


@dataclass(frozen=True)
class Case:
    """A preview: its settings, and whether the trained LoRA and the few-step LoRA take part."""

    settings: ValidationConfig
    dtype: str = "float32"
    trained: bool = True
    frozen: bool = False

    @property
    def few(self) -> bool:
        return bool(self.settings.validation_lora) or self.frozen


CASES = {
    "guided": Case(PLAIN),
    "guided, base model": Case(PLAIN, trained=False),
    "another shift": Case(
        ValidationConfig(validation_schedule="comfyui", validation_shift=5.5, validation_guidance=2.5)
    ),
    "few steps": Case(FEW),
    "few steps, base model": Case(FEW, trained=False),
    "frozen few-step LoRA": Case(
        ValidationConfig(validation_schedule="comfyui", validation_num_inference_steps=4, validation_guidance=1.0),
        frozen=True,
    ),
    "guided in bf16": Case(PLAIN, "bfloat16"),
    "few steps in bf16": Case(FEW, "bfloat16"),
}


def draw(name: str, *shape: int) -> Tensor:
    """Normal random numbers, seeded by `name`."""
    return torch.randn(shape, generator=stream(0, "comfyui sampling", name))


def write_lora(path: Path, model: ModelConfig, lora: LoraConfig) -> None:
    """An exported LoRA with random weights, which changes the result clearly."""
    transformer = load_transformer(BaseModel(model), CPU)
    weights = inject_lora(transformer, plan_adapter(transformer, lora), seed=0)
    for name, weight in weights.items():
        weight.data.copy_(draw(f"{path.name} {name}", *weight.shape) * 0.3)
    export_lora(weights, path, LoraMetadata(TrainConfig(run_dir="run", encoded="none", model=model, lora=lora), 1))


def write_kohya(path: Path, exported: Path) -> None:
    """The same file in kohya's layout, with alphas: how many few-step LoRAs are published."""
    tensors = {}
    for name, tensor in load_file(exported).items():
        layer, _, part = name.removeprefix("diffusion_model.").rpartition(".lora_")
        prefix = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{prefix}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        tensors[f"{prefix}.alpha"] = torch.tensor(float(min(tensor.shape)))
    save_file(tensors, path)


@dataclass(frozen=True)
class Drawn:
    """Normalised latents by case."""

    ours: dict[str, Tensor]
    comfyui: Answer


@torch.no_grad()
def our_latents(case: Case, model: ModelConfig, folder: Path, tensors: dict[str, Tensor]) -> Tensor:
    """Latents [1, 16, H, W] as a validation draws them."""
    loras = (FrozenLoraConfig(file=str(folder / LIGHTNING)),) if case.frozen else ()
    precision: Any = "bf16" if case.dtype == "bfloat16" else "no"
    base = BaseModel(
        ModelConfig(base=model.base, device="cpu", mixed_precision=precision, frozen_loras=loras, flavour=model.flavour)
    )
    transformer = load_with_frozen_loras(base, CPU)
    follow_comfyui(transformer)
    if case.trained:
        load_into(transformer, folder / "edit.safetensors")
    few = case.settings.validation_lora
    parts = read_second_lora(base.network, folder / few) if few else {}
    how = case.settings.drawing
    conditions = [Condition((tensors["normalised"],), tensors[name]) for name in ("prompt", "negative")]
    with with_second_lora(transformer, parts, 1.0, CPU):
        return sample_latents(
            transformer,
            tensors["noise"],
            conditions[0],
            scheduler=schedule_of(base, how),
            num_steps=how.steps,
            guidance=how.guidance,
            negative=conditions[1],
        )


@pytest.fixture(scope="module")
def drawn(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("sampling")
    base = save_base(folder, NARROW)
    model = ModelConfig(base=str(folder), mixed_precision="no", device="cpu")
    write_lora(folder / "edit.safetensors", model, LoraConfig(lora_rank=4, lora_targets="attention"))
    write_lora(folder / "few.safetensors", model, LoraConfig(lora_rank=6, lora_targets="all"))
    write_kohya(folder / LIGHTNING, folder / "few.safetensors")
    width = json.loads((folder / "transformer/config.json").read_text())["joint_attention_dim"]
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config
    raw = draw("reference", *SHAPE)
    tensors = {
        "noise": draw("noise", *SHAPE),
        "reference": raw,
        "prompt": draw("prompt", 1, 19, width),
        "negative": draw("negative", 1, 11, width),
    }
    cases = {
        name: {
            "steps": case.settings.drawing.steps,
            "cfg": case.settings.drawing.guidance,
            "shift": case.settings.drawing.shift or 3.0,
            "dtype": case.dtype,
            "lora_files": [
                *([str(folder / "edit.safetensors")] if case.trained else []),
                *([str(folder / LIGHTNING)] if case.few else []),
            ],
        }
        for name, case in CASES.items()
    }
    question = {"model_file": str(base), "narrow": NARROW, "cases": cases}
    answer = run_in_comfyui(comfyui_dir, "comfy_subprocess_sampling.py", folder / "comfyui", tensors, question)
    tensors["normalised"] = normalise(raw, vae.latents_mean, vae.latents_std)
    ours = {name: our_latents(case, model, folder, tensors) for name, case in CASES.items()}
    comfyui = {name: normalise(latents, vae.latents_mean, vae.latents_std) for name, latents in answer.tensors.items()}
    return Drawn(ours, Answer(comfyui, answer.values, answer.log))


@pytest.mark.parametrize("name", CASES)
def test_a_preview_equals_comfyuis_picture(name: str, drawn: Drawn) -> None:
    assert relative_error(drawn.ours[name], drawn.comfyui.tensors[name]) < TOLERANCE[CASES[name].dtype]


def test_the_loras_matter(drawn: Drawn) -> None:
    for first, second in (("guided", "guided, base model"), ("few steps", "few steps, base model")):
        assert relative_error(drawn.ours[first], drawn.ours[second]) > 0.1
    assert relative_error(drawn.ours["few steps, base model"], drawn.ours["guided, base model"]) > 0.1


def test_comfyui_takes_every_key(drawn: Drawn) -> None:
    assert [line for line in drawn.comfyui.log if "not loaded" in line.lower()] == []
