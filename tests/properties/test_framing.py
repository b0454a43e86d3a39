"""For any two sizes of the same scene: boxes lie inside the pictures, and target and reference lie on each other."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer_core.conditioning.pictures import PairPlan, plan_pair, render
from trainer_core.config import EncodingConfig, SizeConfig
from trainer_core.geometry import Size, crop_box, differ_by_rounding, kept_share, scale_box
from trainer_core.qwen_image.flavours import FLAVOURS

SIDES = st.integers(16, 6000)
SIZES = st.builds(Size, SIDES, SIDES)
PLACES = st.tuples(st.floats(0, 1), st.floats(0, 1))
SMALL_SIDES = st.integers(48, 200)
CROPS = st.sampled_from(
    [
        {},
        *({"crop": True, "crop_style": style} for style in ("center", "random", "corner")),
        {"crop": True, "crop_style": "random", "crop_aspect": "preserve"},
    ]
)
ENCODINGS = st.builds(
    lambda resolution, policy, match, step, crop: EncodingConfig(
        resolution=resolution,
        preprocessing=policy,
        match_target_res=match,
        sizes=SizeConfig(aspect_bucket_alignment=step, **crop),
    ),
    st.sampled_from([128, 512, 768, 1024, 1328]),
    st.sampled_from(["comfyui", "diffusers"]),
    st.booleans(),
    st.sampled_from([16, 32]),
    CROPS,
)


def plan_of(size: Size, other: Size, flavour: str, encoding: EncodingConfig) -> PairPlan:
    return plan_pair((size, other), FLAVOURS[flavour], encoding, "key", conditioning_types=["reference_strict"])


@given(SIZES, SIZES, PLACES, st.floats(0.1, 1))
def test_boxes_lie_inside(size: Size, aspect: Size, place: tuple[float, float], share: float) -> None:
    box = crop_box(size, aspect, place, share)
    assert 0 <= box.left < box.right <= size.width and 0 <= box.top < box.bottom <= size.height
    scaled = scale_box(box, size, aspect)
    assert 0 <= scaled.left < scaled.right <= aspect.width and 0 <= scaled.top < scaled.bottom <= aspect.height
    assert 0 < kept_share(size, aspect) <= 1


@given(SIZES, SIZES, ENCODINGS, st.sampled_from(list(FLAVOURS)))
def test_sizes_are_multiples_and_boxes_the_same_part(
    size: Size, other: Size, encoding: EncodingConfig, flavour: str
) -> None:
    plan = plan_of(size, other, flavour, encoding)
    step, (reference,), (seen,) = encoding.sizes.aspect_bucket_alignment, plan.references, plan.vision
    assert all(side % step == 0 and side >= step for side in plan.target.size)
    assert all(side >= 1 for side in (*reference.size, *seen.size))
    if encoding.match_target_res or differ_by_rounding(reference.size, plan.target.size):
        assert reference.size == plan.target.size
    for ours, theirs, width, own in zip(reference.box, plan.target.box, size * 2, other * 2, strict=True):
        assert abs(ours / own - theirs / width) < 1e-9


@settings(max_examples=60)
@given(
    st.builds(Size, SMALL_SIDES, SMALL_SIDES).filter(lambda size: max(size) <= 3 * min(size)),
    st.floats(0.4, 2.5),
    CROPS,
    st.sampled_from(["comfyui", "diffusers"]),
)
def test_pictures_of_any_size_lie_within_a_tenth_of_a_pixel(
    size: Size, scale: float, crop: dict[str, object], policy: str
) -> None:
    """Measured in the pixels that are trained, with one drawing of the scene at each of both sizes."""
    other = Size(*(max(24, round(side * scale)) for side in size))
    encoding = EncodingConfig(resolution=256, preprocessing=policy, match_target_res=True, sizes=SizeConfig(**crop))
    plan = plan_of(size, other, "edit-v2", encoding)
    off = shift(render(scene(size), plan.target), render(scene(other), plan.references[0]))
    assert max(map(abs, off)) <= 0.1


def scene(size: Size) -> Image.Image:
    """One smooth scene, drawn at any size."""
    x, y = np.meshgrid((np.arange(size.width) + 0.5) / size.width, (np.arange(size.height) + 0.5) / size.height)
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(8 * y - 3 * x), np.sin(7 * (x + y))], axis=-1)
    return Image.fromarray(((waves + 1) * 127.5).round().astype(np.uint8))


def shift(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(right, down) offset in pixels of `other` from `one`, both [3, H, W]: a least-squares fit on the slopes."""
    across, down = (one[:, 1:-1, 2:] - one[:, 1:-1, :-2]) / 2, (one[:, 2:, 1:-1] - one[:, :-2, 1:-1]) / 2
    slopes = -torch.stack([across.flatten(), down.flatten()], dim=1)
    difference = (other - one)[:, 1:-1, 1:-1].flatten()
    found = torch.linalg.solve(slopes.T @ slopes, slopes.T @ difference)
    return float(found[0]), float(found[1])
