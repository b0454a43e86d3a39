"""Sizes and rectangles."""

from __future__ import annotations

import math

import pytest

from trainer_core.geometry import Box, Size, area_size, bucket_size, crop_box, scale_box, similar_shape

SIZES = [Size(1024, 1024), Size(1777, 1003), Size(640, 4000), Size(33, 31), Size(5000, 21)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolution", [128, 512, 1024])
def test_buckets_keep_area_and_aspect(size: Size, resolution: int) -> None:
    bucket = bucket_size(size, resolution)
    assert all(side % 32 == 0 and side >= 32 for side in bucket)
    exact = [side * resolution / math.sqrt(size.width * size.height) for side in size]
    assert all(side == 32 or abs(side - wanted) <= 16 for side, wanted in zip(bucket, exact, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_centred_inside_and_as_large_as_can_be(size: Size) -> None:
    bucket = bucket_size(size, 512)
    box = crop_box(size, bucket)
    assert box.left >= 0 and box.top >= 0 and box.right <= size.width and box.bottom <= size.height
    assert box.width == size.width or box.height == size.height
    assert abs((box.left + box.right) - size.width) <= 1 and abs((box.top + box.bottom) - size.height) <= 1
    assert abs(box.width * bucket.height - box.height * bucket.width) <= max(bucket) / 2 + 1


def test_area_sizes() -> None:
    assert area_size(Size(2000, 1000), 1024 * 1024, 8) == (1448, 728)
    assert area_size(Size(2000, 1000), 1024 * 1024) == (1448, 724)


def test_a_box_follows_its_picture_to_another_size() -> None:
    box = Box(10, 20, 110, 220)
    assert scale_box(box, Size(200, 400), Size(200, 400)) == box
    assert scale_box(box, Size(200, 400), Size(100, 200)) == (5, 10, 55, 110)


@pytest.mark.parametrize(("other", "similar"), [(Size(48, 32), True), (Size(50, 32), True), (Size(52, 32), False)])
def test_shapes_are_similar_within_the_rounding_of_small_sizes(other: Size, similar: bool) -> None:
    assert similar_shape(Size(96, 64), other) == similar_shape(other, Size(96, 64)) == similar
