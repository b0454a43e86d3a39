"""An exported LoRA acts the same in ComfyUI, diffusers and training, for one block of full width and a narrow model."""

from __future__ import annotations

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.comfy_subprocess import Answer, run_in_comfyui
from tests.support.narrow import NARROW
from tests.support.random_base import relative_error, save_base
from trainer_core.adapters.inject import inject_lora, without_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.adapters.writer import LoraMetadata, export_lora
from trainer_core.config import LoraConfig, ModelConfig, TrainConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.latents import denormalise
from trainer_core.qwen_image.positions import ComfyuiPositions, follow_comfyui
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

TOLERANCE = 1e-3  # relative
FULL_WIDTH = {"num_layers": 1}  # the rest is Qwen-Image's default: 24 heads of 128, prompt width 3584
LORA = LoraConfig(lora_rank=8, lora_alpha=12, lora_targets="all")
WIDTHS = {"full width": FULL_WIDTH, "narrow": NARROW}


@dataclass(frozen=True)
class Case:
    """Latent heights and widths of the target and its references, and ComfyUI's name of the reference method."""

    target: tuple[int, int]
    references: tuple[tuple[int, int], ...]
    method: str = "index"


CASES = {
    "one reference": Case((12, 8), ((12, 8),)),
    "odd latents": Case((12, 12), ((7, 11),)),  # padded circularly to 4 x 6 tokens
    "three references": Case((12, 12), ((8, 8), (7, 12), (12, 4))),
    "2511": Case((12, 8), ((12, 8), (8, 4)), "index_timestep_zero"),
    "reference larger than the target": Case((8, 8), ((12, 8),)),
    "odd tokens": Case((12, 12), ((9, 6),)),
}
# The cases at each noise level. bfloat16 holds 0.625; rounded to it, the other levels would be up to 0.0013 off.
IN_BF16 = {level: list(CASES) if level == 0.63 else ["one reference", "2511"] for level in (0.37, 0.625, 0.63, 0.81)}
# Relative. The largest error found is 4.9e-3. Both round intermediate results, and ComfyUI also the rotary angles.
BF16_TOLERANCE = 5.5e-3
# In these cases ComfyUI's rotary positions differ from diffusers', see ComfyuiPositions.
OTHER_POSITIONS = ("reference larger than the target", "odd tokens")


@dataclass(frozen=True)
class Outcome:
    """Velocities by case, with and without the LoRA (`moved`: with it, at ComfyUI's positions); the adapted layers."""

    ours: dict[str, Tensor]
    diffusers: dict[str, Tensor]
    comfyui: Answer
    layers: list[str]


def draw(name: str, *shape: int) -> Tensor:
    """Normal random numbers, seeded by `name`."""
    return torch.randn(shape, generator=stream(0, "comfyui lora", name))


def condition_of(name: str, case: Case, width: int) -> tuple[Tensor, Tensor, Condition]:
    """Noisy latents, sigma and condition of a case."""
    references = tuple(draw(f"{name} reference {n}", 1, 16, *size) for n, size in enumerate(case.references))
    return (
        draw(f"{name} latents", 1, 16, *case.target),
        torch.tensor([0.63]),
        Condition(references, draw(f"{name} prompt", 1, 19, width)),
    )


def for_comfyui(width: int) -> dict[str, Tensor]:
    """The cases for ComfyUI, with reference latents before normalisation, as its VAE returns them."""
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config
    tensors = {}
    for name, case in CASES.items():
        latents, sigma, condition = condition_of(name, case, width)
        tensors |= {f"{name}.latents": latents, f"{name}.sigma": sigma, f"{name}.prompt": condition.prompt_embeds}
        for number, reference in enumerate(condition.reference_latents):
            raw = denormalise(reference, vae.latents_mean, vae.latents_std)
            tensors[f"{name}.reference.{number}"] = raw
    return tensors


