"""Sizes and crops of targets and references, for sides that are not multiples of the alignment."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from trainer_core.conditioning.pictures import plan_pair, render
from trainer_core.conditioning.sizes import measure, target_size
from trainer_core.config import EncodingConfig, SizeConfig
from trainer_core.errors import ConfigError
from trainer_core.geometry import Size, bucket_size, crop_box
from trainer_core.qwen_image.flavours import FLAVOURS

SIZES = [Size(1777, 1003), Size(641, 480), Size(333, 1000), Size(5000, 3001)]
EDIT = FLAVOURS["edit-v2"]


def encoding(resolution: int = 256, seed: int = 0, match: bool = True, **sizes: object) -> EncodingConfig:
    return EncodingConfig(resolution=resolution, seed=seed, match_target_res=match, sizes=SizeConfig(**sizes))


@pytest.mark.parametrize("size", SIZES)
def test_by_default_nothing_is_new(size: Size) -> None:
    plan = plan_pair((size, size), EDIT, encoding(), "key")
    assert plan.target.size == bucket_size(size, 256)
    assert plan.target.box == crop_box(size, plan.target.size) == plan.references[0].box


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [16, 32])
def test_resolution_types(size: Size, step: int) -> None:
    pixel = target_size(size, encoding(resolution_type="pixel", aspect_bucket_alignment=step))
    assert min(pixel) == 256 and all(side % step == 0 for side in pixel)
    assert abs(max(pixel) - 256 * max(size) / min(size)) <= step / 2
    area = target_size(size, encoding(resolution_type="area", megapixels=0.25, aspect_bucket_alignment=step))
    exact = [side * math.sqrt(0.25e6 / (size.width * size.height)) for side in size]
    assert all(side % step == 0 and abs(side - wanted) <= step / 2 for side, wanted in zip(area, exact, strict=True))
    assert target_size(size, encoding(resolution_type="area", megapixels=0.256**2, aspect_bucket_alignment=step)) == (
        target_size(size, encoding(aspect_bucket_alignment=step))
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", ["center", "random", "corner"])
@pytest.mark.parametrize("aspect", ["square", "preserve"])
def test_crops_lie_inside_and_references_have_them_too(size: Size, style: str, aspect: str) -> None:
    half = Size(size.width // 2, size.height // 2)
    plan = plan_pair((size, size, half), EDIT, encoding(crop=True, crop_aspect=aspect, crop_style=style), "a/b")
    box, (same, smaller) = plan.target.box, plan.references
    assert box.left >= 0 and box.top >= 0 and box.right <= size.width and box.bottom <= size.height
    assert (
        min(box.width / size.width, box.height / size.height)
        <= 1
        == max(box.width / size.width, box.height / size.height)
    )
    assert same.box == box and same.size == plan.target.size == smaller.size
    assert all(abs(2 * little - large) <= 3 for little, large in zip(smaller.box, box, strict=True))
    if aspect == "square":
        assert plan.target.size == (256, 256) and abs(box.width - box.height) <= 1
    if style == "corner":
        assert box[:2] == (0, 0)
    if style == "center":
        assert abs(box.left + box.right - size.width) <= 1 and abs(box.top + box.bottom - size.height) <= 1


def test_random_places_depend_on_seed_and_pair_alone() -> None:
    def left(seed: int, key: str) -> int:
        return plan_pair(
            (Size(1777, 1003),), EDIT, encoding(seed=seed, crop=True, crop_style="random"), key
        ).target.box[0]

    drawn = {(seed, key): left(seed, key) for seed in (0, 1) for key in "abcdef"}
    assert drawn == {(seed, key): left(seed, key) for seed in (0, 1) for key in "abcdef"}
    assert len(set(drawn.values())) > 9 and all(0 <= value <= 1777 - 1003 for value in drawn.values())


@pytest.mark.parametrize("style", ["center", "random", "corner"])
def test_a_random_crop_shows_the_same_pixels_in_target_and_reference(style: str) -> None:
    size = Size(641, 480)
    settings = dataclasses.replace(encoding(crop=True, crop_style=style), preprocessing="diffusers")  # same filter
    plan = plan_pair((size, size), EDIT, settings, "x")
    x, y = np.meshgrid(np.linspace(0, 12, size.width), np.linspace(0, 9, size.height))
    picture = Image.fromarray(((np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1) + 1) * 127).astype(np.uint8))
    assert (render(picture, plan.target) - render(picture, plan.references[0])).abs().max() == 0


def test_large_pictures_are_cut_as_if_shrunk_first() -> None:
    sizes = {"resolution_type": "pixel", "crop": True, "maximum_image_size": 1536.0, "target_downsample_size": 1280.0}
    large, fits = Size(5001, 2999), Size(1500, 1499)
    plan = plan_pair((large,), EDIT, encoding(1024, **sizes))
    assert plan.target.size == (1024, 1024)
    assert abs(plan.target.box.width - 1024 / 1280 * 2999) <= 1  # 1024 of the 1280 after shrinking
    assert abs(plan.target.box.left + plan.target.box.right - large.width) <= 1
    assert plan_pair((fits,), EDIT, encoding(1024, **sizes)).target.box.size == (1499, 1499)
    area = {"resolution_type": "area", "crop": True, "maximum_image_size": 4.0, "target_downsample_size": 2.25}
    plan = plan_pair((Size(3000, 3000),), EDIT, encoding(megapixels=1.024**2, **area))
    assert plan.target.size == (1024, 1024) and abs(plan.target.box.width - 1024 / 1500 * 3000) <= 1
    tiny = {**sizes, "maximum_image_size": 500.0, "target_downsample_size": 400.0}
    assert plan_pair((fits,), EDIT, encoding(1024, **tiny)).target.box.size == (1499, 1499)  # the largest square


def test_references_of_another_framing() -> None:
    sizes = (Size(641, 480), Size(500, 500))
    whole = plan_pair(sizes, EDIT, encoding(match=False, crop=True)).references[0]
    assert whole.box == (0, 0, 500, 500)
    matched = plan_pair(sizes, EDIT, encoding(crop=True, crop_aspect="preserve", crop_style="corner"))
    assert matched.references[0].box[:2] == (0, 0) and matched.references[0].size == matched.target.size


def test_measures() -> None:
    size = Size(2000, 500)
    assert measure(size, SizeConfig(resolution_type="pixel")) == 500
    assert measure(size, SizeConfig(resolution_type="area")) == 1.0
    assert measure(size, SizeConfig()) == 1000


def test_a_share_of_a_crop() -> None:
    assert crop_box(Size(100, 60), Size(1, 1), (1.0, 0.0), 0.5) == (70, 0, 100, 30)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution_type": "pixels"}, "Did you mean 'pixel"),
        ({"aspect_bucket_alignment": 24}, "16 or 32"),
        ({"maximum_image_size": 5.0, "crop": True}, "set both or neither"),
        ({"target_downsample_size": 5.0, "crop": True}, "set both or neither"),
        ({"maximum_image_size": 5.0, "target_downsample_size": 4.0}, "crop must be true"),
        ({"crop_style": "centre"}, "center"),
        ({"megapixels": 1024.0}, "0.01 to 17"),
    ],
)
def test_wrong_sizes(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SizeConfig(**change)
