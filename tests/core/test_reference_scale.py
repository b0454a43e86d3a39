"""The scale of references: their pixels per pixel of the target. And what Qwen2.5-VL sees of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.narrow import make_pairs, picture
from trainer_core import sample
from trainer_core.conditioning.pictures import plan_pair
from trainer_core.conditioning.report import scale_report
from trainer_core.config import EncodingConfig, ModelConfig, SizeConfig
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.geometry import Size, area_size, aspect_area_size, bucket_size
from trainer_core.pictures.contact_sheet import report
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.sample import SampleRequest

PHOTOS = [Size(4000, 3000), Size(1920, 1080), Size(2048, 2048), Size(6000, 4000), Size(3001, 4501), Size(1777, 1003)]
POLICIES = ["comfyui", "diffusers"]
pytestmark = pytest.mark.usefixtures("true_areas")


@pytest.mark.parametrize("size", PHOTOS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("step", [16, 32])
def test_the_same_framing_has_the_same_size(size: Size, policy: str, flavour: str, step: int) -> None:
    """At the size of the base model, whether or not match_target_res is on, and whatever the file's own size."""
    half = Size(size.width // 2, size.height // 2)
    for crop in (False, True):
        encoding = EncodingConfig(preprocessing=policy, sizes=SizeConfig(aspect_bucket_alignment=step, crop=crop))
        for kinds in (("auto", "auto"), ("reference_strict", "reference_strict")):
            plan = plan_pair((size, size, half), FLAVOURS[flavour], encoding, conditioning_types=kinds)
            assert {view.size for view in plan.references} == {plan.target.size}


@pytest.mark.parametrize("size", PHOTOS)
@pytest.mark.parametrize("policy", POLICIES)
def test_references_keep_a_megapixel_where_the_target_is_smaller_or_framed_otherwise(size: Size, policy: str) -> None:
    smaller = EncodingConfig(resolution=512, preprocessing=policy)
    for encoding, reference, kind in (
        (smaller, size, "auto"),
        (dataclasses.replace(smaller, resolution=1024), size, "reference_loose"),
        (dataclasses.replace(smaller, resolution=1024), Size(size.height, 2 * size.width), "auto"),
    ):
        (view,) = plan_pair((size, reference), FLAVOURS["edit-v2"], encoding, conditioning_types=(kind,)).references
        shown = view.box.size
        own = area_size(shown, 1024**2, 8) if policy == "comfyui" else aspect_area_size(shown, 1024**2)
        assert view.size == own


@pytest.mark.parametrize("size", PHOTOS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("resolution", [256, 512, 1024, 1536])
@pytest.mark.parametrize("kind", ["auto", "reference_strict", "reference_loose"])
def test_the_text_encoder_sees_the_size_of_the_graph_whatever_the_latents_have(
    size: Size, policy: str, flavour: str, resolution: int, kind: str
) -> None:
    """ComfyUI's node and diffusers' pipeline scale by the reference's own shape alone: to 1024² or 384² pixels."""
    area = 1024**2 if flavour == "edit-v1" else 384**2
    for match in (False, True):
        encoding = EncodingConfig(resolution=resolution, preprocessing=policy, match_target_res=match)
        plan = plan_pair((size, size), FLAVOURS[flavour], encoding, conditioning_types=(kind,))
        (seen,) = plan.vision
        assert seen.size == (area_size if policy == "comfyui" else aspect_area_size)(seen.box.size, area)
        assert seen.box == plan.references[0].box
        if match and kind != "reference_loose":
            assert plan.references[0].size == plan.target.size


@pytest.mark.parametrize("size", PHOTOS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_sample_has_the_scale_of_training(size: Size, policy: str, flavour: str) -> None:
    model = ModelConfig(base="x", flavour=flavour)
    request = SampleRequest(model=model, references=(picture(0, size),), prompt="x", preprocessing=policy)
    result = bucket_size(size, 1024)
    reference, _ = sample._views(request.references[0], request, result)
    assert reference.size == result
    small = dataclasses.replace(request, match_target_res=True)
    latents, still_seen = sample._views(request.references[0], small, Size(512, 512))
    assert latents.size == (512, 512)
    assert abs(still_seen.size.width * still_seen.size.height / FLAVOURS[flavour].vision_area - 1) < 0.1
    other, _ = sample._views(request.references[0], request, Size(512, 1024))
    assert other.box == (0, 0, *size) and other.size != (512, 1024)


def test_the_report_says_the_scale_of_each_size(tmp_path: Path) -> None:
    dataset = pair_folders(make_pairs(tmp_path, 5, ((192, 108), (96, 96))))
    lines = scale_report(dataset, "edit-v2", EncodingConfig(resolution=512)).splitlines()
    assert lines[1:] == [
        "  target 672 x 384, reference 1352 x 776: 2.012 and 2.021 (3)",
        "  target 512 x 512, reference 1024 x 1024: 2.000 and 2.000 (2)",
    ]
    lines = scale_report(dataset, "edit-v2", EncodingConfig()).splitlines()
    assert [line.split(": ")[1] for line in lines[1:]] == ["1.000 and 1.000 (3)", "1.000 and 1.000 (2)"]


def test_the_report_says_which_references_are_cropped_or_whole(tmp_path: Path) -> None:
    """A scale of 1 after a crop to another aspect ratio is not the scale of the scene."""
    settings = make_pairs(tmp_path, 4, ((200, 200),))
    for number, size in enumerate([(300, 200), (201, 200), (203, 200)], 1):  # half a percent counts as alike
        picture(number, size).save(tmp_path / "reference_1" / f"{number:03}.png")
    dataset = pair_folders(settings)

    def lines(of: EditDataset, **encoding: bool) -> list[str]:
        return scale_report(of, "edit-v2", EncodingConfig(resolution=512, **encoding)).splitlines()[1:]

    assert lines(dataset, match_target_res=True) == [
        "  target 512 x 512, reference 512 x 512: 1.000 and 1.000 (2)",
        "  target 512 x 512, reference 512 x 512, cropped to the target's aspect ratio: 1.000 and 1.000 (2)",
    ]
    whole = lines(dataset)
    assert [line.split(", ")[-1].partition(":")[0] for line in whole] == ["reference 1024 x 1024", "whole", "whole"]
    loose = pair_folders(dataclasses.replace(settings, conditioning_type=("reference_loose",)))
    assert all(", whole: " in line for line in lines(loose, match_target_res=True))
    assert "Aspect ratios of reference and target differ in 2 pairs (001, 003)." in report(dataset)
    assert "Aspect ratios" not in report(loose)
