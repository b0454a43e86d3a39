"""A separate validation dataset, sizes and prompts of validation pictures, and recovery from out of memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.narrow import make_pairs, picture, read_rows, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig, ValidationConfig, resume_key
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.errors import ConfigError, OutOfMemoryError
from trainer_core.events import SilentObserver
from trainer_core.geometry import Size
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.run import train_lora
from trainer_core.runs.view import summary
from trainer_core.training import validation as validation_module
from trainer_core.training.validation_pictures import plan_shots

PROMPTS = ("paint it red", "draw it with a pencil")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> EditDataset:
    """Three pairs in two shapes."""
    return pair_folders(make_pairs(tmp_path_factory.mktemp("pairs"), 3, ((96, 96), (128, 96))))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def encoded(pairs: EditDataset, model: ModelConfig, cache: Path) -> EncodedDataset:
    return encode_dataset(pairs, BaseModel(model), small_encoding(num_eval_images=1, validation_prompts=PROMPTS), cache)


def config_of(encoded: EncodedDataset, model: ModelConfig, run: Path, **validation: Any) -> TrainConfig:
    quick = {
        "validation_step_interval": 2,
        "validation_num_inference_steps": 1,
        "validation_guidance": 1.0,
        "strength_sweep": "none",
    }
    return TrainConfig(
        run_dir=str(run),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=4,
        lora=LoraConfig(lora_rank=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        validation=ValidationConfig(**{**quick, **validation}),
    )


class Spy:
    """Replaces sample_latents: records its arguments, and runs out of memory above `too_large` latent positions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, too_large: int = 10**9) -> None:
        self.asked: list[tuple[tuple[int, ...], list[tuple[int, ...]], torch.Tensor]] = []
        self._too_large, self._original = too_large, validation_module.sample_latents
        monkeypatch.setattr(validation_module, "sample_latents", self)

    def __call__(self, transformer: Any, noise: torch.Tensor, condition: Any, **rest: Any) -> torch.Tensor:
        references = [tuple(latents.shape[-2:]) for latents in condition.reference_latents]
        self.asked.append((tuple(noise.shape[-2:]), references, condition.prompt_embeds))
        if noise[0, 0].numel() > self._too_large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._original(transformer, noise, condition, **rest)


