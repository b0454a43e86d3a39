"""Sizes and crops in encoding, and pairs that are too small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.batches import BatchPlan
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import load_encoded
from trainer_core.conditioning.pictures import plan_pair
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import BatchingConfig, LoraConfig, ModelConfig, SizeConfig, TrainConfig
from trainer_core.data import area
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.errors import DatasetError
from trainer_core.geometry import Size
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.run import train_lora


@pytest.fixture
def dataset(tmp_path: Path) -> EditDataset:
    """Four pairs in two sizes whose sides are not multiples of 16."""
    return pair_folders(make_pairs(tmp_path / "pairs", 4, ((131, 77), (50, 61))))


def test_crops_are_encoded_once_and_found_again(dataset: EditDataset, model: ModelConfig, tmp_path: Path) -> None:
    sizes = SizeConfig(crop=True, crop_style="random", aspect_bucket_alignment=16, resolution_type="pixel")
    encoding = small_encoding(resolution=80, num_eval_images=0, sizes=sizes)
    encoded = encode_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")
    assert {entry.shapes for entry in encoded.pairs} == {((16, 10, 10), (16, 10, 10))}
    assert (
        encode_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")
        == encoded
        == load_encoded(encoded.manifest)
    )
    assert "80 x 80: 4" in encoding_report(encoded) and "single" not in encoding_report(encoded)


def test_small_targets_are_all_listed_or_left_out(dataset: EditDataset, model: ModelConfig, tmp_path: Path) -> None:
    def encode(**sizes: object):
        encoding = small_encoding(num_eval_images=1, sizes=SizeConfig(resolution_type="pixel", **sizes))
        return encode_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")

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
    assert "Left out because smaller than minimum_image_size: 2 (001, 003)." in report
    with pytest.raises(DatasetError, match="All 4 targets are smaller"):
        encode(minimum_image_size=90.0, leave_out_small=True)


def test_pairs_of_different_sizes_share_a_batch(model: ModelConfig, tmp_path: Path) -> None:
    """Three sizes, and fewer pairs than a batch has: it takes some of them again."""
    shapes = ((96, 96), (192, 96), (96, 192))
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 3, shapes))
    encoded = encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=0), tmp_path / "cache")
    batching = BatchingConfig(train_batch_size=4, gradient_accumulation_steps=4)
    draws = [draw.pair for draw in BatchPlan(encoded, batching, 0)[0]]
    assert len(draws) == 4 and set(draws) == {0, 1, 2}
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=1,
        lora=LoraConfig(lora_rank=2),
        batching=batching,
    )
    assert train_lora(config).lora_file is not None


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
@pytest.mark.parametrize("flavour", ["edit-v1", "edit-v2"])
def test_no_picture_is_resized_twice(
    base_of: Callable[[str], ModelConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preprocessing: str,
    flavour: str,
) -> None:
    """The target, the reference and the reference for Qwen2.5-VL are each resized once, from the file's own pixels."""
    original = (131, 97)
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 1, (original,)))
    seen: list[tuple[int, int]] = []
    resize, by_area = Image.Image.resize, area.interpolate

    def by_pillow(picture: Image.Image, *arguments: object, **named: object) -> Image.Image:
        seen.append(picture.size)
        return resize(picture, *arguments, **named)

    def by_torch(pixels: torch.Tensor, **named: object) -> torch.Tensor:
        seen.append((pixels.shape[-1], pixels.shape[-2]))
        return by_area(pixels, **named)

    monkeypatch.setattr(Image.Image, "resize", by_pillow)
    monkeypatch.setattr(area, "interpolate", by_torch)
    encoding = small_encoding(num_eval_images=0, preprocessing=preprocessing)
    encode_dataset(dataset, BaseModel(base_of(flavour)), encoding, tmp_path / "cache")
    box = plan_pair((Size(*original),) * 2, FLAVOURS[base_of(flavour).flavour], encoding).target.box
    of_file = [original, original, original] if preprocessing == "diffusers" else [original, box.size, box.size]
    assert sorted(seen) == sorted(of_file) and box.size != original  # threads resize them in any order
