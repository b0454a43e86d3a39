"""Encoding reuses what has not changed, encodes again what has, and keeps its results when it is stopped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.encode import encode_dataset, plan_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.pictures import plan_pair, render
from trainer_core.conditioning.read_ahead import read_ahead
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import DatasetConfig, EncodingConfig, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError, DatasetError, Interrupted
from trainer_core.events import SilentObserver, Stop
from trainer_core.geometry import Size
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.flavours import FLAVOURS


class Work(SilentObserver):
    """Counts the encoded pictures and prompts, and asks to pause after `limit` of them."""

    def __init__(self, limit: int = 10**9) -> None:
        self.done: dict[str, int] = {"Encoding pictures": 0, "Encoding prompts": 0}
        self.limit = limit

    def on_progress(self, phase: str, done: int, total: int) -> None:
        if phase in self.done:
            self.done[phase] += 1

    def should_stop(self) -> Stop:
        return Stop.PAUSE if sum(self.done.values()) >= self.limit else Stop.NO

    @property
    def counts(self) -> tuple[int, int]:
        return self.done["Encoding pictures"], self.done["Encoding prompts"]


@pytest.fixture
def pairs(tmp_path: Path) -> DatasetConfig:
    """Three pairs in tmp_path/pairs."""
    return make_pairs(tmp_path / "pairs", 3)


Encode = Callable[..., tuple[EncodedDataset, tuple[int, int]]]


@pytest.fixture
def encode(model: ModelConfig, pairs: DatasetConfig, tmp_path: Path) -> Encode:
    """Encodes into one cache. Returns the dataset and the numbers of pictures and prompts that were encoded."""

    def run(
        encoding: EncodingConfig | None = None, model_: ModelConfig = model
    ) -> tuple[EncodedDataset, tuple[int, int]]:
        work = Work()
        encoded = encode_dataset(
            pair_folders(pairs), BaseModel(model_), encoding or small_encoding(), tmp_path / "cache", work
        )
        return encoded, work.counts

    return run


def test_the_second_time_nothing_is_made(encode: Encode) -> None:
    first, made = encode()
    assert made == (6, 4)  # three targets and three references; three captions and one negative prompt
    second, again = encode()
    assert again == (0, 0) and second == first == load_encoded(first.manifest)


def test_one_changed_pixel_makes_that_picture_and_what_was_seen_with_it(encode: Encode, pairs: DatasetConfig) -> None:
    first, _ = encode()
    held_out = first.validation_pairs[0].key
    key = next(entry.key for entry in first.pairs if entry.key != held_out)
    path = Path(pairs.reference_dirs[0]) / f"{key}.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    second, made = encode()
    assert made == (1, 1)
    assert second.manifest != first.manifest


def test_one_changed_word_makes_that_prompt(encode: Encode, pairs: DatasetConfig) -> None:
    encode()
    (Path(pairs.target_dir) / "000.txt").write_text("turn it into a positive")
    assert encode()[1] == (0, 1)


@pytest.mark.parametrize("change", ["size", "policy", "flavour", "vae", "text encoder"])
def test_every_thing_that_decides_the_result_is_in_the_key(
    encode: Encode, model: ModelConfig, base_of: Callable[[str], ModelConfig], tmp_path: Path, change: str
) -> None:
    encode()
    if change == "size":
        assert encode(small_encoding(resolution=128))[1] == (6, 0)  # Qwen2.5-VL sees the same
    if change == "policy":
        assert encode(small_encoding(preprocessing="diffusers"))[1] == (3, 4)  # both resize targets alike
    if change == "flavour":
        assert encode(model_=base_of("edit-v2"))[1][1] == 4
    if change in ("vae", "text encoder"):
        copy = tmp_path / "copy"
        shutil.copytree(model.base, copy)
        weights = next((copy / change.replace(" ", "_")).glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-5000] ^= 1
        data[-4090:-2] = bytes(4088)
        weights.write_bytes(data)
        assert encode(model_=dataclasses.replace(model, base=str(copy)))[1] == ((6, 0) if change == "vae" else (0, 4))


def test_another_place_or_time_of_the_same_files_is_found(
    encode: Encode, model: ModelConfig, pairs: DatasetConfig, tmp_path: Path
) -> None:
    encode()
    shutil.copytree(model.base, tmp_path / "moved")
    for path in Path(pairs.target_dir).iterdir():
        path.touch()
    assert encode(model_=dataclasses.replace(model, base=str(tmp_path / "moved")))[1] == (0, 0)


def test_a_stop_keeps_what_was_made(model: ModelConfig, pairs: DatasetConfig, tmp_path: Path, encode: Encode) -> None:
    total = 0
    for limit in (1, 2, 3, 2, 1):
        work = Work(limit)
        with pytest.raises(Interrupted):
            encode_dataset(pair_folders(pairs), BaseModel(model), small_encoding(), tmp_path / "cache", work)
        assert sum(work.counts) == limit
        total += limit
    assert sum(encode()[1]) == 10 - total


def test_an_entry_cut_short_is_made_again(encode: Encode) -> None:
    first, _ = encode()
    path = first.cache_dir / "latents" / first.pairs[0].target[:2] / f"{first.pairs[0].target}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert first.missing() == (first.pairs[0].key,)
    with pytest.raises(DatasetError, match=first.pairs[0].key):
        first.load(first.pairs[0])
    assert encode()[1] == (1, 0)
    assert path.read_bytes() == whole


def test_prompts_see_their_own_pictures(encode: Encode) -> None:
    encoded, _ = encode(small_encoding(num_eval_images=0))
    a, b = (encoded.load(entry).prompt_embeds for entry in encoded.pairs[:2])
    length = min(len(a), len(b))
    assert not torch.allclose(a[:length], b[:length], atol=1e-2)


def test_held_out_pairs_are_kept_whole_and_out_of_training(encode: Encode) -> None:
    encoded, _ = encode(small_encoding(num_eval_images=2))
    assert len(encoded.pairs) == 1 and len(encoded.validation_pairs) == 2
    assert {entry.key for entry in encoded.pairs}.isdisjoint(entry.key for entry in encoded.validation_pairs)
    entry = encoded.validation_pairs[0]
    target, reference = encoded.load_pictures(entry)
    assert target.shape == reference.shape == (3, 96, 96) and target.dtype == torch.uint8
    assert abs(int(target.int().add(reference.int()).median()) - 255) <= 1  # each target is its reference's negative
    negative, prompt = encoded.load_prompt(entry, entry.negative), encoded.load(entry).prompt_embeds
    assert len(negative) < len(prompt) and negative.shape[1] == prompt.shape[1]
    everything, _ = encode(small_encoding(num_eval_images=-1))
    assert not everything.pairs and len(everything.validation_pairs) == 3


@pytest.mark.parametrize("num_eval_images", [0, 1, 2])
@pytest.mark.parametrize("marked", [("000",), ("002",), ("000", "001"), ("002", "gone")])
def test_marked_pairs_are_exactly_those_validated(
    num_eval_images: int, marked: tuple[str, ...], model: ModelConfig, pairs: DatasetConfig, tmp_path: Path
) -> None:
    dataset = dataclasses.replace(pair_folders(pairs), held_out=marked)
    encoding = small_encoding(num_eval_images=num_eval_images)
    planned = plan_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")
    there = [key for key in ("000", "001", "002") if key in marked]
    assert [each.pair.key for each in planned.validation_pairs] == there
    assert [each.pair.key for each in planned.pairs] == [key for key in ("000", "001", "002") if key not in there]


def test_marks_of_all_pairs_or_of_none(model: ModelConfig, pairs: DatasetConfig, tmp_path: Path) -> None:
    def validated(held_out: tuple[str, ...], num_eval_images: int) -> int:
        dataset = dataclasses.replace(pair_folders(pairs), held_out=held_out)
        encoding = small_encoding(num_eval_images=num_eval_images)
        return len(plan_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache").validation_pairs)

    assert [validated(("gone",), 2), validated((), 1), validated(("000",), -1)] == [2, 1, 3]
    with pytest.raises(DatasetError, match="All 3 pairs are held out"):
        validated(("000", "001", "002"), 1)


def test_validated_pairs_can_be_trained_on_too(encode: Encode) -> None:
    held, first = encode(small_encoding(num_eval_images=2))
    both, again = encode(small_encoding(num_eval_images=2, train_eval_images=True))
    alone, _ = encode(small_encoding(num_eval_images=0))
    assert both.pairs == alone.pairs and len(both.pairs) == 3
    assert both.validation_pairs == held.validation_pairs and both.trained_too(both) == 2
    assert first[0] > 0 and again == (0, 0)  # nothing is encoded a second time
    assert both.manifest.stem.split("-")[0] == alone.manifest.stem.split("-")[0]  # a run goes on with either
    report = encoding_report(both)
    assert "3 pairs to train on, 0 held out" in report and "Pairs to train on that are also validated: 2." in report
    assert held.trained_too(held) == 0 and "also validated" not in encoding_report(held)
    everything, _ = encode(small_encoding(num_eval_images=25, train_eval_images=True))
    assert len(everything.pairs) == len(everything.validation_pairs) == 3


def test_a_prompt_is_encoded_once_for_both_uses(encode: Encode) -> None:
    _, counts = encode(small_encoding(num_eval_images=3, train_eval_images=True))
    assert counts == (6, 6)  # three targets and three references; three captions and three negative prompts


def test_too_many_held_out_is_refused(encode: Encode) -> None:
    with pytest.raises(DatasetError, match=r"num_eval_images must be less than .*\(3\), got 3"):
        encode(small_encoding(num_eval_images=3))


def test_more_references_than_the_flavour_takes(model: ModelConfig, tmp_path: Path) -> None:
    dataset = pair_folders(make_pairs(tmp_path / "two", 2, num_references=2))
    with pytest.raises(
        ConfigError, match=r"per pair; Qwen-Image-Edit \(edit-v1\) takes 1.* the model 2509 \(edit-v2\) or 2511"
    ):
        encode_dataset(dataset, BaseModel(model), small_encoding(), tmp_path / "cache")


def test_two_references_are_two_latents_in_order(base_of: Callable[[str], ModelConfig], tmp_path: Path) -> None:
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 2, num_references=2))
    encoded = encode_dataset(
        dataset, BaseModel(base_of("edit-v2")), small_encoding(num_eval_images=0), tmp_path / "cache"
    )
    first, second = encoded.load(encoded.pairs[0]).reference_latents
    assert first.shape == second.shape == (16, 12, 12) and not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("size", [Size(1777, 1003), Size(641, 480), Size(333, 1000)])
@pytest.mark.parametrize("flavour", ["edit-v1", "edit-v2"])
@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
def test_target_and_reference_show_the_same_rectangle(size: Size, flavour: str, preprocessing: str) -> None:
    """At sizes that are not multiples of 16, the views differ by less than a quarter of what a one-pixel shift does."""
    encoding = EncodingConfig(resolution=256, match_target_res=True, preprocessing=preprocessing)
    plan = plan_pair((size, size), FLAVOURS[flavour], encoding)
    assert plan.target.box == plan.references[0].box and plan.target.size == plan.references[0].size
    x, y = np.meshgrid(np.linspace(0, 12, size.width), np.linspace(0, 9, size.height))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    picture = Image.fromarray(((waves + 1) * 127).astype(np.uint8))
    difference = (render(picture, plan.target) - render(picture, plan.references[0])).abs()
    shifted = (render(picture, plan.target)[..., 1:] - render(picture, plan.references[0])[..., :-1]).abs()
    assert float(difference.mean()) < 0.25 * float(shifted.mean())


def test_reading_ahead_keeps_order_and_raises_what_was_raised() -> None:
    assert list(read_ahead(range(50), lambda number: number * 2)) == [(number, number * 2) for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead([1, 0], lambda number: 1 / number))
