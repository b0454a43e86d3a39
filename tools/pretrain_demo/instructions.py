"""The edits that the demo's base model learns: functions on pictures, each with several phrasings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))


@dataclass(frozen=True, slots=True)
class Instruction:
    """An edit of pictures [B, 3, H, W] in 0..1, its relative frequency (`weight`), and its phrasings."""

    name: str
    weight: float
    edit: Callable[[Tensor], Tensor]
    phrasings: tuple[str, ...]


def _grey(picture: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=picture.device).view(1, 3, 1, 1)
    return (picture * weights).sum(1, keepdim=True).expand_as(picture)


def _sepia(picture: Tensor) -> Tensor:
    matrix = torch.tensor(SEPIA, device=picture.device)
    return torch.einsum("oc,bchw->bohw", matrix, picture).clamp(0, 1)


def _blurred(picture: Tensor) -> Tensor:
    for _ in range(2):
        picture = avg_pool2d(picture, 5, stride=1, padding=2, count_include_pad=False)
    return picture


def _warm(picture: Tensor) -> Tensor:
    return (picture * torch.tensor([1.15, 1.0, 0.7], device=picture.device).view(1, 3, 1, 1)).clamp(0, 1)


INSTRUCTIONS = (
    Instruction(
        "copy",
        4.0,
        lambda picture: picture,
        (
            "keep the picture as it is",
            "do not change anything",
            "copy the picture",
            "reproduce the photo exactly",
            "leave the image unchanged",
            "",
            " ",
        ),
    ),
    Instruction(
        "mirror",
        1.5,
        lambda picture: picture.flip(3),
        ("mirror the picture left to right", "flip the image horizontally", "show the mirror image of the photo"),
    ),
    Instruction(
        "flip",
        1.5,
        lambda picture: picture.flip(2),
        ("turn the picture upside down", "flip the image vertically", "mirror the photo top to bottom"),
    ),
    Instruction(
        "grey",
        1.0,
        _grey,
        ("make it black and white", "turn the photo into a greyscale image", "remove all colours", "make it grey"),
    ),
    Instruction(
        "darker",
        1.0,
        lambda picture: picture * 0.55,
        ("make the picture darker", "darken the photo", "lower the brightness of the image"),
    ),
    Instruction(
        "brighter",
        1.0,
        lambda picture: 1 - (1 - picture) * 0.6,
        ("make the picture brighter", "brighten the photo", "raise the brightness of the image"),
    ),
    Instruction(
        "red-blue",
        1.0,
        lambda picture: picture.flip(1),
        (
            "swap red and blue",
            "exchange the red and blue channels of the photo",
            "make red things blue and blue things red",
        ),
    ),
    Instruction(
        "contrast",
        1.0,
        lambda picture: ((picture - 0.5) * 1.6 + 0.5).clamp(0, 1),
        ("increase the contrast", "give the photo more contrast", "make the picture punchier"),
    ),
    Instruction(
        "sepia",
        1.0,
        _sepia,
        ("give the photo a sepia tone", "make it look like an old brown photograph", "make it sepia"),
    ),
    Instruction(
        "blur", 1.0, _blurred, ("blur the picture", "make the photo soft and out of focus", "smooth the image")
    ),
    Instruction(
        "warm", 1.0, _warm, ("make the colours warmer", "give the photo a warm tone", "add warm evening light")
    ),
)
# For several references. Instructions without a picture's number always refer to the first one.
NAMED_REFERENCE = ("show picture {}", "keep picture {} as it is", "copy picture {}")
