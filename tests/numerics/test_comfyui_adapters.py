"""Every kind of adapter has the same effect in the real ComfyUI as in training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.adapter_cases import KINDS, inputs, randomise
from tests.support.comfy_subprocess import Answer, run_in_comfyui
from tests.support.narrow import NARROW
from tests.support.random_base import relative_error, save_base
from trainer_core.adapters.inject import for_file, inject_lora, load_into
from trainer_core.adapters.plan import plan_adapter
from trainer_core.adapters.writer import LoraMetadata, export_lora
from trainer_core.config import ModelConfig, TrainConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.latents import denormalise
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity

TOLERANCE = 1e-3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """Velocities from ComfyUI (`halved`: at strength 0.5) and from training, and adapted layers and files, by kind."""

    comfyui: Answer
    halved: Answer
    ours: dict[str, Tensor]
    layers: dict[str, list[str]]
    files: dict[str, Path]
    model: ModelConfig


@pytest.fixture(scope="module")
def outcome(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All kinds on one narrow model."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_base(folder, NARROW)
    model = ModelConfig(base=str(folder), mixed_precision="no", device="cpu")
    ours, layers, files = {}, {}, {}
    for kind, lora in KINDS.items():
        transformer = load_transformer(BaseModel(model), CPU)
        parameters = inject_lora(transformer, plan_adapter(transformer, lora), seed=0)
        randomise(parameters, 0.4 if lora.lora_type == "lokr" else 0.15)
        ours[kind] = predict_velocity(transformer, *inputs()).detach()
        files[kind] = folder / f"{kind}.safetensors"
        settings = TrainConfig(run_dir="run", encoded="none", model=model, lora=lora)
        export_lora(for_file(transformer, parameters), files[kind], LoraMetadata(settings, 1))
        layers[kind] = sorted({name.rpartition(".")[0] for name in parameters})
    question = {
        "model_file": str(base),
        "lora_files": {kind: str(file) for kind, file in files.items()},
        "narrow": NARROW,
        "cases": [{"name": "one", "references": 1, "method": "index"}],
    }
    answers = [
        run_in_comfyui(
            comfyui_dir,
            "comfy_subprocess_lora.py",
            folder / f"comfyui {strength}",
            for_comfyui(),
            {**question, "strength": strength},
        )
        for strength in (1.0, 0.5)
    ]
    return Outcome(*answers, ours=ours, layers=layers, files=files, model=model)


def for_comfyui() -> dict[str, Tensor]:
    """The inputs for ComfyUI, with reference latents before normalisation, as its VAE returns them."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config
    latents, sigma, condition = inputs()
    raw = denormalise(condition.reference_latents[0], vae.latents_mean, vae.latents_std)
    return {
        "one.latents": latents,
        "one.sigma": sigma,
        "one.prompt": condition.prompt_embeds,
        "one.reference.0": raw,
    }


def test_comfyui_takes_every_key(outcome: Outcome):
    assert outcome.comfyui.values["layers"] == outcome.layers
    complaints = [line for line in outcome.comfyui.log if "not loaded" in line.lower() or "error" in line.lower()]
    assert complaints == []


@pytest.mark.parametrize("kind", list(KINDS))
def test_comfyui_gives_the_trained_effect(kind: str, outcome: Outcome):
    found, base = (outcome.comfyui.tensors[f"{name}.one"] for name in (kind, "base"))
    assert relative_error(found, base) > 50 * TOLERANCE
    assert relative_error(found, outcome.ours[kind]) < TOLERANCE


@pytest.mark.parametrize("kind", list(KINDS))
def test_at_half_strength_our_sampler_is_comfyuis(kind: str, outcome: Outcome):
    transformer = load_transformer(BaseModel(outcome.model), CPU)
    load_into(transformer, outcome.files[kind], 0.5)
    ours = predict_velocity(transformer, *inputs())
    assert relative_error(outcome.halved.tensors[f"{kind}.one"], ours) < TOLERANCE
