"""Loss weights that emphasise the edited region, from the difference of reference and target. Off by default.

They need no painted masks. Their mean is 1 per pair, so that losses and learning rates stay comparable.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from ..conditioning.batches import check_differences
from ..conditioning.encoded import EncodedDataset
from ..config import NoiseConfig
from ..config.training import EditWeightFrom
from ..events import SILENT, Observer, watched
from ..geometry import Size, similar_shape
from ..pictures.rows import Look, PictureRow, draw_rows

FLOOR = 0.1  # linear: weight of unchanged latents relative to the most changed ones, at strength 1
_SMOOTHING = 3  # width of the averaging window in latents of 8 pixels
# What is a change? Below the first number is noise, of JPEG pictures or the VAE. Above the second is a change. Between
# them it depends on the pair. Latents are in standard deviations, pixels in 8-bit steps.
_NOISE_TO_CHANGE: dict[EditWeightFrom, tuple[float, float]] = {"latents": (0.2, 0.5), "pixels": (6.0, 12.0)}
_QUIET = 0.25  # the share of a picture that is taken to show its noise
_ABOVE_NOISE = 4.0
_OF_LARGEST = 0.25


def latent_difference(target_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor | None:
    """The mean difference [B, 1, H, W] of two pictures' latents; None if they have different shapes."""
    (height, width), (rows, columns) = target_BCHW.shape[-2:], reference_BCHW.shape[-2:]
    if not similar_shape(Size(columns, rows), Size(width, height)):
        return None  # a reference with another aspect ratio does not show the same scene
    reference = reference_BCHW
    if (rows, columns) != (height, width):
        reference = interpolate(reference_BCHW, size=(height, width), mode="bilinear", antialias=True)
    return (target_BCHW - reference).abs().mean(dim=1, keepdim=True)


def edit_weights(difference_B1HW: Tensor, noise: NoiseConfig) -> Tensor:
    """Weights [B, 1, H, W] of mean 1 per pair: all 1 at edit_weight 0, given by the difference at 1."""
    strength, ones = noise.edit_weight, torch.ones_like(difference_B1HW)
    if noise.edit_weight_kind == "linear":
        smooth = _smoothed(difference_B1HW)
        largest = smooth.amax(dim=(2, 3), keepdim=True)
        level = FLOOR + (1 - FLOOR) * torch.where(largest > 0, smooth / largest.clamp_min(1e-9), ones)
    else:
        changed = changed_region(difference_B1HW, noise.edit_weight_from)
        share = changed.mean(dim=(2, 3), keepdim=True).clamp_min(1 / ones[0].numel())
        level = ones - changed * share.log2()
    return (1 - strength) * ones + strength * level / level.mean(dim=(2, 3), keepdim=True)


def changed_region(difference_B1HW: Tensor, source: EditWeightFrom) -> Tensor:
    """1 where target and reference differ clearly, and one latent around; 0 elsewhere. [B, 1, H, W].

    The smallest difference that counts follows from each pair: it is far above the noise of its quieter parts, and not
    too far below its largest difference. A spot counts if it and the mean of its surroundings reach it. If even the
    quieter parts are above all noise, the whole picture has changed.
    """
    least, most = _NOISE_TO_CHANGE[source]
    smooth = _smoothed(difference_B1HW)
    quiet = difference_B1HW.flatten(1).quantile(_QUIET, dim=1).view(-1, 1, 1, 1)
    largest = smooth.amax(dim=(2, 3), keepdim=True)
    threshold = torch.maximum(_ABOVE_NOISE * quiet, _OF_LARGEST * largest).clamp(least, most)
    clear = torch.minimum(difference_B1HW, smooth) >= threshold
    return torch.where(quiet > least, 1.0, max_pool2d(clear.to(smooth.dtype), 3, 1, 1))


def _smoothed(difference_B1HW: Tensor) -> Tensor:
    return avg_pool2d(difference_B1HW, _SMOOTHING, 1, _SMOOTHING // 2, count_include_pad=False)


def combined_weights(
    target_BCHW: Tensor,
    references: tuple[Tensor, ...],
    pixel_difference_B1HW: Tensor | None,
    mask_B1HW: Tensor | None,
    noise: NoiseConfig,
) -> Tensor | None:
    """Loss weights of mean 1: the edit weights (from the first reference) times the mask. None if all are 1."""
    difference = pixel_difference_B1HW if noise.needs_pixels else None
    if noise.edit_weight == 0 or (difference is None and not references):
        return mask_B1HW
    if difference is None:
        difference = latent_difference(target_BCHW, references[0])
    weights = torch.ones_like(target_BCHW[:, :1]) if difference is None else edit_weights(difference, noise)
    if mask_B1HW is None:
        return weights
    weights = weights * mask_B1HW
    return weights / weights.mean(dim=(2, 3), keepdim=True)


def edit_weight_preview(
    encoded: EncodedDataset, noise: NoiseConfig, *, max_pairs: int = 12, observer: Observer = SILENT
) -> Image.Image:
    """The loss weights of the first pairs as pictures: grey is 1, white is 3 or more, black is 0.

    Raises:
        ConfigError: the weights need pixel differences that were not encoded, or latents of references that are not in
            the cache (reference_latents on_the_fly).
    """
    rows, shown = [], (*encoded.pairs, *encoded.validation_pairs)[:max_pairs]
    check_differences(shown, noise)
    for entry in watched(shown, observer):
        unread = {"references": (), "reference_shapes": (), "reference_files": ()} if noise.needs_pixels else {}
        pair = encoded.load(dataclasses.replace(entry.seen(0), **unread))
        references = tuple(each[None] for each in pair.reference_latents)
        difference, mask = (None if each is None else each[None] for each in (pair.difference, pair.loss_weights))
        weights = combined_weights(pair.target_latents[None], references, difference, mask, noise)
        level = np.ones(entry.shape[1:]) if weights is None else weights[0, 0].numpy()
        grey = Image.fromarray((np.clip(level / 3, 0, 1) * 255).round().astype(np.uint8))
        size = (grey.width * 8, grey.height * 8)
        label = f"{entry.key}   weights {level.min():.2f} to {level.max():.2f}"
        rows.append(PictureRow((grey.resize(size, Image.Resampling.NEAREST),), entry.captions[0], label))
    title = f"edit_weight {noise.edit_weight:g}, {noise.edit_weight_kind}, {noise.edit_weight_from}"
    return draw_rows(["weight"], rows, Look(cell=160, columns=0, title=title))
