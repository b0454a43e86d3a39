"""Rotary positions for prompts and pictures of many sizes: each is right, and only a few stay in memory."""

from __future__ import annotations

import gc
import weakref

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor

from trainer_core.qwen_image.positions import ComfyuiPositions

CPU = torch.device("cpu")


def positions() -> ComfyuiPositions:
    return ComfyuiPositions(QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True))


def test_prompts_of_all_lengths_share_what_is_held() -> None:
    shared = positions()
    pictures: set[int] = set()
    for length in (1, 255, 256, 257, 700, 255):
        picture, prompt = shared([[(1, 4, 6), (1, 4, 6)]], length, CPU)
        _, alone = positions()([[(1, 4, 6), (1, 4, 6)]], length, CPU)
        assert torch.equal(prompt, alone)
        assert prompt.shape == (length, 8)
        pictures.add(picture.data_ptr())
    assert len(pictures) == 1


def test_a_few_sizes_are_held() -> None:
    shared, seen = positions(), list[weakref.ref[Tensor]]()
    for rows in range(2, 42):
        picture, _ = shared([[(1, rows, 4)]], 10, CPU)
        seen.append(weakref.ref(picture))
        del picture
    gc.collect()
    assert 1 < sum(reference() is not None for reference in seen) <= 8
