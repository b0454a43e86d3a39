"""Builds the prompt for Qwen2.5-VL from a caption, and selects the tokens that the transformer gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelFileError
from ..packages import explained_imports
from .flavours import Flavour
from .folder import config_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PAD, IM_START, USER, NEW_LINE = 151655, 151644, 872, 198
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
# A text with the template's special tokens, plain words and a split character, and its tokens.
_KNOWN_TEXT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the colours, naïve 变<|im_end|>"
_KNOWN_IDS = [151644, 872, 198, 151652, 151655, 151653, 74785, 279, 26138, 11, 94880, 586, 26853, 246, 151645]


def prompt_text(flavour: Flavour, caption: str, num_references: int) -> str:
    """The caption in the flavour's chat template, with one vision marker per reference.

    Equal to what ComfyUI's TextEncodeQwenImageEdit and ...Plus build (comfy/text_encoders/qwen_image.py) and, with
    references, to diffusers' edit pipelines.
    """
    if num_references == 0:
        return flavour.template_without_reference.format(caption)
    markers = "".join(flavour.picture_marker.format(number + 1) for number in range(num_references))
    return flavour.template.format(markers + caption)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Qwen2.5's tokenizer from a folder with vocab.json, merges.txt and tokenizer_config.json.

    Raises:
        ModelFileError: the folder has no such tokenizer, or makes other tokens than Qwen2.5's.
    """
    with explained_imports("transformers"):
        from transformers import Qwen2Tokenizer

    instead = (
        "Choose the folder of the Qwen2.5 tokenizer: `tokenizer` of a Qwen-Image-Edit download, or "
        "comfy/text_encoders/qwen25_tokenizer of ComfyUI."
    )
    missing = [name for name in _TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise ModelFileError(f"The tokenizer folder {folder} has no {' and no '.join(missing)}. {instead}")
    with config_errors(folder):
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        found = tokenizer(_KNOWN_TEXT)["input_ids"]
    if found != _KNOWN_IDS:
        raise ModelFileError(f"The tokenizer in {folder} is damaged or not Qwen2.5's: it makes other tokens. {instead}")
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, picture_tokens: Sequence[int]) -> list[int]:
    """Token ids of `text`. Each picture's placeholder is repeated as often as the picture has vision tokens."""
    counts = iter(picture_tokens)
    ids: list[int] = []
    for token in tokenizer(text)["input_ids"]:
        # A placeholder beyond the pictures, typed into the caption, stays one token, as in ComfyUI.
        ids.extend([token] * next(counts, 1) if token == IMAGE_PAD else [token])
    return ids


def first_kept(ids: Sequence[int]) -> int:
    """Index of the first token of the user's turn. The embeddings of all tokens before it are dropped.

    ComfyUI's rule (comfy/text_encoders/qwen_image.py): start at the second <|im_start|> and skip it, `user` and the
    line break. For the edit template this gives 64, the constant that diffusers uses.
    """
    starts = [index for index, token in enumerate(ids) if token == IM_START][:2]
    if not starts:
        return 0
    start = starts[-1]
    return start + 3 if list(ids[start + 1 : start + 3]) == [USER, NEW_LINE] and len(ids) > start + 3 else start
