"""A trial shows what validation showed. tests/server/test_try_lora.py compares pixel for pixel at alpha = rank / 2."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from tests.support.narrow import picture
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import ModelConfig
from trainer_core.errors import ConfigError, DatasetError, ModelFileError, RunFolderError
from trainer_core.pictures.sample_pictures import read_sample_index
from trainer_core.run import TrainResult
from trainer_core.try_lora import Trial, Tried, TriedRun, tried_run, try_lora


@pytest.fixture
def run(unbroken: TrainResult, encoded: EncodedDataset) -> TriedRun:
    return tried_run(unbroken.run_dir, encoded.cache_dir)


def pictures(folder: Path) -> dict[str, bytes]:
    (row,) = read_sample_index(folder)
    return {column: Image.open(folder / name).tobytes() for column, name in row["pictures"].items()}


def tried(run: TriedRun, model: ModelConfig, place: Path, **changes: object) -> Tried:
    return try_lora(Trial(run=run, model=model, **changes), place)  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "step"), [(0, 12), (12, 12), (5, 5)])
def test_a_trial_at_strength_1_equals_the_validation_picture(
    asked: int, step: int, run: TriedRun, model: ModelConfig, unbroken: TrainResult, tmp_path: Path
) -> None:
    found = tried(run, model, tmp_path / "try", step=asked)
    assert found.step == step
    shown, wanted = pictures(found.folder), pictures(unbroken.run_dir / "samples" / f"step-{step:06d}")
    assert shown.keys() == wanted.keys()
    for column, pixels in shown.items():  # alpha / rank is 1.5 here, and the file holds B times that, rounded
        levels = [abs(one - other) for one, other in zip(pixels, wanted[column], strict=True)]
        assert max(levels) <= (column == "lora"), column
        assert sum(levels) <= 3
    assert found.report is not None
    if asked == 0:
        assert unbroken.samples is not None
        assert found.report.psnr_lora == pytest.approx(unbroken.samples.psnr_lora, abs=1e-4)


def test_the_strength_counts_and_0_is_the_base_model(run: TriedRun, model: ModelConfig, tmp_path: Path) -> None:
    shown = {
        strength: pictures(tried(run, model, tmp_path / f"{strength}", strength=strength).folder)
        for strength in (0.0, 0.5)
    }
    assert shown[0.0]["lora"] == shown[0.0]["base"] == shown[0.5]["base"] != shown[0.5]["lora"]


def test_other_held_out_pairs_and_other_pictures_can_be_tried(
    run: TriedRun, model: ModelConfig, tmp_path: Path
) -> None:
    """The run draws one of its two held-out pairs."""
    second = pictures(tried(run, model, tmp_path / "second", pair=2).folder)
    first = pictures(tried(run, model, tmp_path / "first", pair=1).folder)
    assert second["target"] != first["target"]
    other = tried(run, model, tmp_path / "other", picture=picture(3, (128, 64)))
    assert other.report is None
    assert set(pictures(other.folder)) == {"reference-1", "lora"}
    asked = pictures(tried(run, model, tmp_path / "asked", instruction="other words").folder)
    assert asked["reference-1"] == first["reference-1"]
    assert len(asked["lora"]) == len(first["lora"])


def test_what_can_not_be_tried_is_said(
    run: TriedRun, model: ModelConfig, unbroken: TrainResult, encoded: EncodedDataset, tmp_path: Path
) -> None:
    for changes, error, words in (
        ({"step": 7}, ConfigError, r"step 7 of the run 'run' is not kept.*\(5, 10, 12\), or 0 for the end"),
        ({"pair": 3}, ConfigError, "pair is 3, but the run 'run' has the held-out pairs 1 to 2"),
    ):
        with pytest.raises(error, match=words):
            tried(run, model, tmp_path / "x", **changes)
    gone = dataclasses.replace(model, base=str(tmp_path / "gone"))
    with pytest.raises(ModelFileError, match="The model that the run 'run' was trained with can't be used now"):
        tried(run, gone, tmp_path / "x")
    with pytest.raises(DatasetError, match=r"no longer in the cache\. Encode its data set again"):
        tried_run(unbroken.run_dir, tmp_path)
    with pytest.raises(RunFolderError, match="no such run"):
        tried_run(tmp_path, encoded.cache_dir)
    assert not (tmp_path / "x").exists()