@torch.no_grad()
def our_velocities(model: ModelConfig, lora_file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Velocities with and without a randomised adapter, and its layers. Exports it to `lora_file`."""
    transformer = load_transformer(BaseModel(model), torch.device("cpu"))
    lora = inject_lora(transformer, plan_adapter(transformer, LORA), seed=0)
    for name, weight in lora.items():
        if name.endswith("lora_B"):
            weight.copy_(draw(name, *weight.shape) * 0.1)
    found: dict[str, Tensor] = {}
    for name, case in CASES.items():
        latents, sigma, condition = condition_of(name, case, transformer.config.joint_attention_dim)
        set_method(transformer, case)
        found[f"lora.{name}"] = predict_velocity(transformer, latents, sigma, condition)
        with without_lora(transformer):
            found[f"base.{name}"] = predict_velocity(transformer, latents, sigma, condition)
        positions = transformer.pos_embed
        transformer.pos_embed = ComfyuiPositions(positions)
        found[f"moved.{name}"] = predict_velocity(transformer, latents, sigma, condition)
        transformer.pos_embed = positions
    config = TrainConfig(run_dir="run", encoded="none", model=model, lora=LORA)
    export_lora(lora, lora_file, LoraMetadata(config, 1))
    return found, sorted({name.rsplit(".", 1)[0] for name in lora})


@torch.no_grad()
def velocities_in_bf16(model: ModelConfig) -> dict[str, Tensor]:
    """Velocities without a LoRA, computed in bfloat16 as in ComfyUI, of the cases in IN_BF16."""
    base = BaseModel(dataclasses.replace(model, mixed_precision="bf16"))
    transformer = load_transformer(base, torch.device("cpu"))
    follow_comfyui(transformer)
    found = {}
    for level, names in IN_BF16.items():
        for name in names:
            set_method(transformer, CASES[name])
            latents, _, condition = condition_of(name, CASES[name], transformer.config.joint_attention_dim)
            predicted = predict_velocity(transformer, latents, torch.tensor([level]), condition)
            found[f"bf16 at {level}.{name}"] = predicted.float()
    return found


def set_method(transformer: QwenImageTransformer2DModel, case: Case) -> None:
    """Make the transformer a 2511, or an earlier one, whatever the case needs."""
    for module in (transformer, *transformer.transformer_blocks):
        module.zero_cond_t = case.method == "index_timestep_zero"


@torch.no_grad()
def diffusers_velocities(folder: Path, lora_file: Path) -> dict[str, Tensor]:
    """Velocities of a fresh transformer with diffusers' own loader and packing, which supports even sides only."""
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    state = QwenImageLoraLoaderMixin.lora_state_dict(str(lora_file.parent), weight_name=lora_file.name)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, transformer=transformer)
    latents, sigma, condition = condition_of(
        "one reference", CASES["one reference"], transformer.config.joint_attention_dim
    )
    tensors = (latents, *condition.reference_latents)
    packed = [QwenImageEditPipeline._pack_latents(each, 1, 16, *each.shape[-2:]) for each in tensors]
    found: dict[str, Tensor] = {}
    for name in ("lora", "base"):
        if name == "base":
            transformer.disable_adapters()
        tokens = transformer(
            hidden_states=torch.cat(packed, dim=1),
            timestep=sigma,
            encoder_hidden_states=condition.prompt_embeds,
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in tensors]],
            return_dict=False,
        )[0][:, : packed[0].shape[1]]
        height, width = latents.shape[-2:]
        unpacked = QwenImageEditPipeline._unpack_latents(tokens, height * 8, width * 8, 8)
        found[f"{name}.one reference"] = unpacked.squeeze(2)
    return found


