"""Sizes and crops through the encoders, and pairs that are too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import load_encoded
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import ModelConfig, SizeConfig
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.errors import DatasetError


@pytest.fixture
def dataset(tmp_path: Path) -> EditDataset:
    """Four pairs of two sizes that don't divide."""
    return pair_folders(make_pairs(tmp_path / "pairs", 4, ((131, 77), (50, 61))))


def test_crops_are_encoded_once_and_found_again(dataset: EditDataset, model: ModelConfig, tmp_path: Path) -> None:
    sizes = SizeConfig(crop=True, crop_style="random", aspect_bucket_alignment=16, resolution_type="pixel")
    encoding = small_encoding(resolution=80, num_eval_images=0, sizes=sizes)
    encoded = encode_dataset(dataset, model, encoding, tmp_path / "cache")
    assert {entry.shapes for entry in encoded.pairs} == {((16, 10, 10), (16, 10, 10))}
    assert encode_dataset(dataset, model, encoding, tmp_path / "cache") == encoded == load_encoded(encoded.manifest)
    assert "80 x 80: 4" in encoding_report(encoded) and "single" not in encoding_report(encoded)


def test_small_targets_are_all_listed_or_left_out(dataset: EditDataset, model: ModelConfig, tmp_path: Path) -> None:
    def encode(**sizes: object):
        encoding = small_encoding(num_eval_images=1, sizes=SizeConfig(resolution_type="pixel", **sizes))
        return encode_dataset(dataset, model, encoding, tmp_path / "cache")

    with pytest.raises(DatasetError, match=r"2 targets are smaller than minimum_image_size, 60 pixels") as caught:
        encode(minimum_image_size=60.0)
    assert [problem.split("/")[-1] for problem in caught.value.problems] == [
        "001.png: 50 x 61, which is 50",
        "003.png: 50 x 61, which is 50",
    ]
    encoded = encode(minimum_image_size=60.0, leave_out_small=True)
    assert encoded.left_out == ("001", "003") and load_encoded(encoded.manifest) == encoded
    assert {entry.key for entry in (*encoded.pairs, *encoded.validation_pairs)} == {"000", "002"}
    report = encoding_report(encoded)
    assert "Left out, smaller than minimum_image_size: 2 (001, 003)." in report
    assert "Sizes of a single pair: 1" in report
    with pytest.raises(DatasetError, match="All 4 targets are smaller"):
        encode(minimum_image_size=90.0, leave_out_small=True)
