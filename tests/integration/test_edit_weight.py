"""The edit-aware loss weight in encoding, runs and the preview: the pixel differences that it may need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.narrow import make_pairs, read_rows, small_encoding
from trainer_core.conditioning.encode import encode_dataset, encode_planned, plan_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.entry import entry_path
from trainer_core.conditioning.mix import MixPart, mix_encoded
from trainer_core.config import (
    BatchingConfig,
    DatasetConfig,
    JobConfig,
    ModelConfig,
    NoiseConfig,
    TrainConfig,
    ValidationConfig,
    completed_key,
    resume_key,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError, DatasetError, TrainerError
from trainer_core.planning.disk_space import cache_use
from trainer_core.planning.preparation import check_datasets
from trainer_core.planning.start import pairs_to_encode
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training.edit_weight import edit_weight_preview

PIXELS = NoiseConfig(edit_weight=1.0, edit_weight_kind="logarithmic", edit_weight_from="pixels")
EDIT = (16, 32, 48, 64)  # left, top, right, bottom


@pytest.fixture
def folders(tmp_path: Path) -> DatasetConfig:
    """Three pairs with two references. The targets are the first references with an inverted rectangle."""
    config = make_pairs(tmp_path / "pairs", 3, num_references=2)
    for path in sorted(Path(config.target_dir).glob("*.png")):
        with Image.open(Path(config.reference_dirs[0]) / path.name) as opened:
            picture = np.array(opened)
        left, top, right, bottom = EDIT
        picture[top:bottom, left:right] = (picture[top:bottom, left:right].astype(int) + 128) % 256
        Image.fromarray(picture).save(path)
    return config


@pytest.fixture
def encode(base_of: Callable[[str], ModelConfig], tmp_path: Path) -> Callable[..., EncodedDataset]:
    """Encodes for edit-v2 into one cache."""

    def run(folders: DatasetConfig, **changes: object) -> EncodedDataset:
        encoding = small_encoding(**{"encode_pixel_difference": True, **changes})
        return encode_dataset(pair_folders(folders), BaseModel(base_of("edit-v2")), encoding, tmp_path / "cache")

    return run


def config(encoded: EncodedDataset, model: ModelConfig, run: Path, noise: NoiseConfig) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=1,
        noise=noise,
        validation=ValidationConfig(num_validation_images=0),
    )


def test_a_run_follows_every_kind_and_source_and_the_preview_shows_it(
    encode: Callable[..., EncodedDataset],
    folders: DatasetConfig,
    base_of: Callable[[str], ModelConfig],
    tmp_path: Path,
) -> None:
    encoded, model, losses = encode(folders), base_of("edit-v2"), []
    noises = [NoiseConfig()]
    for kind in ("linear", "logarithmic"):
        noises += [NoiseConfig(edit_weight=1.0, edit_weight_kind=kind, edit_weight_from="latents")]
        noises += [NoiseConfig(edit_weight=1.0, edit_weight_kind=kind, edit_weight_from="pixels")]
    for number, noise in enumerate(noises):
        result = train_lora(config(encoded, model, tmp_path / f"{number}", noise))
        losses.append(read_rows(result.run_dir / "metrics.jsonl")[0]["loss"])
        assert edit_weight_preview(encoded, noise, max_pairs=2).width > 160
    assert len(set(losses[:3])) == 3 and losses[4] not in losses[:3]
    assert all(each == pytest.approx(losses[0], rel=0.5) for each in losses)
    with pytest.raises(ConfigError, match="edit_weight must be 0 to 1, got 2"):
        NoiseConfig(edit_weight=2)


def test_differences_are_entries_of_their_own_and_encoded_only_when_asked_for(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig, base_of: Callable[[str], ModelConfig]
) -> None:
    plain = encode(folders, encode_pixel_difference=False)
    assert "difference" not in plain.manifest.read_text()
    encoding = small_encoding(encode_pixel_difference=True)
    planned = plan_dataset(pair_folders(folders), BaseModel(base_of("edit-v2")), encoding, plain.cache_dir)
    assert not planned.missing.latents and not planned.missing.prompts and len(planned.missing.differences) == 3
    assert pairs_to_encode([planned]) == 3
    (use,) = cache_use([planned])
    assert use.size == 3 * (4 * prod(plain.pairs[0].shape[1:]) + 4096)
    encoded = encode_planned(planned)
    assert load_encoded(encoded.manifest) == encoded and encoded.missing() == ()
    assert encoded.manifest != plain.manifest
    assert [dataclasses.replace(each, differences=()) for each in encoded.pairs] == list(plain.pairs)
    difference = encoded.load(encoded.pairs[0]).difference
    assert difference is not None and difference.shape == (1, 12, 12)
    left, top, right, bottom = (side // 8 for side in EDIT)
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert difference[0][inside].min() > 60 and not difference[0][~inside].any()
    assert plain.load(plain.pairs[0]).difference is None


def test_a_lost_difference_is_noticed_and_encoded_again(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig
) -> None:
    encoded = encode(folders)
    entry = encoded.pairs[0]
    entry_path(encoded.cache_dir, "difference", entry.differences[0]).unlink()
    assert encoded.missing() == (entry.key,)
    with pytest.raises(DatasetError, match="has no difference in the cache"):
        encoded.load(entry)
    assert encode(folders).missing() == ()


def test_a_changed_picture_is_named(
    encode: Callable[..., EncodedDataset],
    folders: DatasetConfig,
    base_of: Callable[[str], ModelConfig],
) -> None:
    cache = encode(folders, encode_pixel_difference=False).cache_dir
    dataset, encoding = pair_folders(folders), small_encoding(encode_pixel_difference=True)
    planned = plan_dataset(dataset, BaseModel(base_of("edit-v2")), encoding, cache)
    Image.new("RGB", (96, 96)).save(dataset.pairs[1].references[0])
    with pytest.raises(DatasetError, match="001"):
        encode_planned(planned)


def test_combined_references_compare_the_first_and_random_ones_each(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig
) -> None:
    together = encode(folders)
    assert all(len(each.differences) == 1 for each in (*together.pairs, *together.validation_pairs))
    drawn = encode(folders, conditioning_multidataset_sampling="random")
    assert load_encoded(drawn.manifest) == drawn and drawn.missing() == ()
    for entry in drawn.pairs:
        assert len(entry.differences) == len(entry.references) == 2
        first, second = (drawn.load(entry, 0, number).difference for number in range(2))
        assert first is not None and second is not None
        assert float((first > 1).float().mean()) < 0.2 < 0.8 < float((second > 1).float().mean())
    assert edit_weight_preview(drawn, PIXELS, max_pairs=1).width > 160


def test_references_on_the_fly_need_no_latents_for_it(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig, base_of: Callable[[str], ModelConfig], tmp_path: Path
) -> None:
    encoded = encode(folders, reference_latents="on_the_fly")
    assert all(each.reference_files and each.differences for each in encoded.pairs)
    cached = encode(folders)
    losses = [
        read_rows(train_lora(config(each, base_of("edit-v2"), run, PIXELS)).run_dir / "metrics.jsonl")[0]["loss"]
        for each, run in ((encoded, tmp_path / "fly"), (cached, tmp_path / "cached"))
    ]
    assert losses[0] == losses[1]
    assert edit_weight_preview(encoded, PIXELS).width > 160
    with pytest.raises(ConfigError, match="reference_latents to cached"):
        edit_weight_preview(encoded, NoiseConfig(edit_weight=0.5))


def test_another_shape_and_a_missing_reference_weight_nothing(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig
) -> None:
    first, _ = folders.reference_dirs
    Image.new("RGB", (160, 96)).save(Path(first) / "000.png")
    (Path(first) / "001.png").unlink()
    loose = dataclasses.replace(
        folders, reference_dirs=(first,), references_optional=True, conditioning_type=("reference_loose",)
    )
    encoded = encode(loose, num_eval_images=0)
    shaped, alone, other = encoded.pairs
    difference = encoded.load(shaped).difference
    assert difference is not None and not difference.any()
    assert alone.differences == () and other.differences


def test_training_without_the_differences_is_refused_with_all_that_is_missing(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig, base_of: Callable[[str], ModelConfig], tmp_path: Path
) -> None:
    plain = encode(folders, encode_pixel_difference=False)
    wrong = config(plain, base_of("edit-v2"), tmp_path / "run", PIXELS)
    asks = r"edit_weight_from is pixels, but 2 pairs .*encode_pixel_difference on.*edit_weight_from to latents"
    with pytest.raises(ConfigError, match=asks):
        train_lora(wrong)
    with pytest.raises(ConfigError, match=asks):
        edit_weight_preview(plain, PIXELS, max_pairs=2)
    both = dataclasses.replace(wrong, batching=BatchingConfig(caption_dropout_probability=0.1))
    with pytest.raises(TrainerError, match=r"(?s)encode_empty_caption.*encode_pixel_difference"):
        check_datasets(both, plain, plain)
    for harmless in (dataclasses.replace(PIXELS, edit_weight=0.0), NoiseConfig(edit_weight=1.0)):
        check_datasets(dataclasses.replace(wrong, noise=harmless), plain, plain)


def test_a_mix_needs_them_in_every_part(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig, base_of: Callable[[str], ModelConfig], tmp_path: Path
) -> None:
    parts = [encode(folders), encode(folders, encode_pixel_difference=False)]
    mixed = mix_encoded([MixPart(encoded=each) for each in parts], parts[0].cache_dir)
    wrong = config(mixed, base_of("edit-v2"), tmp_path / "run", PIXELS)
    with pytest.raises(ConfigError, match=r"2 pairs \(the first is '2/00"):
        check_datasets(wrong, mixed, mixed)
    alike = mix_encoded([MixPart(encoded=parts[0]), MixPart(encoded=parts[0], repeats=1)], parts[0].cache_dir)
    check_datasets(dataclasses.replace(wrong, encoded=str(alike.manifest)), alike, alike)
    assert alike.load(alike.pairs[-1]).difference is not None


def test_a_job_encodes_them_if_it_needs_them() -> None:
    job = JobConfig(
        model=ModelConfig(),
        dataset=DatasetConfig(target_dir="a", reference_dirs=("b",)),
        cache_dir="c",
        run_dir="d",
        noise=PIXELS,
    )
    assert not job.encoding.encode_pixel_difference and job.parts()[0].encoding.encode_pixel_difference
    for harmless in (dataclasses.replace(PIXELS, edit_weight=0.0), NoiseConfig(edit_weight=1.0)):
        assert not dataclasses.replace(job, noise=harmless).parts()[0].encoding.encode_pixel_difference


def test_runs_of_older_versions_can_be_continued() -> None:
    new = resume_key(TrainConfig(run_dir="run", encoded="x.json", noise=NoiseConfig(edit_weight=0.5)))
    old = {**new, "noise": {name: each for name, each in new["noise"].items() if not name.startswith("edit_weight_")}}
    assert old != new and completed_key(old) == completed_key(new)
