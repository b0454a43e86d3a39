"""Every layout of weight files, with one block, against the same weights in bf16 and against ComfyUI.

The layouts that ComfyUI reads here have full width, 24 heads, because ComfyUI builds no other network; the rest have 8.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support import layouts
from tests.support.comfy_subprocess import Answer, run_in_comfyui
from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import LoraConfig, ModelConfig
from trainer_core.precision.frozen_linear import FrozenLinear
from trainer_core.qwen_image import text_encoder_file
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.folder import weights_digest
from trainer_core.qwen_image.latents import normalise
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.qwen_image.vae import decode_latents, encode_picture, load_vae
from trainer_core.rng import stream

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A function that writes the layout, its largest relative error, and whether ComfyUI 0.3.75 reads it."""

    write: Callable[[layouts.Weights, Path], Path]
    error: float
    in_comfyui: bool = False


# Errors are about twice the measured ones.
ROWS = {
    "bf16": Row(layouts.bf16, 0.0, in_comfyui=True),
    "bf16, narrow": Row(layouts.bf16, 0.0),
    "fp16, prefixed": Row(layouts.prefixed, 1e-3),
    "fp8": Row(layouts.plain_fp8, 0.06, in_comfyui=True),
    "fp8 scaled, older": Row(layouts.older_fp8, 0.1, in_comfyui=True),
    "fp8 scaled, in the header": Row(layouts.header_fp8, 0.05, in_comfyui=True),
    "fp8 scaled, by entries": Row(layouts.entry_fp8, 0.05),
    "int8": Row(layouts.int8, 0.02),
    "int8, rotated": Row(layouts.rotated_int8, 0.02),
    "GGUF Q8_0": Row(layouts.gguf, 0.02),
    "folder in parts": Row(layouts.parts, 0.0),
    "folder in NF4": Row(layouts.nf4, 0.2),
}
COMFYUI_TOLERANCE = 1e-3  # both compute in float32
KEPT = ["fp8", "fp8 scaled, older", "fp8 scaled, in the header", "int8", "int8, rotated"]


@dataclass(frozen=True)
class Written:
    """The files and our outputs with them, by row."""

    files: dict[str, Path]
    velocities: dict[str, Tensor]


def config_of(path: Path, precision: str = "none") -> ModelConfig:
    """A model whose three files are all `path`. A test loads only the part that the file contains."""
    return ModelConfig(
        transformer_file=str(path),
        text_encoder_file=str(path),
        vae_file=str(path),
        tokenizer="none",
        base_model_precision=precision,  # type: ignore[arg-type]
        mixed_precision="no",
        device="cpu",
    )


def task() -> dict[str, Tensor]:
    """Latents [1, 16, 12, 8], sigma [1] and prompt [1, 19, 3584]."""
    draws = stream(0, "weight files")
    latents, prompt = torch.randn(1, 16, 12, 8, generator=draws), torch.randn(1, 19, 3584, generator=draws)
    return {"latents": latents, "sigma": torch.tensor([0.63]), "prompt": prompt}


def velocity(network: nn.Module) -> Tensor:
    """The predicted velocity for the task."""
    asked = task()
    return predict_velocity(network, asked["latents"], asked["sigma"], Condition((), asked["prompt"])).float()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the norm of `wanted`."""
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """The files of all rows. Only those that tests load again stay on disk."""
    folder, files, velocities = tmp_path_factory.mktemp("layouts"), {}, {}
    full, narrow = (layouts.random_weights({"num_layers": 1, "num_attention_heads": heads}) for heads in (24, 8))
    for number, (name, row) in enumerate(ROWS.items()):
        files[name] = row.write(full if row.in_comfyui else narrow, folder / f"{number}.safetensors")
        network = load_transformer(BaseModel(config_of(files[name])), CPU)
        with torch.no_grad():
            velocities[name] = velocity(network)
        if not row.in_comfyui and name not in KEPT:
            shutil.rmtree(files[name]) if files[name].is_dir() else files[name].unlink()
        del network
        gc.collect()
    del full, narrow
    yield Written(files, velocities)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def comfyui_says(written: Written, comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """ComfyUI's outputs with the files it reads, and with a VAE."""
    files = {name: str(written.files[name]) for name, row in ROWS.items() if row.in_comfyui}
    seen = {"picture": torch.rand(1, 64, 48, 3, generator=stream(0, "picture")), **task()}
    question = {"files": files, "vae_width": 8}
    return run_in_comfyui(comfyui_dir, "comfy_subprocess_weights.py", tmp_path_factory.mktemp("c"), seen, question)