def equal_files(one: Path | None, other: Path | None) -> bool:
    assert one is not None and other is not None
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("name", "other"), [("preprocessing", "diffusers"), ("prompt_width", 7)])
def test_a_validation_dataset_that_was_encoded_otherwise_is_refused(
    name: str, other: Any, encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    values = json.loads(encoded.manifest.read_text())
    assert values[name] != other
    second = encoded.manifest.with_name("other.json")
    second.write_text(json.dumps({**values, name: other}))
    config = dataclasses.replace(config_of(encoded, model, tmp_path / "run"), validation_encoded=str(second))
    with pytest.raises(ConfigError, match=rf"has {name} .*the validation dataset has {other}\. Encode both"):
        train_lora(config)
    assert not (tmp_path / "run").exists()


def test_prompts_are_encoded_with_the_held_out_pairs_own_references(
    pairs: EditDataset, model: ModelConfig, encoded: EncodedDataset, cache: Path
) -> None:
    (entry,) = encoded.validation_pairs
    assert entry.validation_captions == PROMPTS
    assert all(not pair.validation_captions for pair in encoded.pairs)
    embeds = [encoded.load_prompt(entry, key) for key in (*entry.prompts, *entry.validation_prompts)]
    assert len({len(each) for each in embeds}) > 1 and not encoded.missing()
    asked = dataclasses.replace(
        pairs, pairs=tuple(dataclasses.replace(pair, captions=(PROMPTS[0],)) for pair in pairs.pairs)
    )
    as_caption = encode_dataset(asked, BaseModel(model), small_encoding(num_eval_images=1), cache)
    assert as_caption.validation_pairs[0].prompts == entry.validation_prompts[:1]


def test_validation_prompts_are_no_reason_for_a_new_run(
    pairs: EditDataset, model: ModelConfig, encoded: EncodedDataset, cache: Path, tmp_path: Path
) -> None:
    without = encode_dataset(pairs, BaseModel(model), small_encoding(num_eval_images=1), cache)
    assert without.manifest != encoded.manifest
    keys = [resume_key(config_of(each, model, tmp_path)) for each in (without, encoded)]
    assert keys[0] == keys[1]
    fewer = encode_dataset(pairs, BaseModel(model), small_encoding(num_eval_images=2), cache)
    assert resume_key(config_of(fewer, model, tmp_path))["encoded"] != keys[0]["encoded"]


def test_every_pair_is_planned_under_every_prompt_at_every_size(encoded: EncodedDataset) -> None:
    entry = dataclasses.replace(encoded.validation_pairs[0], shape=(16, 12, 16))
    shots = plan_shots([entry], ValidationConfig(validation_resolution="64x128, 128,128").sizes)
    sizes = [Size(64, 128), Size(144, 112)]  # 128: the area of 128 x 128 at the pair's aspect ratio, listed twice
    assert [(shot.caption, shot.size) for shot in shots] == [
        (caption, size) for caption in (entry.captions[0], *PROMPTS) for size in sizes
    ]
    assert [shot.has_target for shot in shots] == [False, True, False, False, False, False]
    (own,) = plan_shots([dataclasses.replace(entry, validation_captions=(), validation_prompts=())], ())
    assert own.size == Size(128, 96) and own.at_own_size and own.has_target


def test_pictures_have_their_size_and_keep_the_references(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    config = config_of(encoded, model, tmp_path / "run", validation_resolution="64x128,160x160")
    result = train_lora(config)
    (entry,) = encoded.validation_pairs
    references = [shape[1:] for shape in entry.reference_shapes]
    assert [(size, seen) for size, seen, _ in spy.asked[:7:6]] == [
        ((16, 8), references)
    ] * 2  # base, then LoRA after all base pictures
    assert {size for size, _, _ in spy.asked} == {(16, 8), (20, 20)}
    assert len(spy.asked) == 2 * 3 * 3  # 2 sizes x 3 prompts, each for the base once and for the LoRA at steps 2 and 4
    prompts = [encoded.load_prompt(entry, key) for key in (*entry.prompts[:1], *entry.validation_prompts)]
    seen = [embeds[0] for _, _, embeds in spy.asked[:6:2]]
    assert all(torch.equal(one, other) for one, other in zip(seen, prompts, strict=True))
    assert result.samples is not None and result.samples.psnr_vae is not None
    with Image.open(result.samples.grid_file) as grid:
        assert grid.height > 3 * 256


def test_a_run_that_cannot_measure_says_why_once(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> None:
    said: list[str] = []
    observer = SilentObserver()
    observer.on_note = said.append  # type: ignore[method-assign]
    config = config_of(encoded, model, tmp_path / "run", validation_resolution="64x128")
    samples = train_lora(config, observer).samples
    assert samples is not None and samples.psnr_lora is None
    reason = samples.as_text()
    assert "1 of 1 validation pictures can't be compared" in reason
    assert "64 x 128, its target 96 x 96" in reason and "validation_resolution to a single number" in reason
    assert said.count(reason) == 1
    assert summary(tmp_path / "run")["unmeasured"] == reason
    measured = train_lora(config_of(encoded, model, tmp_path / "own")).samples
    assert measured is not None and measured.psnr_lora is not None and "compared" not in measured.unmeasured
    assert bool(measured.unmeasured) == (measured.drift_shift is None)


def test_a_dataset_of_its_own_with_references_of_different_sizes(
    base_of: Callable[[str], ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with eval_dataset_id: none of its pairs is trained on, and they are sampled with their own references."""
    monkeypatch.setitem(FLAVOURS, "edit-v2", dataclasses.replace(FLAVOURS["edit-v2"], reference_area=96 * 96))
    model = base_of("edit-v2")
    folders = make_pairs(tmp_path / "eval", 2, ((96, 96),), num_references=2)
    picture(7, (160, 80)).save(Path(folders.reference_dirs[1]) / "001.png")
    apart = small_encoding(num_eval_images=-1, match_target_res=False)
    second = encode_dataset(pair_folders(folders), BaseModel(model), apart, tmp_path / "cache")
    trained = encode_dataset(
        pair_folders(make_pairs(tmp_path / "train", 2)),
        BaseModel(model),
        small_encoding(num_eval_images=0),
        tmp_path / "cache",
    )
    spy = Spy(monkeypatch)
    config = config_of(trained, model, tmp_path / "run", num_validation_images=2)
    result = train_lora(dataclasses.replace(config, validation_encoded=str(second.manifest)))
    assert [references for _, references, _ in spy.asked[:2]] == [[(12, 12), (12, 12)], [(12, 12), (8, 17)]]
    assert result.samples is not None and read_rows(result.run_dir / "metrics.jsonl")[-1]["validation_loss"] > 0
    alone = train_lora(config_of(trained, model, tmp_path / "alone"))
    assert alone.samples is None and equal_files(alone.lora_file, result.lora_file)


def test_out_of_memory_is_mended_by_a_lower_resolution_and_the_run_goes_on(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train_lora(config_of(encoded, model, tmp_path / "unbroken"))
    Spy(monkeypatch, too_large=12 * 12)
    with pytest.raises(OutOfMemoryError, match=r"validation of step 2.*lower validation_resolution"):
        train_lora(config_of(encoded, model, tmp_path / "run", validation_resolution="160x160"))
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    result = train_lora(config_of(encoded, model, tmp_path / "run", validation_resolution="64x64"))
    assert equal_files(result.lora_file, unbroken.lora_file)
    rows = read_rows(result.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]
    assert np.asarray(Image.open(result.run_dir / "samples" / "step-000002.png")).std() > 5
