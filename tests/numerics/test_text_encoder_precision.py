"""The quantised text encoder: close to the full one, with its own cache entries, and loaded layer by layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support.narrow import make_pairs, picture, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import BaseModelPrecision, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.precision.frozen_linear import FrozenLinear
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder import TextEncoder, load_text_encoder

CPU = torch.device("cpu")


def encoder(model: ModelConfig, precision: BaseModelPrecision) -> TextEncoder:
    """The text encoder in a precision."""
    return load_text_encoder(BaseModel(dataclasses.replace(model, text_encoder_precision=precision)), "comfyui", CPU)


def embeddings(loaded: TextEncoder) -> torch.Tensor:
    """Embeddings of one prompt with one picture."""
    return loaded.encode("turn it into a pencil drawing", [to_tensor(picture(3))])


def test_layer_by_layer_is_what_transformers_loads(model: ModelConfig) -> None:
    ours = encoder(model, "none")
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(Path(model.base) / "text_encoder").eval()
    wanted = embeddings(dataclasses.replace(ours, network=whole))
    assert (
        embeddings(ours) - wanted
    ).abs().max() <= 1e-6 * wanted.abs().max()  # the vision tower's sums are ordered otherwise


@pytest.mark.parametrize(("precision", "least", "most"), [("int8-quanto", 1e-4, 2e-2), ("nf4-bnb", 1e-3, 0.3)])
def test_a_quantised_text_encoder_is_near(
    model: ModelConfig, precision: BaseModelPrecision, least: float, most: float
) -> None:
    exact, loaded = embeddings(encoder(model, "none")), encoder(model, precision)
    error = float((embeddings(loaded) - exact).norm() / exact.norm())
    assert least < error < most
    named = dict(loaded.network.named_modules())
    changed = {name for name, layer in named.items() if isinstance(layer, FrozenLinear)}
    assert any("visual.blocks" in name for name in changed) and any("language_model.layers" in name for name in changed)
    kept = {name for name, layer in named.items() if type(layer) is nn.Linear}
    assert all("visual.merger" in name for name in kept)


def test_the_demo_text_encoder_takes_a_precision(tokenizer_dir: Path) -> None:
    demo = ModelConfig(tokenizer=str(tokenizer_dir), mixed_precision="no", device="cpu")
    exact, rough = embeddings(encoder(demo, "none")), embeddings(encoder(demo, "int8-quanto"))
    assert 0 < float((rough - exact).norm() / exact.norm()) < 5e-2


def test_prompts_of_another_precision_are_other_entries(model: ModelConfig, tmp_path: Path) -> None:
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 2))
    rough = dataclasses.replace(model, text_encoder_precision="int8-quanto")
    one, two = (
        encode_dataset(dataset, BaseModel(each), small_encoding(num_eval_images=0), tmp_path / "cache")
        for each in (model, rough)
    )
    assert one.manifest != two.manifest
    for first, second in zip(one.pairs, two.pairs, strict=True):
        assert first.target == second.target and not set(first.prompts) & set(second.prompts)
