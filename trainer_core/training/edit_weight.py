"""Loss weights that emphasise the edited region, from the difference of reference and target latents. Off by default.

They need no painted masks. Their mean is 1 per pair, so that losses and learning rates stay comparable.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ..conditioning.encoded import EncodedDataset
from ..events import SILENT, Observer, watched
from ..geometry import Size, similar_shape
from ..pictures.rows import Look, PictureRow, draw_rows

FLOOR = 0.1  # weight of unchanged latents relative to the most changed ones, at strength 1
_SMOOTHING = 3  # width of the averaging window in latents of 8 pixels


def edit_weights(target_BCHW: Tensor, reference_BCHW: Tensor, strength: float) -> Tensor:
    """Weights [B, 1, H, W] of mean 1 per pair: all 1 at strength 0, given by the difference at strength 1."""
    ones = torch.ones_like(target_BCHW[:, :1])
    (height, width), (rows, columns) = target_BCHW.shape[-2:], reference_BCHW.shape[-2:]
    if not similar_shape(Size(columns, rows), Size(width, height)):
        return ones  # a reference with another aspect ratio does not show the same scene
    reference = reference_BCHW
    if (rows, columns) != (height, width):
        reference = interpolate(reference_BCHW, size=(height, width), mode="bilinear", antialias=True)
    difference = (target_BCHW - reference).abs().mean(dim=1, keepdim=True)
    smooth = avg_pool2d(difference, _SMOOTHING, 1, _SMOOTHING // 2, count_include_pad=False)
    largest = smooth.amax(dim=(2, 3), keepdim=True)
    level = FLOOR + (1 - FLOOR) * torch.where(largest > 0, smooth / largest.clamp_min(1e-9), ones)
    return (1 - strength) * ones + strength * level / level.mean(dim=(2, 3), keepdim=True)


def combined_weights(
    target_BCHW: Tensor, references: tuple[Tensor, ...], mask_B1HW: Tensor | None, strength: float
) -> Tensor | None:
    """Loss weights of mean 1: the edit weights (from the first reference) times the mask. None if all are 1."""
    if strength == 0 or not references:
        return mask_B1HW
    weights = edit_weights(target_BCHW, references[0], strength)
    if mask_B1HW is None:
        return weights
    weights = weights * mask_B1HW
    return weights / weights.mean(dim=(2, 3), keepdim=True)


def edit_weight_preview(
    encoded: EncodedDataset, strength: float, *, max_pairs: int = 12, observer: Observer = SILENT
) -> Image.Image:
    """The loss weights of the first pairs as pictures: grey is 1, white is 3 or more, black is 0.

    Raises:
        ConfigError: the references are not in the cache (reference_latents on_the_fly).
    """
    rows = []
    for entry in watched((*encoded.pairs, *encoded.validation_pairs)[:max_pairs], observer):
        pair = encoded.load(entry)
        references = tuple(each[None] for each in pair.reference_latents)
        mask = None if pair.loss_weights is None else pair.loss_weights[None]
        weights = combined_weights(pair.target_latents[None], references, mask, strength)
        level = np.ones(entry.shape[1:]) if weights is None else weights[0, 0].numpy()
        grey = Image.fromarray((np.clip(level / 3, 0, 1) * 255).round().astype(np.uint8))
        size = (grey.width * 8, grey.height * 8)
        label = f"{entry.key}   weights {level.min():.2f} to {level.max():.2f}"
        rows.append(PictureRow((grey.resize(size, Image.Resampling.NEAREST),), entry.captions[0], label))
    return draw_rows(["weight"], rows, Look(cell=160, columns=0, title=f"Loss weights at edit_weight {strength:g}"))