@pytest.mark.parametrize("name", ROWS)
def test_output_is_that_of_bf16(written: Written, name: str):
    wanted = written.velocities["bf16" if ROWS[name].in_comfyui else "bf16, narrow"]
    error = relative_error(written.velocities[name], wanted)
    assert error <= ROWS[name].error
    if ROWS[name].error > 1e-3:
        assert error > ROWS[name].error / 20, "nothing was quantised"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.in_comfyui])
def test_output_is_comfyuis(written: Written, comfyui_says: Answer, name: str):
    assert relative_error(written.velocities[name], comfyui_says.tensors[name]) < COMFYUI_TOLERANCE


def gradients(network: nn.Module) -> Tensor:
    """The gradients of an adapter that is not zero, as one vector."""
    lora = inject_lora(network, plan_adapter(network, LoraConfig(lora_rank=2)), seed=0)
    for name, weight in lora.items():
        if name.endswith("lora_B"):
            weight.data.copy_(torch.randn(weight.shape, generator=stream(0, name)) * 0.05)
    velocity(network).square().mean().backward()
    return torch.cat([weight.grad.flatten() for weight in lora.values() if weight.grad is not None])


@pytest.mark.parametrize("name", KEPT)
def test_codes_kept_as_they_are_compute_and_train_the_same(written: Written, name: str):
    kept = load_transformer(BaseModel(config_of(written.files[name], "file")), CPU)
    layers = [layer for layer in kept.transformer_blocks.modules() if isinstance(layer, FrozenLinear)]
    assert len(layers) == 11  # of a block's 14, without the 3 of the last block's text output
    assert all(layer.weight.element_size() == 1 for layer in layers)
    with torch.no_grad():
        assert relative_error(velocity(kept), written.velocities[name]) < 1e-5
    if name == "int8, rotated":
        found = gradients(kept)
        del kept, layers
        wanted = gradients(load_transformer(BaseModel(config_of(written.files[name])), CPU))
        assert torch.cosine_similarity(found, wanted, dim=0) > 0.9999


def test_digest_tells_files_apart(written: Written, tmp_path: Path):
    first, other = written.files["fp8"], written.files["fp8 scaled, older"]
    assert weights_digest(first) != weights_digest(other)
    moved = tmp_path / "other name.safetensors"
    moved.symlink_to(first)
    assert weights_digest(moved) == weights_digest(first)


@torch.no_grad()
def test_vae_with_wans_names(comfyui_says: Answer, tmp_path: Path):
    """Latents and pictures equal ComfyUI's, from which the file comes."""
    weights = {name.removeprefix("vae."): each for name, each in comfyui_says.tensors.items() if name[:4] == "vae."}
    path = layouts.bf16(weights, tmp_path / "vae.safetensors")
    network = load_vae(BaseModel(replace(config_of(path), mixed_precision="no")), CPU)
    assert network.config.base_dim == 8
    seen = torch.rand(1, 64, 48, 3, generator=stream(0, "picture")).permute(0, 3, 1, 2).unsqueeze(2)
    latents = encode_picture(network, seen[0, :, 0])
    theirs = comfyui_says.tensors["vae latents"].reshape(latents.shape)
    wanted = normalise(theirs, network.config.latents_mean, network.config.latents_std)
    assert relative_error(latents, wanted) < 1e-3
    decoded = decode_latents(network, wanted).permute(1, 2, 0)
    assert relative_error(decoded, comfyui_says.tensors["vae picture"].reshape(decoded.shape)) < 1e-3


def in_comfyuis_names(network: nn.Module) -> layouts.Weights:
    """A text encoder's weights under their names in ComfyUI's files."""
    renamed = {}
    for name, weight in network.named_parameters():
        stored = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[stored] = weight.detach().clone()
    return renamed


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "fp8 scaled"])
def test_text_encoder_in_a_file(model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool):
    """Replaces the configuration of Qwen2.5-VL-7B, which such files always have, by a narrow one."""
    wanted = load_text_encoder(BaseModel(model), "comfyui", CPU)
    weights = in_comfyuis_names(wanted.network)
    if quantised:
        weights["scaled_fp8"] = torch.empty(2, dtype=layouts.E4M3)
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            weights[name], scale = layouts.scaled_fp8(weights[name])
            weights[name.replace(".weight", ".scale_weight")] = scale
    path = layouts.bf16(weights, tmp_path / "qwen_2.5_vl_7b.safetensors")
    monkeypatch.setattr(text_encoder_file, "qwen25_vl_7b", lambda: wanted.network.config.to_dict())
    given = replace(config_of(path), tokenizer=str(Path(model.base) / "tokenizer"), mixed_precision="no")
    found = load_text_encoder(BaseModel(given), "comfyui", CPU)
    pictures = [torch.rand(3, 56, 84, generator=stream(0, "seen"))]
    error = relative_error(found.encode("turn it blue", pictures), wanted.encode("turn it blue", pictures))
    assert 1e-4 < error < 0.05 if quantised else error < 1e-6
