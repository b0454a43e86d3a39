"""The streamed text encoder gives the same bits, vision windows in batches the same results, and both need what is
planned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.live_bytes import META, LiveBytes, flash_attention
from tests.support.narrow import picture
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import BaseModelPrecision, ModelConfig
from trainer_core.planning.workload import LANGUAGE_MODEL, VISION_TOWER
from trainer_core.qwen_image import text_encoder, vision_attention
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder_file import qwen25_vl_7b
from trainer_core.qwen_image.text_encoder_size import _TOKEN_ELEMENTS as TOKEN_ELEMENTS
from trainer_core.qwen_image.text_encoder_size import spread, text_encoder_size

CPU = torch.device("cpu")


def encoder(model: ModelConfig, precision: BaseModelPrecision) -> text_encoder.TextEncoder:
    """The text encoder in a precision."""
    base = BaseModel(dataclasses.replace(model, text_encoder_precision=precision))
    return text_encoder.load_text_encoder(base, "comfyui", CPU)


def embeddings(loaded: text_encoder.TextEncoder) -> Tensor:
    """Embeddings of one prompt with one picture."""
    return loaded.encode("turn it into a pencil drawing", [to_tensor(picture(3))])


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb", "int4-quanto"])
@pytest.mark.parametrize("half", [False, True])
def test_streamed_layers_change_no_bit(
    model: ModelConfig, precision: BaseModelPrecision, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = embeddings(encoder(model, precision))
    base = BaseModel(dataclasses.replace(model, text_encoder_precision=precision))
    layers = text_encoder_size(base, 4, precision).layers
    assert layers >= 2
    numbers = spread(layers // 2 if half else layers, layers)
    monkeypatch.setattr(text_encoder, "_streamed_layers", lambda *_, **__: numbers)
    loaded = encoder(model, precision)
    assert torch.equal(embeddings(loaded), wanted) and torch.equal(embeddings(loaded), wanted)
    held = [next(layer.parameters()).untyped_storage() for layer in loaded.network.model.language_model.layers]
    shared = len(held) - len({each.data_ptr() for each in held})
    assert shared == max(0, len(numbers) - 2), "streamed layers take turns with two buffers"


def test_the_number_of_streamed_layers_follows_the_free_memory(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseModel(model)
    size = text_encoder_size(base, 2, "none")
    assert text_encoder._streamed_layers(base, torch.bfloat16, CPU) == ()
    for free, streamed in ((2**40, 0), (0, size.layers)):
        monkeypatch.setattr(text_encoder, "free_bytes", lambda _, free=free: free)
        found = text_encoder._streamed_layers(base, torch.bfloat16, torch.device("cuda"))
        assert found == tuple(range(size.layers))[: streamed or None][:streamed]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_windows_together_equal_windows_one_by_one(model: ModelConfig, dtype: torch.dtype, tolerance: float) -> None:
    ours = encoder(model, "none").network.model.visual.to(dtype)
    theirs = copy.deepcopy(ours)
    for block in theirs.blocks:
        del block.attn.forward
    draws = torch.Generator().manual_seed(5)
    for rows, columns, pictures in ((28, 28, 1), (18, 30, 1), (8, 8, 3), (18, 30, 3), (2, 34, 2)):
        grid = torch.tensor([[1, rows, columns]] * pictures)
        patches = torch.randn(pictures * rows * columns, 1176, generator=draws).to(dtype)
        with torch.no_grad():
            found, wanted = (tower(patches, grid_thw=grid).pooler_output.float() for tower in (ours, theirs))
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        assert wanted.std() > 0.01


def test_what_it_takes_is_what_is_planned() -> None:
    """Working memory per token of the full network, counted on the meta device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.vision_utils import (
        get_vision_attention_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    live = LiveBytes()
    with live, META:
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**qwen25_vl_7b())).to(torch.bfloat16).eval().model
    network.requires_grad_(False)
    tower = network.visual
    vision_attention.attend_in_batches(tower)

    def see(pictures: int, side: int) -> Tensor:
        grid = torch.tensor([[1, side, side]] * pictures)
        window_index, ends = get_vision_window_index(grid, 2, 112, 14)
        places: dict[str, Any] = {
            "cu_seqlens": get_vision_attention_seqlens(grid, tower.config)[0],
            "cu_window_seqlens": ends,
            "window_index": window_index.to(META),
            "position_ids": get_vision_position_ids(grid, 2).to(META),
        }
        return tower(torch.empty(pictures * side**2, 1176, dtype=torch.bfloat16, device=META), grid_thw=grid, **places)

    def read(prompts: int, length: int) -> Tensor:
        positions = torch.zeros(3, prompts, length, dtype=torch.long, device=META)
        embeds = torch.empty(prompts, length, 3584, dtype=torch.bfloat16, device=META)
        return network(inputs_embeds=embeds, position_ids=positions, use_cache=False)

    weights = 2 * sum(each.numel() for each in network.language_model.layers.parameters())
    assert weights == pytest.approx(LANGUAGE_MODEL, rel=1e-3)
    merger = 2 * sum(each.numel() for each in tower.merger.parameters())
    patches = 4 * 2 * (sum(each.numel() for each in tower.parameters()) - merger // 2)
    assert patches + merger == pytest.approx(VISION_TOWER, rel=1e-3)
    for pictures, side in ((1, 74), (4, 28)):
        needed = peak(live, see, pictures, side) / (2 * pictures * side**2 / 4)
        assert needed == pytest.approx(TOKEN_ELEMENTS, rel=0.01)
    assert peak(live, read, 3, 500) / (2 * 1500) < TOKEN_ELEMENTS


@torch.no_grad()
def peak(live: LiveBytes, call: Callable[..., Tensor], *arguments: int) -> int:
    """Bytes that the call adds at its peak."""
    before = live.now
    live.restart()
    with flash_attention(), live:
        patched = torch.nn.functional.scaled_dot_product_attention
        with mock.patch.object(vision_attention, "scaled_dot_product_attention", patched):
            call(*arguments)
    return live.peak - before
