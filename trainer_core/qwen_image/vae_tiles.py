"""Runs a picture VAE in tiles where the whole picture would not fit into free memory. The result stays the same.

Only the middle blocks see the whole picture, because they have attention. They work at the latents' size, which takes
little memory. All other layers are convolutions, so a tile with a wide enough margin computes exactly what the whole
picture would have at its place. Tiles therefore need no blending.

This does not call diffusers' `vae.encode` and `vae.decode`: they keep a copy of every layer's input for the next video
frame, and blend tiles that differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..device import free_bytes, release_memory
from .latents import VAE_FACTOR

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

# Elements of working memory per pixel of a tile, and of the whole picture in the middle block and after it.
DECODING_ELEMENTS, ENCODING_ELEMENTS, MIDDLE_ELEMENTS, _FEATURE_ELEMENTS = 675, 581, 55, 6
# How many latents away an input can affect an output of the layers before or after the middle block.
_DECODING_MARGIN, _ENCODING_MARGIN = 13, 9
_SIDES = (128, 64, 32)  # of a tile without its margin, in latents
_USABLE = 0.9  # of free memory, because working memory is an estimate


def decode_raw(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pixels [B, 3, 1, 8 H, 8 W] in -1..1 of the VAE's own latents [B, C, 1, H, W]."""
    decoder = vae.decoder

    def after_middle(x: Tensor) -> Tensor:
        for block in decoder.up_blocks:
            x = block(x)
        return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))

    features = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    return _in_tiles(after_middle, features, (1, VAE_FACTOR), _DECODING_MARGIN, DECODING_ELEMENTS)


def encode_raw(vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
    """Moments [B, 2 C, 1, H, W] of pixels [B, 3, 1, 8 H, 8 W] in -1..1: the latents' mean and log variance."""
    encoder = vae.encoder

    def before_middle(x: Tensor) -> Tensor:
        x = encoder.conv_in(x)
        for block in encoder.down_blocks:
            x = block(x)
        return x

    features = _in_tiles(before_middle, pixels, (VAE_FACTOR, 1), _ENCODING_MARGIN, ENCODING_ELEMENTS)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(features)))))


def least_decoding_bytes(height: int, width: int, element_bytes: int) -> int:
    """Working memory of decoding a picture of this size in pixels in the smallest tiles."""
    tile = VAE_FACTOR**2 * _largest_tile(height // VAE_FACTOR, width // VAE_FACTOR, _SIDES[-1], _DECODING_MARGIN)
    pixels = height * width
    return element_bytes * max(MIDDLE_ELEMENTS * pixels, _FEATURE_ELEMENTS * pixels + DECODING_ELEMENTS * tile)


def least_encoding_bytes(height: int, width: int, element_bytes: int) -> int:
    """Working memory of encoding a picture of this size in pixels in the smallest tiles."""
    tile = VAE_FACTOR**2 * _largest_tile(height // VAE_FACTOR, width // VAE_FACTOR, _SIDES[-1], _ENCODING_MARGIN)
    pixels = height * width
    return element_bytes * max(MIDDLE_ELEMENTS * pixels, _FEATURE_ELEMENTS * pixels + ENCODING_ELEMENTS * tile)


def _largest_tile(rows: int, columns: int, side: int, margin: int) -> int:
    """Latents of the largest tile, with its margin."""
    longest = (
        max(min(end + margin, length) - max(0, start - margin) for start, end in _cuts(length, side))
        for length in (rows, columns)
    )
    return math.prod(longest)


def _in_tiles(
    layers: Callable[[Tensor], Tensor], x: Tensor, factors: tuple[int, int], margin: int, elements: int
) -> Tensor:
    """`layers(x)`, in the largest tiles that fit. `factors`: rows of x and of the result per row of latents.

    Raises:
        torch.OutOfMemoryError: not even the smallest tiles fit.
    """
    rows, columns = (side // factors[0] for side in x.shape[-2:])
    for side in (max(rows, columns), *(each for each in _SIDES if each < max(rows, columns))):
        pixels = len(x) * _largest_tile(rows, columns, side, margin) * VAE_FACTOR**2
        is_last = side <= _SIDES[-1]
        if not is_last and elements * pixels * x.element_size() > _USABLE * free_bytes(x.device):
            continue
        try:
            return _joined(layers, x, factors, side, margin)
        except torch.OutOfMemoryError:  # free memory can be in pieces
            if is_last:
                raise
        release_memory()
    raise AssertionError  # the last side returns or raises


def _joined(layers: Callable[[Tensor], Tensor], x: Tensor, factors: tuple[int, int], side: int, margin: int) -> Tensor:
    """`layers(x)` from tiles of `side` latents, each computed with a margin."""
    before, after = factors
    size = tuple(length // before for length in x.shape[-2:])
    if side >= max(size):
        return layers(x)
    whole = None
    for (top, bottom), (left, right) in product(*(_cuts(length, side) for length in size)):
        first = max(0, top - margin), max(0, left - margin)
        part = x[..., first[0] * before : (bottom + margin) * before, first[1] * before : (right + margin) * before]
        tile = layers(part)
        if whole is None:
            whole = tile.new_empty(*tile.shape[:-2], *(length * after for length in size))
        inner = tile[..., (top - first[0]) * after :, (left - first[1]) * after :]
        inner = inner[..., : (bottom - top) * after, : (right - left) * after]
        whole[..., top * after : bottom * after, left * after : right * after] = inner
    assert whole is not None
    return whole


def _cuts(length: int, side: int) -> Iterable[tuple[int, int]]:
    """Equal parts of 0..length that are at most `side` long."""
    count = -(-length // side)
    return ((length * number // count, length * (number + 1) // count) for number in range(count))
