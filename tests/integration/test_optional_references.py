"""References that are optional per pair or left out for a data set: edits and text-to-image in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.batches import BatchPlan
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.conditioning.mix import MixPart, mix_encoded
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import (
    BatchingConfig,
    DatasetConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    PairCheckConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.data.pair_check import check_pairs
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError
from trainer_core.pictures.check_report import check_sheet
from trainer_core.pictures.contact_sheet import contact_sheet, report
from trainer_core.pictures.rows import pair_thumbnails
from trainer_core.planning.preparation import without_references
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training.edit_weight import edit_weight_preview


@pytest.fixture
def folders(tmp_path: Path) -> DatasetConfig:
    """Five pairs with two references: 001 lacks the first, 002 the second, 003 both."""
    config = make_pairs(tmp_path / "pairs", 5, num_references=2)
    for number, keys in ((0, ("001", "003")), (1, ("002", "003"))):
        for key in keys:
            (Path(config.reference_dirs[number]) / f"{key}.png").unlink()
    return dataclasses.replace(config, references_optional=True)


def test_those_that_are_there_keep_their_order(folders: DatasetConfig) -> None:
    dataset = pair_folders(folders)
    names = [[path.parent.name for path in pair.references] for pair in dataset.pairs]
    both = ["reference_1", "reference_2"]
    assert names == [both, ["reference_2"], ["reference_1"], [], both]
    assert all(len(pair.sizes) == len(pair.digests) == 1 + len(pair.references) for pair in dataset.pairs)
    assert any(
        note.startswith("Targets without a reference in ") and ": 2 (001, 003)" in note for note in dataset.notes
    )
    assert report(dataset).startswith("5 pairs with 0 to 2 references each.")
    assert contact_sheet(dataset).width > 0
    check = PairCheckConfig()
    assert check_sheet(dataset, check_pairs(dataset, check), check).width > 0


def test_the_sheet_and_the_report_show_them_under_their_folder(folders: DatasetConfig, tmp_path: Path) -> None:
    """Pair 001 has only the second reference, which is smaller than all others."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "pairs" / "reference_2" / "001.png")
    dataset = pair_folders(folders)
    assert [dataset.references_by_folder(pair) for pair in dataset.pairs] == [
        *((0, 1), (None, 0), (0, None), (None, None), (0, 1))
    ]
    first, second, _ = pair_thumbnails(dataset, dataset.pairs[1])
    assert first is None and second is not None and second.getpixel((9, 9)) == (255, 0, 0)
    lines = report(dataset).splitlines()
    assert [line for line in lines if line.startswith("References ")] == [
        "References 1: 96 x 96, all 1:1.",
        "References 2: 48 x 48 to 96 x 96, all 1:1.",
    ]


def test_without_the_setting_they_are_problems(folders: DatasetConfig) -> None:
    with pytest.raises(DatasetError, match="4 problems"):
        pair_folders(dataclasses.replace(folders, references_optional=False))


def test_a_mask_is_not_optional(folders: DatasetConfig, tmp_path: Path) -> None:
    (tmp_path / "mask").mkdir()
    with pytest.raises(DatasetError, match="1 problem") as caught:
        pair_folders(dataclasses.replace(folders, mask_dir=str(tmp_path / "mask")))
    assert "no target has a mask here" in str(caught.value)


@pytest.mark.parametrize("flavour", ["edit-v2", "edit-v3"])
def test_they_are_trained_and_validated(
    folders: DatasetConfig, base_of: Callable[[str], ModelConfig], tmp_path: Path, flavour: str
) -> None:
    model, cache = base_of(flavour), tmp_path / "cache"
    everything = encode_dataset(pair_folders(folders), BaseModel(model), small_encoding(num_eval_images=-1), cache)
    encoded = encode_dataset(pair_folders(folders), BaseModel(model), small_encoding(num_eval_images=0), cache)
    lengths = [len(encoded.load(entry).prompt_embeds) for entry in encoded.pairs]
    assert [len(entry.references) for entry in encoded.pairs] == [2, 1, 1, 0, 2]
    assert lengths[3] < min(lengths[1], lengths[2]) < lengths[0]
    assert "Pairs without a reference, trained as text-to-image: 1." in encoding_report(encoded)
    draws = BatchPlan(encoded, BatchingConfig(train_batch_size=4), 0)[0]
    assert len({len(encoded.pairs[draw.pair].references) for draw in draws}) > 1, "they share a micro-batch"
    result = train_lora(
        TrainConfig(
            run_dir=str(tmp_path / "run"),
            encoded=str(encoded.manifest),
            validation_encoded=str(everything.manifest),
            model=model,
            max_train_steps=3,
            lora=LoraConfig(lora_rank=2),
            batching=BatchingConfig(train_batch_size=4, gradient_accumulation_steps=1),
            validation=ValidationConfig(validation_num_inference_steps=1, num_validation_images=5),
        )
    )
    assert result.lora_file is not None and result.samples is not None and result.samples.grid_file.is_file()


