"""reference_latents on_the_fly: no latents of training references on disk, and training stays the same bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.icc import rgb_profile
from tests.support.narrow import make_pairs, picture, small_encoding
from trainer_core.conditioning.batches import BatchLoader, BatchPlan
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.encoders import EncodePictures, Encoders, PictureEncoder
from trainer_core.conditioning.on_the_fly import reference_encoder
from trainer_core.config import (
    BatchingConfig,
    DatasetConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError, DatasetError
from trainer_core.events import Observer
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training.edit_weight import edit_weight_preview


@pytest.fixture
def folders(tmp_path: Path) -> DatasetConfig:
    """Four pairs with two references, whose sides are not multiples of 16."""
    return make_pairs(tmp_path / "pairs", 4, ((131, 97), (120, 77)), num_references=2)


@pytest.fixture
def model(base_of: Callable[[str], ModelConfig]) -> ModelConfig:
    return base_of("edit-v2")


def encode(folders: DatasetConfig, model: ModelConfig, cache: Path, **changes: object) -> EncodedDataset:
    return encode_dataset(pair_folders(folders), BaseModel(model), small_encoding(**changes), cache)


def num_latents(encoded: EncodedDataset) -> int:
    return len(list((encoded.cache_dir / "latents").rglob("*.safetensors")))


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
def test_latents_equal_those_of_the_cache(
    folders: DatasetConfig, model: ModelConfig, tmp_path: Path, preprocessing: str
) -> None:
    cached = encode(folders, model, tmp_path / "cached", preprocessing=preprocessing)
    flying = encode(folders, model, tmp_path / "flying", preprocessing=preprocessing, reference_latents="on_the_fly")
    assert num_latents(cached) == 12 and num_latents(flying) == 6  # targets, and the held-out pair's two references
    assert load_encoded(flying.manifest) == flying and flying.missing() == ()
    assert flying.validation_pairs == cached.validation_pairs
    with (
        reference_encoder(cached, BaseModel(model)) as none,
        reference_encoder(flying, BaseModel(model)) as encode_reference,
    ):
        assert none is None
        for entry, other in zip(flying.pairs, cached.pairs, strict=True):
            assert (entry.references, entry.prompts) == (other.references, other.prompts)
            made = flying.load(entry, encode_reference=encode_reference).reference_latents
            kept = cached.load(other).reference_latents
            assert len(made) == 2 and all(torch.equal(*each) for each in zip(made, kept, strict=True))


def with_profile(folder: Path) -> None:
    """Gives every picture of a folder the profile of Adobe RGB, and leaves its numbers."""
    for path in folder.glob("*.png"):
        with Image.open(path) as opened:
            opened.save(path, icc_profile=rgb_profile("Adobe RGB"))


def test_latents_follow_the_colour_profile_in_the_cache_and_on_the_fly(
    folders: DatasetConfig, model: ModelConfig, tmp_path: Path
) -> None:
    plain = encode(folders, model, tmp_path / "plain")
    with_profile(Path(folders.reference_dirs[0]))
    raw = encode(dataclasses.replace(folders, color_profiles="ignore"), model, tmp_path / "cached")
    cached = encode(folders, model, tmp_path / "cached")
    flying = encode(folders, model, tmp_path / "flying", reference_latents="on_the_fly")
    with reference_encoder(flying, BaseModel(model)) as encode_reference:
        for index, entry in enumerate(flying.pairs):
            made = flying.load(entry, encode_reference=encode_reference).reference_latents
            kept, ignored, before = (each.load(each.pairs[index]).reference_latents for each in (cached, raw, plain))
            assert all(torch.equal(*each) for each in zip(made, kept, strict=True))
            assert not torch.equal(kept[0], ignored[0])
            assert torch.equal(kept[1], ignored[1])
            assert all(torch.equal(*each) for each in zip(ignored, before, strict=True))
            assert not torch.equal(
                cached.load(cached.pairs[index]).prompt_embeds, raw.load(raw.pairs[index]).prompt_embeds
            )


def config(encoded: EncodedDataset, model: ModelConfig, run_dir: Path) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=4,
        lora=LoraConfig(lora_rank=2),
        batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=1),
        validation=ValidationConfig(validation_num_inference_steps=1),
    )


def test_a_training_is_the_same_to_the_bit(folders: DatasetConfig, model: ModelConfig, tmp_path: Path) -> None:
    files = []
    for kind in ("cached", "on_the_fly"):
        encoded = encode(
            folders, model, tmp_path / kind, reference_latents=kind, conditioning_multidataset_sampling="random"
        )
        result = train_lora(config(encoded, model, tmp_path / f"run {kind}"))
        assert result.lora_file is not None and result.samples is not None
        files.append(load_file(result.lora_file))
    assert all(torch.equal(each, files[1][name]) for name, each in files[0].items())


def test_a_changed_or_missing_file_is_named(folders: DatasetConfig, model: ModelConfig, tmp_path: Path) -> None:
    encoded = encode(folders, model, tmp_path / "cache", reference_latents="on_the_fly")
    entry = encoded.pairs[0]
    path = Path(folders.reference_dirs[1]) / f"{entry.key}.png"
    picture(99, (131, 97)).save(path)
    with reference_encoder(encoded, BaseModel(model)) as encode_reference:
        with pytest.raises(DatasetError, match=rf"reference_2/{entry.key}\.png: the file has changed"):
            encoded.load(entry, encode_reference=encode_reference)
        plan = BatchPlan(encoded, BatchingConfig(), 0)
        with (
            BatchLoader(encoded, plan, encode_reference=encode_reference) as loader,
            pytest.raises(DatasetError, match=rf"reference_2/{entry.key}\.png"),
        ):
            [loader[number] for number in range(3)]
    path.unlink()
    assert encoded.missing() == (entry.key,)
    with pytest.raises(DatasetError, match=entry.key):
        train_lora(config(encoded, model, tmp_path / "run"))


def test_pictures_may_move_between_two_parts_of_a_run(
    folders: DatasetConfig, model: ModelConfig, tmp_path: Path
) -> None:
    before = encode(folders, model, tmp_path / "cache", reference_latents="on_the_fly")
    shutil.move(tmp_path / "pairs", tmp_path / "elsewhere")
    moved = dataclasses.replace(
        folders,
        target_dir=folders.target_dir.replace("pairs", "elsewhere"),
        reference_dirs=tuple(each.replace("pairs", "elsewhere") for each in folders.reference_dirs),
    )
    after = encode(moved, model, tmp_path / "cache", reference_latents="on_the_fly")
    assert after.manifest == before.manifest and after.pairs != before.pairs
    assert "elsewhere" in after.pairs[0].reference_files[0].path and after.missing() == ()


def test_another_vae_is_refused(folders: DatasetConfig, model: ModelConfig, tmp_path: Path) -> None:
    encoded = encode(folders, model, tmp_path / "cache", reference_latents="on_the_fly")
    other = dataclasses.replace(model, mixed_precision="bf16")
    with (
        pytest.raises(ConfigError, match="another VAE or mixed_precision"),
        reference_encoder(encoded, BaseModel(other)),
    ):
        pass

    @contextmanager
    def loaded(_: Observer) -> Iterator[EncodePictures]:
        yield lambda pixels: pixels

    given = Encoders(pictures=PictureEncoder("theirs", loaded))
    with pytest.raises(ConfigError, match=r"on_the_fly.*disconnect vae"):
        given.check(small_encoding(reference_latents="on_the_fly"))
    with pytest.raises(ConfigError, match="reference_latents to cached"):
        edit_weight_preview(encoded, NoiseConfig(edit_weight=0.5))
