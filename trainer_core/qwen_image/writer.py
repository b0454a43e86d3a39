"""Lets Qwen2.5-VL answer a question about pictures in text, with its language head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import copied_to
from ..errors import ConfigError
from ..events import SILENT, Observer
from ..packages import explained_imports
from ..precision.quantise import converter
from . import prompt
from .base_model import BaseModel
from .flavours import VISION_PICTURE, chat
from .folder import DEMO_FOLDER
from .recognise import instead_of
from .text_encoder import load_network
from .text_encoder_file import check_text_encoder_file
from .vision import num_vision_tokens, vision_patches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

END_OF_TURN, END_OF_TEXT = 151645, 151643
_SYSTEM = "You compare pictures from before and after an edit, and you write the instruction for the edit."


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote, without special tokens. `is_whole`: it ended by itself, not at the limit of tokens."""

    text: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Writer:
    """Qwen2.5-VL with its language head and its tokenizer."""

    network: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase

    def answer(self, question: str, pictures: Sequence[Tensor], max_tokens: int) -> Answer:
        """The most likely answer, token by token, to a question about pictures [3, H, W] in 0..1.

        The model sees each picture separately, labelled Picture 1, Picture 2 and so on. The same input always gets the
        same answer on the same device.

        Raises:
            Interrupted: the observer that `load_writer` got wants to stop.
        """
        ids = self.token_ids(question, pictures, max_tokens)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(str(text).strip(), is_whole=len(ids) < max_tokens or ids[-1] in (END_OF_TURN, END_OF_TEXT))

    def token_ids(self, question: str, pictures: Sequence[Tensor], max_tokens: int) -> list[int]:
        """Token ids of the answer, with the one that ends it if it is whole."""
        with explained_imports("transformers"):
            from transformers import GenerationConfig

        inputs = self.inputs(question, pictures)
        # What this leaves out has transformers' defaults: the settings in a download's generation_config.json are for
        # sampling, and are not read.
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=[END_OF_TURN, END_OF_TEXT],
            pad_token_id=END_OF_TEXT,
        )
        found: Any = self.network.generate(**inputs, generation_config=greedy)
        return [int(each) for each in found[0, inputs["input_ids"].shape[1] :]]

    def inputs(self, question: str, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """The arguments of transformers' `generate`, on the network's device."""
        device, dtype = self.network.model.visual.device, self.network.model.visual.dtype
        seen = [vision_patches(each.to(device)) for each in pictures]
        grids = [grid for _, grid in seen]
        ids = prompt.token_ids(self.tokenizer, _text(question, len(pictures)), list(map(num_vision_tokens, grids)))
        made = {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
            "pixel_values": torch.cat([patches for patches, _ in seen]).to(dtype),
            "image_grid_thw": torch.cat(grids).to(device),
        }
        # transformers 5 gives pictures positions by row and column only if it is told which tokens are pictures.
        if "mm_token_type_ids" in inspect.signature(self.network.forward).parameters:
            made["mm_token_type_ids"] = (made["input_ids"] == prompt.IMAGE_PAD).int()
        return made


def _text(question: str, num_pictures: int) -> str:
    labelled = (f"Picture {number}: {VISION_PICTURE}" for number in range(1, num_pictures + 1))
    return chat(_SYSTEM, "".join(labelled) + question)


def check_writer(base: BaseModel) -> None:
    """Check what `load_writer` needs, without reading weights.

    Raises:
        ConfigError: the text encoder is the demo model's.
        MissingPackageError: the precision needs a package that is not installed.
        ModelFileError: the text encoder, its language head or the tokenizer is missing or wrong.
    """
    converter(base.config.text_encoder_precision)
    if base.folder.text_encoder.is_relative_to(DEMO_FOLDER):
        raise ConfigError(
            "The demo model can't write captions: its text encoder is a small stand-in with random weights. "
            f"{instead_of('text_encoder')}"
        )
    prompt.load_tokenizer(base.folder.tokenizer)
    check_text_encoder_file(base.folder.text_encoder, with_head=True)


def load_writer(base: BaseModel, device: torch.device, observer: Observer = SILENT) -> Writer:
    """Load a base model's text encoder with its language head, as `load_text_encoder` loads it without.

    Raises:
        ModelFileError: the text encoder or its head can't be read.
        Interrupted: the observer wants to stop.
    """
    network = load_network(base, device, observer, with_head=True)
    embed = network.get_input_embeddings()  # in host memory
    embed.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(layer.weight.device),))
    embed.register_forward_hook(lambda _layer, _inputs, embeds: copied_to(device, embeds))
    return Writer(network, prompt.load_tokenizer(base.folder.tokenizer))
