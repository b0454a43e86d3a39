"""The embedded demo model is small, complete and finite, and it copies its reference."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from trainer_core.config import DEMO_MODEL, ModelConfig
from trainer_core.demo import pictures
from trainer_core.demo.text_encoder import build_text_encoder
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.sampling import load_scheduler, sample_latents
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.qwen_image.types import Condition
from trainer_core.qwen_image.vae import decode_latents, encode_picture, load_vae

MODEL = Path(pictures.__file__).parent / "model"
WEIGHTS = ("transformer", "vae")


def _psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return -10 * math.log10(mse_loss(one, other).item())


@pytest.fixture(scope="module")
def text_encoder():
    return build_text_encoder(MODEL / "text_encoder")


def test_fits_into_15_megabytes():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 15_000_000


def test_has_a_model_card_and_no_pickles():
    suffixes = {path.suffix for path in MODEL.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_are_finite_half_precision(part):
    weights = load_file(MODEL / part / "diffusion_pytorch_model.safetensors")
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in weights.values())


def test_networks_load_in_diffusers_with_every_weight():
    for cls, part in ((QwenImageTransformer2DModel, "transformer"), (AutoencoderKLQwenImage, "vae")):
        _, report = cls.from_pretrained(MODEL / part, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler")
    assert scheduler.config.shift_terminal == 0.02


def test_text_encoder_is_a_function_of_its_seed(text_encoder):
    hasher = hashlib.sha256()
    for name in (
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.mlp.down_proj.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.mlp.2.weight",
    ):
        hasher.update(text_encoder.get_parameter(name)[:8].numpy().tobytes())
    assert hasher.hexdigest()[:16] == "d0c36275c747c037"
    assert all(parameter.isfinite().all() for parameter in text_encoder.parameters())
    assert not any(buffer.is_meta for buffer in text_encoder.buffers())


def test_text_encoder_tells_captions_apart(text_encoder):
    ids = torch.arange(100, 116).unsqueeze(0)
    one = text_encoder.model(input_ids=ids).last_hidden_state
    other = text_encoder.model(input_ids=ids.flip(1)).last_hidden_state
    same_tokens = torch.cosine_similarity(one, other.flip(1), dim=-1)
    different_tokens = torch.cosine_similarity(one, other, dim=-1)
    assert same_tokens.mean() > 0.7
    assert different_tokens.abs().mean() < 0.4


def test_base_copies_its_reference(tokenizer_dir):
    """Without a caption, in 8 Euler steps, for a photograph that was not used in pre-training."""
    model = ModelConfig(base=DEMO_MODEL, tokenizer=str(tokenizer_dir), mixed_precision="no")
    device = torch.device("cpu")
    with Image.open(pictures.PAIRS / "reference" / "00_chelsea.png") as tile:
        picture = torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255
    vae = load_vae(BaseModel(model), device)
    latents = encode_picture(vae, picture).unsqueeze(0)
    embeds = load_text_encoder(BaseModel(model), "comfyui", device).encode(" ", [picture]).unsqueeze(0)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    sampled = sample_latents(
        load_transformer(BaseModel(model), device),
        noise,
        Condition((latents,), embeds),
        scheduler=load_scheduler(MODEL / "scheduler"),
        num_steps=8,
    )
    assert _psnr(decode_latents(vae, latents[0]), picture) >= 22
    assert _psnr(decode_latents(vae, sampled[0]), picture) >= 20
