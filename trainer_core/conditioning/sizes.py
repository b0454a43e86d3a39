"""Choose the size and crop of a target: resolution, crop and size limits.

Units are named as in SimpleTuner: `pixel` is the shorter edge, `area` is megapixels, `pixel_area` is the side of a
square of equal area. The result is one crop of the original and one size, so that a picture is resized only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..config import EncodingConfig
from ..config.dataset import SizeConfig
from ..data.pairing import EditPair, reference_kinds
from ..errors import DatasetError
from ..geometry import CENTRE, Box, CropPosition, Size, crop_box, kept_share, scaled_size
from ..rng import stream
from ..text import shown

_LEAST_KEPT = 0.25  # of a reference's area
_UNITS = {
    "pixel": "pixels (shorter edge)",
    "area": "megapixels",
    "pixel_area": "pixels (side of a square of equal area)",
}


def measure(size: Size, sizes: SizeConfig) -> float:
    """The size of a picture in the unit of resolution_type."""
    if sizes.resolution_type == "pixel":
        return min(size)
    area = size.width * size.height
    return area / 1e6 if sizes.resolution_type == "area" else math.sqrt(area)


def target_size(size: Size, encoding: EncodingConfig) -> Size:
    """The training size of a target of this size. Its sides are multiples of aspect_bucket_alignment."""
    sizes = encoding.sizes
    side = math.sqrt(sizes.megapixels * 1e6) if sizes.resolution_type == "area" else encoding.resolution
    if sizes.crop and sizes.crop_aspect == "square":
        return scaled_size(Size(1, 1), side, sizes.aspect_bucket_alignment)
    edge = min(size) if sizes.resolution_type == "pixel" else math.sqrt(size.width * size.height)
    return scaled_size(size, side / edge, sizes.aspect_bucket_alignment)


def target_box(size: Size, bucket: Size, encoding: EncodingConfig, key: str) -> Box:
    """The crop of a target: the largest with the bucket's aspect ratio, or a smaller one for a large picture.

    A picture above maximum_image_size is cropped as if it had first been shrunk to target_downsample_size.
    """
    return crop_box(size, bucket, crop_position(encoding, key), _share(size, bucket, encoding.sizes))


def crop_position(encoding: EncodingConfig, key: str) -> CropPosition:
    """Position of the crop, 0 to 1 from left and top. A random one depends only on the seed and the pair's key."""
    style = encoding.sizes.crop_style
    if style == "random":
        x, y = torch.rand(2, generator=stream(encoding.seed, "crop", key)).tolist()
        return x, y
    return (0.0, 0.0) if style == "corner" else CENTRE


def _share(size: Size, bucket: Size, sizes: SizeConfig) -> float:
    """The side of the crop relative to the largest possible crop."""
    if not sizes.crop or not sizes.maximum_image_size or measure(size, sizes) <= sizes.maximum_image_size:
        return 1.0
    shrunk = sizes.target_downsample_size / measure(size, sizes)
    shrunk = math.sqrt(shrunk) if sizes.resolution_type == "area" else shrunk
    return min(1.0, bucket.width / (shrunk * crop_box(size, bucket).width))


def large_enough(pairs: Sequence[EditPair], sizes: SizeConfig) -> tuple[tuple[EditPair, ...], tuple[str, ...]]:
    """The pairs whose target reaches minimum_image_size, and the keys of the other pairs.

    Raises:
        DatasetError: targets are smaller and leave_out_small is off (lists them), or all targets are smaller.
    """
    small = [pair for pair in pairs if measure(pair.sizes[0], sizes) < sizes.minimum_image_size]
    if not small:
        return tuple(pairs), ()
    wanted = f"{sizes.minimum_image_size:g} {_UNITS[sizes.resolution_type]}"
    if not sizes.leave_out_small:
        raise DatasetError(
            f"{len(small)} targets are smaller than minimum_image_size, {wanted}. Use larger pictures, lower the "
            "limit, or turn leave_out_small on:",
            [_described(pair, sizes) for pair in small],
        )
    if len(small) == len(pairs):
        raise DatasetError(f"All {len(pairs)} targets are smaller than minimum_image_size, {wanted}. Lower it.")
    keys = {pair.key for pair in small}
    return tuple(pair for pair in pairs if pair.key not in keys), tuple(sorted(keys))


def check_crops(pairs: Sequence[EditPair], encoding: EncodingConfig) -> None:
    """Refuse references that match_target_res would crop to less than a quarter of their area.

    Raises:
        DatasetError: lists these references.
    """
    if not encoding.match_target_res:
        return
    problems = [
        f"{shown(path)}: {size.width} x {size.height} would be cropped to {share:.1%} of its area for its target of "
        f"{pair.sizes[0].width} x {pair.sizes[0].height}."
        for pair in pairs
        for path, size, kind in zip(pair.references, pair.sizes[1:], reference_kinds(pair), strict=True)
        if kind == "auto" and (share := kept_share(size, target_size(pair.sizes[0], encoding))) < _LEAST_KEPT
    ]
    if problems:
        raise DatasetError(
            f"References with a very different aspect ratio from their targets: {len(problems)}. Crop them. To use "
            "them whole, set conditioning_type to reference_loose, or turn match_target_res off:",
            problems,
        )


def _described(pair: EditPair, sizes: SizeConfig) -> str:
    size = pair.sizes[0]
    return f"{shown(pair.target)}: {size.width} x {size.height}, which is {measure(size, sizes):.4g}"
