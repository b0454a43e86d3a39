"""Encodes a prompt and its pictures with Qwen2.5-VL, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from ..config import ModelConfig, Preprocessing
from ..errors import DatasetError, MissingPackageError
from ..events import SILENT, Observer
from ..precision.quantise import quantise
from . import prompt
from .base_model import BaseModel
from .flavours import FLAVOURS, Flavour
from .folder import DEMO_FOLDER, ModelFolder
from .text_encoder_file import KEPT_LAYERS, load_by_layers
from .vision import num_vision_tokens, rotary_positions, vision_patches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

PICTURE_TOKEN = "<|image_pad|>"
# By preprocessing: `comfyui` has tensors [3, H, W] in 0..1, `diffusers` 8-bit RGB.
Picture: TypeAlias = Tensor | Image.Image


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """A picture's input to Qwen2.5-VL's language model, on the CPU.

    `tokens` are [N, D] in the network's dtype; `grid` [1, 3] is (frames, rows, columns) of the patches before merging.
    """

    tokens: Tensor
    grid: Tensor


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Qwen2.5-VL with its tokenizer, and how a flavour uses it."""

    network: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    flavour: Flavour
    preprocessing: Preprocessing
    processor_folder: Path

    def encode(self, caption: str, pictures: Sequence[Picture]) -> Tensor:
        """Prompt embeddings [L, D] on the CPU: the last hidden state of all tokens after the system turn.

        Raises:
            DatasetError: the caption contains a picture placeholder.
        """
        return self.encode_seen(caption, [self.see(picture) for picture in pictures])

    @torch.no_grad()
    def see(self, picture: Picture) -> VisualTokens:
        """Run the vision tower on one picture. The result is independent of the caption and of other pictures."""
        patches, grid = self._patches(picture)
        seen = self.network.model.visual(
            patches.to(self.network.device, self.network.dtype), grid_thw=grid.to(self.network.device)
        )
        tokens: Tensor = getattr(seen, "pooler_output", seen)  # transformers 4 returns the tensor itself
        return VisualTokens(tokens.cpu(), grid)

    @torch.no_grad()
    def encode_seen(self, caption: str, seen: Sequence[VisualTokens]) -> Tensor:
        """`encode` for pictures that already went through `see`.

        Raises:
            DatasetError: the caption contains a picture placeholder.
        """
        grids = [each.grid for each in seen]
        ids = self.token_ids(caption, [num_vision_tokens(grid) for grid in grids])
        device = self.network.device
        input_ids = torch.tensor([ids], device=device)
        inputs: dict[str, Tensor] = {"inputs_embeds": self.network.get_input_embeddings()(input_ids)}
        if seen:
            tokens = torch.cat([each.tokens for each in seen]).to(device, inputs["inputs_embeds"].dtype)
            places = (input_ids == prompt.IMAGE_PAD).unsqueeze(-1)
            inputs["inputs_embeds"] = inputs["inputs_embeds"].masked_scatter(places, tokens)
            inputs["image_grid_thw"] = torch.cat(grids).to(device)
        if self.preprocessing == "comfyui":
            inputs["position_ids"] = rotary_positions(ids, grids).unsqueeze(1).to(device)
        # With `diffusers`, transformers chooses the positions, as in diffusers' pipelines.
        hidden = self.network.model(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False, **inputs
        ).last_hidden_state[0]
        return hidden[prompt.first_kept(ids) :].float().cpu()

    def token_ids(self, caption: str, picture_tokens: Sequence[int]) -> list[int]:
        """Token ids of the whole prompt, with one placeholder per vision token of each picture.

        Raises:
            DatasetError: the caption contains a picture placeholder.
        """
        if picture_tokens and PICTURE_TOKEN in caption:
            raise DatasetError(f"The caption {caption!r} contains {PICTURE_TOKEN}, a picture placeholder. Remove it.")
        text = prompt.prompt_text(self.flavour, caption, len(picture_tokens))
        if self.preprocessing == "comfyui":  # ComfyUI's tokenizer turns an escaped bracket into a plain one
            text = text.replace("\\(", "(").replace("\\)", ")")
        return prompt.token_ids(self.tokenizer, text, picture_tokens)

    def _patches(self, picture: Picture) -> tuple[Tensor, Tensor]:
        if isinstance(picture, Tensor):
            return vision_patches(picture)
        batch = _image_processor(self.processor_folder)(images=[picture], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]


def _image_processor(folder: Path) -> Any:
    try:
        from transformers import Qwen2VLImageProcessor

        if (folder / "preprocessor_config.json").is_file():
            return Qwen2VLImageProcessor.from_pretrained(folder)
        return Qwen2VLImageProcessor()
    except ImportError as error:
        raise MissingPackageError("torchvision", "preprocessing `diffusers`") from error


def load_text_encoder(
    base: BaseModel, preprocessing: Preprocessing, device: torch.device, observer: Observer = SILENT
) -> TextEncoder:
    """Load a base model's text encoder, frozen. Its dtype is bf16 on accelerators and float32 on the CPU.

    Raises:
        ModelFileError: the folder or file is not a Qwen2.5-VL.
        Interrupted: the observer wants to stop.
    """
    folder, config = base.folder, base.config
    is_demo = folder.text_encoder.is_relative_to(DEMO_FOLDER)
    network = _demo_network(folder) if is_demo else _stored_network(folder, config, device, observer)
    if is_demo:
        quantise(network, config.text_encoder_precision, KEPT_LAYERS, device, observer)
    return TextEncoder(
        network=network.to(device).eval().requires_grad_(False),  # noqa: FBT003
        tokenizer=prompt.load_tokenizer(folder.tokenizer),
        flavour=FLAVOURS[config.flavour],
        preprocessing=preprocessing,
        processor_folder=folder.processor,
    )


def _demo_network(folder: ModelFolder) -> Qwen2_5_VLForConditionalGeneration:
    from ..demo.text_encoder import build_text_encoder

    return build_text_encoder(folder.text_encoder)


def _stored_network(
    folder: ModelFolder, config: ModelConfig, device: torch.device, observer: Observer
) -> Qwen2_5_VLForConditionalGeneration:
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" and device.type != "cpu" else torch.float32
    return load_by_layers(config, folder.text_encoder, dtype, device, observer)
