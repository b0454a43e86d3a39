"""conditioning_type: which part of a reference is encoded, and which references it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.narrow import make_pairs
from tests.support.pair_files import config, pair, picture, problems_of
from trainer_core.conditioning.pictures import plan_pair, render
from trainer_core.config import ConditioningType, DatasetConfig, EncodingConfig, PairCheckConfig, SizeConfig, from_json
from trainer_core.data.area import resize_area
from trainer_core.data.masks import PairMask, loss_weights
from trainer_core.data.pair_check import measure_pair
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError
from trainer_core.geometry import Box, Size, same_shape
from trainer_core.qwen_image.flavours import FLAVOURS

SIZES = [Size(1777, 1003), Size(641, 480), Size(333, 1000), Size(997, 991)]
EDIT = FLAVOURS["edit-v2"]


def encoding(match: bool = True, preprocessing: str = "diffusers", **sizes: object) -> EncodingConfig:
    return EncodingConfig(
        resolution=256, match_target_res=match, preprocessing=preprocessing, sizes=SizeConfig(**sizes)
    )


def waves(size: Size) -> Image.Image:
    """The same smooth RGB picture, drawn at any size."""
    x, y = np.meshgrid((np.arange(size.width) + 0.5) / size.width, (np.arange(size.height) + 0.5) / size.height)
    bands = np.stack([np.sin(17 * x), np.cos(15 * y), np.sin(13 * (x + y))], axis=-1)
    return Image.fromarray(((bands + 1) * 127.5).round().astype(np.uint8))


def shift(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(right, down) offset in pixels of `other` from `one`, both CHW: a least-squares fit on the slopes of `one`."""
    inner = one[:, 1:-1, 1:-1]
    across, down = (one[:, 1:-1, 2:] - one[:, 1:-1, :-2]) / 2, (one[:, 2:, 1:-1] - one[:, :-2, 1:-1]) / 2
    slopes = torch.stack([-across.flatten(), -down.flatten()], dim=1)
    found = torch.linalg.lstsq(slopes, (other[:, 1:-1, 1:-1] - inner).flatten()[:, None]).solution
    return float(found[0]), float(found[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", ["center", "random", "corner"])
@pytest.mark.parametrize("crop", [False, True])
def test_strict_is_the_target_s_rectangle_to_the_pixel(size: Size, style: str, crop: bool) -> None:
    settings = encoding(crop=crop, crop_style=style)
    plan = plan_pair((size, size), EDIT, settings, "a/b", conditioning_types=["reference_strict"])
    assert plan.references[0] == plan.target
    scene = waves(size)
    assert torch.equal(render(scene, plan.references[0]), render(scene, plan.target))


SCALED = [
    (Size(640, 480), Size(320, 240)),
    (Size(641, 481), Size(320, 240)),
    (Size(100, 99), Size(150, 148)),
    (Size(150, 148), Size(100, 99)),
    (Size(1501, 1001), Size(1000, 667)),
    (Size(333, 1000), Size(533, 1600)),
]


@pytest.mark.parametrize(("size", "other"), SCALED)
@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
@pytest.mark.parametrize(
    "crop",
    [
        {},
        {"crop": True, "crop_style": "center"},
        {"crop": True, "crop_style": "random"},
        {"crop": True, "crop_style": "corner", "crop_aspect": "preserve"},
    ],
)
def test_strict_of_another_size_lies_on_its_target(
    size: Size, other: Size, preprocessing: str, crop: dict[str, object]
) -> None:
    """At most 0.1 pixels off. A box of whole pixels would be up to 0.9 off. One pixel of the reference is noticed."""
    settings = dataclasses.replace(encoding(preprocessing=preprocessing, **crop), resolution=512)
    plan = plan_pair((size, other), EDIT, settings, "x", conditioning_types=["reference_strict"])
    (reference,) = plan.references
    for side, wanted, of, own in zip(reference.box, plan.target.box, size * 2, other * 2, strict=True):
        assert side == pytest.approx(wanted * own / of)
    target = render(waves(size), plan.target)
    assert max(map(abs, shift(target, render(waves(other), reference)))) <= 0.1
    off = dataclasses.replace(reference, box=reference.box._replace(left=reference.box.left + 1))
    assert max(map(abs, shift(target, render(waves(other), off)))) > 0.15


@pytest.mark.parametrize("size", [Size(30, 20), Size(61, 33), Size(96, 96)])
def test_a_mask_of_another_size_is_cut_where_its_target_is(size: Size, tmp_path: Path) -> None:
    """A smooth mask of any size gives the loss weights of the target's own part of the scene."""
    target = Size(4 * size.width, 4 * size.height)
    plan = plan_pair((target,), EDIT, encoding(crop=True, crop_style="random"), "x")
    mask, path = waves(size).getchannel(2), tmp_path / "mask.png"
    mask.save(path)
    weights = loss_weights(
        PairMask(path, hashlib.sha256(path.read_bytes()).hexdigest(), size), plan.mask_box(target, size), Size(32, 32)
    )
    whole = render(waves(target), dataclasses.replace(plan.target, size=Size(32, 32), resample="area"))[2:]
    assert max(map(abs, shift(whole / whole.mean(), weights))) <= 0.1


@pytest.mark.parametrize("size", [Size(64, 48), Size(96, 32)])
def test_covered_pixels_equal_comfyui_s_area_where_boxes_are_whole(size: Size) -> None:
    """Exactly where a new pixel covers whole pixels, within 2 of 255 steps elsewhere, as ComfyUI counts parts fully."""
    picture = waves(Size(192, 96))
    nearly = Box(0.0, 0.0, 192.0, 96.0)
    assert not nearly.is_whole
    by_parts, as_comfyui = resize_area(picture, nearly, size), resize_area(picture, Box(0, 0, 192, 96), size)
    assert (by_parts - as_comfyui).abs().max() < 1e-6
    odd = Size(size.width - 3, size.height - 5)
    difference = resize_area(picture, nearly, odd) - resize_area(picture, Box(0, 0, 192, 96), odd)
    assert difference.abs().mean() < 2 / 255


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("reference", [Size(1777, 1003), Size(640, 640), Size(400, 1201)])
def test_loose_is_seen_whole_at_its_own_aspect(reference: Size, match: bool, preprocessing: str) -> None:
    settings = encoding(match, preprocessing, crop=True, crop_style="corner")
    plan = plan_pair((Size(1777, 1003), reference), EDIT, settings, "x", conditioning_types=["reference_loose"])
    (seen,), (vision,) = plan.references, plan.vision
    assert seen.box == vision.box == (0, 0, *reference)
    area = 256 * 256 if match else 1024 * 1024
    assert abs(seen.size.width * seen.size.height / area - 1) < 0.2
    step = 8 if preprocessing == "comfyui" else 32
    aspect = reference.width / reference.height
    assert (seen.size.width - step) / seen.size.height < aspect < (seen.size.width + step) / seen.size.height


def test_auto_goes_by_the_shape_and_each_folder_has_its_own() -> None:
    sizes = (Size(641, 480), Size(320, 240), Size(640, 480), Size(500, 500))
    kinds: list[ConditioningType] = ["auto", "reference_loose", "auto"]
    plan = plan_pair(sizes, EDIT, encoding(match=False, crop=True), "x", conditioning_types=kinds)
    near, loose, other = (view.box for view in plan.references)
    assert near.height == 240 and near.width == pytest.approx(480 * 320 / 641)  # the target's square
    assert loose == (0, 0, 640, 480) and other == (0, 0, 500, 500)
    assert plan_pair(sizes[:2], EDIT, encoding(crop=True)).references[0].box == near


@pytest.mark.parametrize(
    ("other", "fits"),
    [
        (Size(888, 501), True),
        (Size(889, 502), True),
        (Size(3554, 2006), True),
        (Size(1777, 1003), True),
        (Size(890, 500), False),
        (Size(1003, 1777), False),
        (Size(1777, 1010), False),
    ],
)
def test_shapes_are_equal_but_for_rounding(other: Size, fits: bool) -> None:
    assert same_shape(Size(1777, 1003), other) is fits
    assert same_shape(other, Size(1777, 1003)) is fits


def test_strict_references_of_another_shape_are_all_listed(tmp_path) -> None:
    for number in range(3):
        pair(tmp_path, f"{number}", seed=9 * number, references=("before", "style"))  # target 16 x 12, others 20 x 10
        picture(tmp_path / "before" / f"{number}.png", size=(32, 24 if number else 20), seed=number + 40)
    settings = config(tmp_path, "before", "style")
    assert len(pair_folders(settings).pairs) == 3
    mixed = dataclasses.replace(settings, conditioning_type=("reference_strict", "reference_loose"))
    (problem,) = problems_of(mixed)
    assert "before/0.png: the reference is 32 x 20 and its target 16 x 12" in problem and "reference_loose" in problem
    assert len(problems_of(dataclasses.replace(settings, conditioning_type=("reference_strict",)))) == 4
    picture(tmp_path / "before" / "0.png", size=(32, 24))
    paired = pair_folders(mixed)
    assert paired.pairs[0].conditioning_types == ("reference_strict", "reference_loose")
    assert paired.fingerprint != pair_folders(settings).fingerprint


def test_types_stay_with_their_folders_where_references_are_missing(tmp_path) -> None:
    for number in range(2):
        pair(tmp_path, f"{number}", seed=9 * number, references=("before", "style"))
    (tmp_path / "before" / "1.png").unlink()
    kinds: tuple[ConditioningType, ...] = ("auto", "reference_loose")
    settings = dataclasses.replace(
        config(tmp_path, "before", "style"), conditioning_type=kinds, references_optional=True
    )
    assert [each.conditioning_types for each in pair_folders(settings).pairs] == [kinds, kinds[1:]]


def test_one_word_or_a_list_of_one_for_each_folder() -> None:
    folders = {"target_dir": "a", "reference_dirs": ["b", "c"]}
    assert from_json(DatasetConfig, folders).conditioning_type == ("auto",)
    one = from_json(DatasetConfig, {**folders, "conditioning_type": "reference_strict"})
    assert one.conditioning_type == ("reference_strict",)
    with pytest.raises(ConfigError, match=r"reference_strikt.*Did you mean 'reference_strict'"):
        from_json(DatasetConfig, {**folders, "conditioning_type": ["reference_strikt"]})
    with pytest.raises(ConfigError, match="one for all reference folders, or one for each"):
        from_json(DatasetConfig, {**folders, "conditioning_type": ["auto"] * 3})


def test_the_checker_does_not_hold_a_loose_reference_against_its_target(tmp_path) -> None:
    folders = make_pairs(tmp_path, 2, ((80, 64),))
    picture(tmp_path / "reference_1" / "000.png", size=(64, 80), seed=7)
    auto = measure_pair(pair_folders(folders).pairs[0], PairCheckConfig())
    assert {finding.kind for finding in auto.findings} >= {"framing"}
    loose = dataclasses.replace(folders, conditioning_type=("reference_loose",))
    measured = measure_pair(pair_folders(loose).pairs[0], PairCheckConfig())
    assert measured.alignments == (None,) and measured.findings == ()
