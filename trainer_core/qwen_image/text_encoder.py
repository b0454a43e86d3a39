"""Encodes a prompt and its pictures with Qwen2.5-VL, without padding."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from ..config import Preprocessing
from ..device import copied_to, free_bytes
from ..errors import DatasetError, MissingPackageError
from ..events import SILENT, Observer
from ..memory.streaming import BlockStream
from ..packages import explained_imports
from ..precision.quantise import converter, quantise
from ..text import brief
from . import prompt
from .base_model import BaseModel
from .batching import in_batches
from .flavours import FLAVOURS, Flavour
from .folder import DEMO_FOLDER, config_errors
from .stops import stop_before_each
from .text_encoder_file import KEPT_LAYERS, check_text_encoder_file, load_by_layers
from .text_encoder_size import BATCH_TOKENS, STREAM_BUFFERS, spread, text_encoder_size
from .vision import num_vision_tokens, rotary_positions, vision_patches
from .vision_attention import attend_in_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

_LOG = logging.getLogger(__name__)
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
    """Qwen2.5-VL with its tokenizer, and how a flavour uses it.

    A forward pass takes inputs of `batch_tokens` tokens together, or a single larger one.
    """

    network: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    flavour: Flavour
    preprocessing: Preprocessing
    processor_folder: Path
    batch_tokens: int = 0

    def encode(self, caption: str, pictures: Sequence[Picture]) -> Tensor:
        """Prompt embeddings [L, D] on the CPU: the last hidden state of all tokens after the system turn.

        Raises:
            DatasetError: the caption contains a picture placeholder.
        """
        return self.encode_seen(caption, list(self.see_all(pictures)))

    def see(self, picture: Picture) -> VisualTokens:
        """`see_all` for one picture."""
        return next(self.see_all([picture]))

    def encode_seen(self, caption: str, seen: Sequence[VisualTokens]) -> Tensor:
        """`encode` for pictures that already went through `see`.

        Raises:
            DatasetError: the caption contains a picture placeholder.
        """
        return next(self.encode_all([(caption, seen)])).cpu()

    def see_all(self, pictures: Iterable[Picture]) -> Iterator[VisualTokens]:
        """Run the vision tower on pictures. Each result is independent of the caption and of other pictures.

        Consecutive pictures of one size share a forward pass, up to `batch_tokens` tokens.
        """
        prepared = map(self._patches, pictures)
        for batch in in_batches(prepared, self.batch_tokens, _vision_cost):
            yield from self._see(torch.cat([patches for patches, _ in batch]), [grid for _, grid in batch])

    def encode_all(self, prompts: Iterable[tuple[str, Sequence[VisualTokens]]]) -> Iterator[Tensor]:
        """Embeddings [L, D] of captions, each with the results of `see_all`. They are float32 on the network's device.

        Consecutive prompts share a forward pass, up to `batch_tokens` tokens.

        Raises:
            DatasetError: a caption contains a picture placeholder.
        """
        for batch in in_batches(map(self._prompt, prompts), self.batch_tokens, _prompt_cost):
            yield from self._encode(batch)

    @torch.no_grad()
    def _see(self, patches: Tensor, grids: list[Tensor]) -> Iterator[VisualTokens]:
        tower = self.network.model.visual
        seen = tower(patches.to(tower.device, tower.dtype), grid_thw=torch.cat(grids).to(tower.device))
        tokens: Tensor = getattr(seen, "pooler_output", seen)  # transformers 4 returns the tensor itself
        parts = tokens.cpu().split([num_vision_tokens(grid) for grid in grids])
        return iter([VisualTokens(part.clone(), grid) for part, grid in zip(parts, grids, strict=True)])

    def _prompt(self, prompt_and_seen: tuple[str, Sequence[VisualTokens]]) -> _Prompt:
        caption, seen = prompt_and_seen
        return _Prompt(self.token_ids(caption, [num_vision_tokens(each.grid) for each in seen]), seen)

    @torch.no_grad()
    def _encode(self, batch: list[_Prompt]) -> Iterator[Tensor]:
        """Shorter prompts are padded at their end. Attention is causal, so no token attends to the padding."""
        length = max(len(each.ids) for each in batch)
        device = self.network.model.visual.device  # `network.device` may be that of the token embeddings, the CPU
        ids = torch.tensor([each.ids + [0] * (length - len(each.ids)) for each in batch])
        inputs: dict[str, Any] = {}
        embed = self.network.get_input_embeddings()
        embeds = embed(ids.to(embed.weight.device))
        if seen := [each for one in batch for each in one.seen]:
            tokens = torch.cat([each.tokens for each in seen]).to(embeds)
            places = (ids == prompt.IMAGE_PAD).unsqueeze(-1).to(embeds.device)
            embeds = embeds.masked_scatter(places, tokens)
            inputs["image_grid_thw"] = torch.cat([each.grid for each in seen]).to(device)
        if self.preprocessing == "comfyui":
            inputs["position_ids"] = torch.stack([_positions(each, length) for each in batch], dim=1).to(device)
        # With `diffusers`, transformers chooses the positions, as in diffusers' pipelines.
        hidden = self.network.model(
            input_ids=ids.to(device),
            inputs_embeds=copied_to(device, embeds),
            use_cache=False,
            **inputs,
        ).last_hidden_state
        kept = [slice(prompt.first_kept(each.ids), len(each.ids)) for each in batch]
        return iter([row[part].float() for row, part in zip(hidden, kept, strict=True)])

    def token_ids(self, caption: str, picture_tokens: Sequence[int]) -> list[int]:
        """Token ids of the whole prompt, with one placeholder per vision token of each picture.

        Raises:
            DatasetError: the caption contains a picture placeholder.
        """
        if picture_tokens and PICTURE_TOKEN in caption:
            raise DatasetError(
                f"The caption {brief(caption)} contains {PICTURE_TOKEN}, a picture placeholder. Remove it."
            )
        text = prompt.prompt_text(self.flavour, caption, len(picture_tokens))
        if self.preprocessing == "comfyui":  # ComfyUI's tokenizer turns an escaped bracket into a plain one
            text = text.replace("\\(", "(").replace("\\)", ")")
        return prompt.token_ids(self.tokenizer, text, picture_tokens)

    def _patches(self, picture: Picture) -> tuple[Tensor, Tensor]:
        if isinstance(picture, Tensor):
            return vision_patches(picture.to(self.network.model.visual.device))
        batch = _image_processor(self.processor_folder)(images=[picture], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]


class _Prompt(NamedTuple):
    """Token ids of a prompt, and the pictures in it."""

    ids: list[int]
    seen: Sequence[VisualTokens]


def _vision_cost(batch: list[tuple[Tensor, Tensor]]) -> float:
    """Tokens of a batch of patches and grids; infinity if the sizes differ."""
    grid = batch[0][1]
    return len(batch) * num_vision_tokens(grid) if torch.equal(batch[-1][1], grid) else math.inf


def _prompt_cost(batch: list[_Prompt]) -> int:
    """Tokens of a batch of prompts with its padding."""
    return len(batch) * max(len(each.ids) for each in batch)


def _positions(each: _Prompt, length: int) -> Tensor:
    """Rotary positions [3, `length`] of a prompt. Those of the padding have no effect."""
    positions = rotary_positions(each.ids, [picture.grid for picture in each.seen])
    return pad(positions, (0, length - len(each.ids)))


def _image_processor(folder: Path) -> Any:
    with explained_imports("transformers"):
        from transformers import Qwen2VLImageProcessor

    try:
        if (config := folder / "preprocessor_config.json").is_file():
            with config_errors(config):
                return Qwen2VLImageProcessor.from_pretrained(folder)
        return Qwen2VLImageProcessor()
    except ImportError as error:
        raise MissingPackageError("torchvision", "preprocessing `diffusers`") from error


def check_text_encoder(base: BaseModel, preprocessing: Preprocessing) -> None:
    """Check what `load_text_encoder` and the encoding of prompts need, without reading weights.

    Raises:
        MissingPackageError: the precision or the preprocessing needs a package that is not installed.
        ModelFileError: the text encoder or the tokenizer is missing or wrong.
    """
    converter(base.config.text_encoder_precision)
    prompt.load_tokenizer(base.folder.tokenizer)
    if not base.folder.text_encoder.is_relative_to(DEMO_FOLDER):
        check_text_encoder_file(base.folder.text_encoder)
    if preprocessing == "diffusers":
        _image_processor(base.folder.processor)


def load_text_encoder(
    base: BaseModel, preprocessing: Preprocessing, device: torch.device, observer: Observer = SILENT
) -> TextEncoder:
    """Load a base model's text encoder, frozen. Its dtype is bf16 on accelerators and float32 on the CPU.

    If it does not fit the free memory of a CUDA device, as many layers as necessary stay in host memory, and are copied
    to the device in each forward pass.

    Raises:
        ModelFileError: the folder or file is not a Qwen2.5-VL.
        Interrupted: the observer wants to stop.
    """
    folder, config = base.folder, base.config
    return TextEncoder(
        network=load_network(base, device, observer),
        tokenizer=prompt.load_tokenizer(folder.tokenizer),
        flavour=FLAVOURS[config.flavour],
        preprocessing=preprocessing,
        processor_folder=folder.processor,
        batch_tokens=BATCH_TOKENS if device.type == "cuda" else 0,
    )


def load_network(
    base: BaseModel, device: torch.device, observer: Observer, *, with_head: bool = False
) -> Qwen2_5_VLForConditionalGeneration:
    """The network of `load_text_encoder`, which asks the observer before each layer. `with_head`: it can write text.

    Raises:
        ModelFileError, Interrupted: as `load_text_encoder`.
    """
    if base.folder.text_encoder.is_relative_to(DEMO_FOLDER):
        network = _demo_network(base, device, observer)
    else:
        network = _stored_network(base, device, observer, with_head=with_head)
    attend_in_batches(network.model.visual)
    stop_before_each([*network.model.visual.blocks, *network.model.language_model.layers], observer)
    return network.eval().requires_grad_(False)  # noqa: FBT003


def _demo_network(base: BaseModel, device: torch.device, observer: Observer) -> Qwen2_5_VLForConditionalGeneration:
    from ..demo.text_encoder import build_text_encoder

    network = build_text_encoder(base.folder.text_encoder)
    quantise(network, base.config.text_encoder_precision, KEPT_LAYERS, device, observer)
    return network.to(device)


def _stored_network(
    base: BaseModel, device: torch.device, observer: Observer, *, with_head: bool
) -> Qwen2_5_VLForConditionalGeneration:
    config, place = base.config, base.folder.text_encoder
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" and device.type != "cpu" else torch.float32
    streamed = _streamed_layers(base, dtype, device, with_head=with_head)
    network = load_by_layers(config, place, dtype, device, observer, streamed, with_head=with_head)
    if streamed:
        layers = network.model.language_model.layers
        _LOG.info("%d of the text encoder's %d layers are streamed from host memory.", len(streamed), len(layers))
        BlockStream([layers[number] for number in streamed], device, STREAM_BUFFERS)  # the layers' hooks keep it alive
    return network


def _streamed_layers(
    base: BaseModel, dtype: torch.dtype, device: torch.device, *, with_head: bool = False
) -> tuple[int, ...]:
    if device.type != "cuda":
        return ()
    size = text_encoder_size(base, dtype.itemsize, base.config.text_encoder_precision, with_head=with_head)
    return spread(size.streamed_layers(free_bytes(device)), size.layers)
