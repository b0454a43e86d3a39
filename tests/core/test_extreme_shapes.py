"""Pictures whose shape can't be trained are named before anything is encoded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.pair_files import config, pair, picture, problems_of
from trainer_core.conditioning.encode import check_references
from trainer_core.config import DatasetConfig, EncodingConfig, ModelConfig, PairCheckConfig, SizeConfig
from trainer_core.data.pair_check import measure_pair
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError

MODEL = ModelConfig(base="x")


def folders(root: Path, target: tuple[int, int], reference: tuple[int, int]) -> DatasetConfig:
    """Two pairs; the pictures of the second have these sizes."""
    for key in ("good", "odd"):
        pair(root, key)
    picture(root / "after" / "odd.png", size=target)
    picture(root / "before" / "odd.png", size=reference, seed=4)
    return config(root)


@pytest.mark.parametrize("kind", ["auto", "reference_strict", "reference_loose"])
def test_narrow_pictures_are_named(tmp_path: Path, kind: str) -> None:
    settings = dataclasses.replace(folders(tmp_path, (17, 4000), (4000, 17)), conditioning_type=(kind,))
    problems = [each for each in problems_of(settings) if "at most 32 times the short one" in each]
    assert [each.split("/")[-1].split(".")[0] for each in problems] == ["odd", "odd"]
    assert "after/odd.png: the picture is 17 x 4000" in problems[0] and "before/odd.png" in problems[1]
    assert "4000 x 17" in problems[1]


def test_a_banner_is_no_problem(tmp_path: Path) -> None:
    assert len(pair_folders(folders(tmp_path, (640, 20), (640, 20))).pairs) == 2


@pytest.mark.parametrize(
    ("target", "reference", "share"),
    [((160, 90), (90, 160), None), ((300, 100), (100, 300), "10.9%"), ((400, 100), (99, 101), "24.5%")],
)
def test_references_of_which_little_would_be_left_are_named(
    tmp_path: Path, target: tuple[int, int], reference: tuple[int, int], share: str | None
) -> None:
    settings = folders(tmp_path, target, reference)
    dataset, matched = pair_folders(settings), EncodingConfig(match_target_res=True)
    if share is None:
        check_references(dataset, MODEL, matched)
        return
    with pytest.raises(
        DatasetError, match="References with a very different aspect ratio from their targets: 1"
    ) as caught:
        check_references(dataset, MODEL, matched)
    (problem,) = caught.value.problems
    assert "before/odd.png" in problem and f"cropped to {share} of its area" in problem
    check_references(dataset, MODEL, EncodingConfig())
    loose = pair_folders(dataclasses.replace(settings, conditioning_type=("reference_loose",)))
    check_references(loose, MODEL, matched)


def test_the_target_s_crop_decides_what_is_left(tmp_path: Path) -> None:
    dataset = pair_folders(folders(tmp_path, (300, 100), (100, 110)))
    check_references(dataset, MODEL, EncodingConfig(match_target_res=True, sizes=SizeConfig(crop=True)))
    with pytest.raises(DatasetError):
        check_references(
            pair_folders(folders(tmp_path, (500, 100), (100, 110))), MODEL, EncodingConfig(match_target_res=True)
        )


def test_the_check_reports_milder_cases(tmp_path: Path) -> None:
    pair_of = pair_folders(folders(tmp_path, (300, 100), (100, 160))).pairs[1]
    texts = [each.text for each in measure_pair(pair_of, PairCheckConfig()).findings if each.kind == "framing"]
    assert any("uses the reference whole, or with match_target_res 21% of its area" in text for text in texts)
    assert any("target is 300 x 100, 3.0 times as long as it is narrow" in text for text in texts)