def test_edit_v1_without_any_reference(model: ModelConfig, tmp_path: Path) -> None:
    """Targets without any reference are encoded as text-to-image."""
    config = make_pairs(tmp_path / "pairs", 2)
    for path in Path(config.reference_dirs[0]).iterdir():
        path.unlink()
    dataset = pair_folders(dataclasses.replace(config, references_optional=True))
    encoded = encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=1), tmp_path / "cache")
    (entry,) = encoded.validation_pairs
    assert len(encoded.load_pictures(entry)) == 1 and entry.reference_shapes == ()
    assert encoded.load(entry).reference_latents == ()


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
@pytest.mark.parametrize("flavour", ["edit-v1", "edit-v2"])
def test_a_data_set_without_reference_folders(
    base_of: Callable[[str], ModelConfig], tmp_path: Path, flavour: str, preprocessing: str
) -> None:
    """It has masks and is mixed with edits. Its prompts are those of targets that lack an optional reference."""
    edits = make_pairs(tmp_path / "edits", 2)
    lacking = dataclasses.replace(make_pairs(tmp_path / "plain", 3), mask_dir=str(tmp_path / "masks"))
    (tmp_path / "masks").mkdir()
    for number in range(3):
        Image.new("L", (96, 96), 255).save(tmp_path / "masks" / f"00{number}.png")
    for path in Path(lacking.reference_dirs[0]).iterdir():
        path.unlink()
    alone = dataclasses.replace(lacking, reference_dirs=(), conditioning_type=())
    model, cache = base_of(flavour), tmp_path / "cache"
    encoding = small_encoding(preprocessing=preprocessing, num_eval_images=1)

    def encoded_of(config: DatasetConfig) -> EncodedDataset:
        return encode_dataset(pair_folders(config), BaseModel(model), encoding, cache)

    plain = encoded_of(alone)
    assert plain.pairs == encoded_of(dataclasses.replace(lacking, references_optional=True)).pairs
    assert all(entry.mask and not entry.references for entry in plain.pairs)
    dataset = pair_folders(alone)
    assert report(dataset).startswith("3 pairs without references, which are trained as text-to-image.")
    assert (
        contact_sheet(dataset).width > 0 and [len(pair_thumbnails(dataset, each)) for each in dataset.pairs] == [1] * 3
    )
    assert check_sheet(dataset, check_pairs(dataset, PairCheckConfig()), PairCheckConfig()).width > 0
    assert edit_weight_preview(plain, NoiseConfig(edit_weight=0.5)).width > 0
    assert "no edits" in without_references(plain)
    mix = mix_encoded([MixPart(encoded=encoded_of(edits)), MixPart(encoded=plain, is_regularisation=True)], cache)
    assert not without_references(mix) and "trained as text-to-image: 2." in encoding_report(mix)
    for number, encoded in enumerate((mix, plain)):
        config = TrainConfig(
            run_dir=str(tmp_path / f"run{number}"),
            encoded=str(encoded.manifest),
            model=model,
            max_train_steps=1,
            lora=LoraConfig(lora_rank=2),
            batching=BatchingConfig(train_batch_size=3, gradient_accumulation_steps=1),
            noise=NoiseConfig(edit_weight=0.5),
            validation=ValidationConfig(validation_num_inference_steps=1, num_validation_images=1),
        )
        result = train_lora(config)
        assert result.lora_file is not None and result.samples is not None and result.samples.grid_file.is_file()
