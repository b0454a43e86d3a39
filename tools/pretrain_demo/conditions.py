"""Prompt embeddings for whole batches, equal to those that `qwen_image.text_encoder` computes one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer_core.geometry import Size, area_size
from trainer_core.qwen_image import prompt
from trainer_core.qwen_image.flavours import Flavour
from trainer_core.qwen_image.vision import (
    FRAMES,
    MEAN,
    MERGE,
    PATCH,
    STD,
    num_vision_tokens,
    rotary_positions,
    vision_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration


@dataclass(slots=True)
class PromptEncoder:
    """The demo's text encoder for batches of pictures of one size. `known` caches token ids."""

    network: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    known: dict[tuple[str, str, tuple[int, ...]], list[int]] = field(default_factory=dict)

    @torch.no_grad()
    def encode(self, flavour: Flavour, captions: Sequence[str], references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] and their mask [B, L] for B captions. Each reference is a batch [B, 3, H, W]."""
        seen, grids = zip(*(self.see(flavour, reference) for reference in references), strict=True)
        return self.encode_seen(flavour, captions, torch.cat(seen, 1), grids)

    @torch.no_grad()
    def see(self, flavour: Flavour, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Vision tokens [B, N, D] of pictures [B, 3, H, W], and the grid [1, 3] that they all have."""
        patches, grid = batch_patches(self._view(flavour, pictures))
        grids = grid.repeat(len(pictures), 1).to(pictures.device)
        features = self.network.model.get_image_features(patches.flatten(0, 1), grids)
        return torch.stack(list(getattr(features, "pooler_output", features))).float(), grid

    @torch.no_grad()
    def encode_seen(
        self,
        flavour: Flavour,
        captions: Sequence[str],
        seen: Tensor,
        grids: Sequence[Tensor],
        *,
        as_text: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`encode` for pictures that already went through `see`. `seen` [B, N, D] joins the tokens of all references.

        With `as_text`, picture tokens get positions like text, which is what happens in diffusers' pipelines.
        """
        batch, device = len(captions), seen.device
        counts = tuple(num_vision_tokens(grid) for grid in grids)
        ids = [self._ids(flavour, caption, counts) for caption in captions]
        longest = max(ids, key=len)
        padded = torch.tensor([row + [0] * (len(longest) - len(row)) for row in ids]).to(device)
        positions = torch.arange(len(longest)).expand(3, -1) if as_text else rotary_positions(longest, grids)
        embeds = self.network.get_input_embeddings()(padded)
        places = [index for index, token in enumerate(longest) if token == prompt.IMAGE_PAD]
        embeds[:, torch.tensor(places, device=device)] = seen.to(embeds.dtype)
        hidden = self.network.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions.unsqueeze(1).expand(-1, batch, -1).to(device),
            use_cache=False,
        ).last_hidden_state
        lengths = torch.tensor([len(row) for row in ids], device=device)
        mask = torch.arange(len(longest), device=device) < lengths.unsqueeze(1)
        start = prompt.first_kept(longest)
        return hidden[:, start:].float(), mask[:, start:]

    def _ids(self, flavour: Flavour, caption: str, counts: tuple[int, ...]) -> list[int]:
        key = (flavour.name, caption, counts)
        if key not in self.known:
            text = prompt.prompt_text(flavour, caption, len(counts))
            self.known[key] = prompt.token_ids(self.tokenizer, text, counts)
        return self.known[key]

    def _view(self, flavour: Flavour, pictures: Tensor) -> Tensor:
        """The pictures at the size for the vision tower: unchanged if the VAE gets them at the same size, or scaled."""
        if flavour.vision_area == flavour.reference_area:
            return pictures
        width, height = area_size(Size(pictures.shape[3], pictures.shape[2]), flavour.vision_area)
        return interpolate(pictures, (height, width), mode="area")


def batch_patches(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """`vision_patches` for a batch [B, 3, H, W]: patches [B, N, 1176] and the grid [1, 3] that all have."""
    height, width = vision_size(*pictures.shape[2:])
    resized = interpolate(pictures, size=(height, width), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values, device=pictures.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    rows, columns = height // PATCH, width // PATCH
    split = ((resized - mean) / std).view(-1, 1, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    split = split.expand(-1, FRAMES, -1, -1, -1, -1, -1, -1, -1).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return split.reshape(len(pictures), rows * columns, -1), torch.tensor([[1, rows, columns]])