@pytest.fixture(scope="module", params=list(WIDTHS))
def outcome(request: pytest.FixtureRequest, comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One adapter in three programs. Only one network is in memory at a time."""
    config, folder = WIDTHS[request.param], tmp_path_factory.mktemp("lora")
    base, lora_file = save_base(folder, config), folder / "edit.safetensors"
    model = ModelConfig(base=str(folder), mixed_precision="no", device="cpu")
    ours, layers = our_velocities(model, lora_file)
    gc.collect()
    ours |= velocities_in_bf16(model)
    gc.collect()
    diffusers = diffusers_velocities(folder, lora_file)
    gc.collect()
    width = json.loads((folder / "transformer/config.json").read_text())["joint_attention_dim"]
    cases = [{"name": name, "references": len(case.references), "method": case.method} for name, case in CASES.items()]
    question = {
        "model_file": str(base),
        "lora_files": {"lora": str(lora_file)},
        "narrow": config if request.param == "narrow" else None,
        "cases": cases,
        "bf16": IN_BF16,
    }
    answer = run_in_comfyui(comfyui_dir, "comfy_subprocess_lora.py", folder / "comfyui", for_comfyui(width), question)
    base.unlink()  # 0.75 GB
    return Outcome(ours, diffusers, answer, layers)


def test_the_lora_matters(outcome: Outcome):
    for name in CASES:
        assert relative_error(outcome.ours[f"lora.{name}"], outcome.ours[f"base.{name}"]) > 50 * TOLERANCE


def test_comfyui_takes_every_key(outcome: Outcome):
    assert outcome.comfyui.values["layers"]["lora"] == outcome.layers
    assert len(outcome.layers) >= 10
    complaints = [line for line in outcome.comfyui.log if "not loaded" in line.lower() or "error" in line.lower()]
    assert complaints == []


def known_cases(outcome: Outcome) -> list[str]:
    """The cases that the tested ComfyUI supports. Versions before 0.8 don't know 2511."""
    known = outcome.comfyui.values["supports_timestep_zero"]
    return [name for name, case in CASES.items() if known or case.method == "index"]


@pytest.mark.parametrize("with_lora", ["base", "lora"])
def test_comfyui_predicts_the_same(outcome: Outcome, with_lora: str):
    names = known_cases(outcome)
    found = sorted(name for name in outcome.comfyui.tensors if not name.startswith("bf16"))
    assert found == sorted(f"{each}.{name}" for each in ("base", "lora") for name in names)
    for name in names:
        key = f"{with_lora}.{name}"
        if name not in OTHER_POSITIONS:
            assert relative_error(outcome.comfyui.tensors[key], outcome.ours[key]) < TOLERANCE, key


def test_comfyui_predicts_the_same_in_bf16(outcome: Outcome):
    """The error is about that at 0.625, which bfloat16 holds, at every level: both compute the sinusoids in float32.

    If either rounded the level to bfloat16, the error would be about ten times as large at the others.
    """
    found = {name for name in outcome.comfyui.tensors if name.startswith("bf16")}
    known = known_cases(outcome)
    assert found == {f"bf16 at {level}.{name}" for level, names in IN_BF16.items() for name in names if name in known}
    errors = {name: relative_error(outcome.ours[name], outcome.comfyui.tensors[name]) for name in found}
    assert max(errors.values()) < BF16_TOLERANCE, errors
    for level in IN_BF16:
        at_level, held = (errors[f"bf16 at {each}.one reference"] for each in (level, 0.625))
        assert at_level < 1.5 * held, level


@pytest.mark.parametrize("name", OTHER_POSITIONS)
def test_where_comfyui_differs_it_is_the_rotary_positions_alone(outcome: Outcome, name: str):
    """The difference is known and small. Our forward is diffusers', which is Qwen's own."""
    theirs = outcome.comfyui.tensors[f"lora.{name}"]
    assert relative_error(theirs, outcome.ours[f"moved.{name}"]) < TOLERANCE
    assert TOLERANCE < relative_error(theirs, outcome.ours[f"lora.{name}"]) < 0.05


def test_elsewhere_the_positions_are_the_same(outcome: Outcome):
    for name in CASES:
        if name not in OTHER_POSITIONS:
            assert relative_error(outcome.ours[f"moved.{name}"], outcome.ours[f"lora.{name}"]) < 1e-5


@pytest.mark.parametrize("with_lora", ["base", "lora"])
def test_diffusers_predicts_the_same(outcome: Outcome, with_lora: str):
    key = f"{with_lora}.one reference"
    assert relative_error(outcome.diffusers[key], outcome.ours[key]) < TOLERANCE


def test_comfyui_says_when_it_does_not_take_a_key(comfyui_dir: Path, tmp_path: Path):
    """Shows that ComfyUI reports such keys, so no report in the tests above means success."""
    base = save_base(tmp_path, NARROW)
    model = ModelConfig(base=str(tmp_path), mixed_precision="no", device="cpu")
    our_velocities(model, tmp_path / "edit.safetensors")
    raw = {
        f"base_model.model.{key.removeprefix('transformer.')}": each
        for key, each in load_file(tmp_path / "edit.safetensors").items()
    }
    save_file(raw, tmp_path / "raw.safetensors")
    question = {
        "model_file": str(base),
        "lora_files": {"lora": str(tmp_path / "raw.safetensors")},
        "narrow": NARROW,
        "cases": [],
    }
    answer = run_in_comfyui(
        comfyui_dir, "comfy_subprocess_lora.py", tmp_path / "comfyui", {"none": torch.zeros(1)}, question
    )
    assert answer.values["layers"]["lora"] == []
    assert sum("lora key not loaded" in line for line in answer.log) == len(raw)
