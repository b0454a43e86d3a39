"""Encoding in batches equals encoding one by one, and a full disk loses no result."""

from __future__ import annotations

import dataclasses
import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning import encoders, read_ahead
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import DatasetConfig, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.disk import disk_errors
from trainer_core.errors import DiskError, Interrupted
from trainer_core.events import SilentObserver, Stop
from trainer_core.files import is_whole, read_tensors, write_tensors
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.vae import encode_pictures, load_vae

CPU = torch.device("cpu")
ROUNDING = 1e-6  # of the largest value, in float32: a matrix product of another size sums in another order
SIZES = ((96, 96), (131, 97), (96, 96), (77, 120))


@pytest.fixture
def pairs(tmp_path: Path) -> DatasetConfig:
    """Eight pairs with two references and captions of several lengths."""
    folders = make_pairs(tmp_path / "pairs", 8, SIZES, num_references=2)
    for number, path in enumerate(sorted(Path(folders.target_dir).glob("*.txt"))):
        path.write_text("make it blue\n" + " ".join(["and blue"] * (1 + number)))
    return folders


def in_batches(monkeypatch: pytest.MonkeyPatch, pixels: int, tokens: int) -> dict[str, list[int]]:
    """Turn batches on, as on a GPU. Returns the batch sizes of each network's calls."""
    calls: dict[str, list[int]] = {"vae": [], "tower": [], "language model": []}

    def vae_of(*arguments: Any) -> Any:
        vae = load_vae(*arguments)
        vae.quant_conv.register_forward_pre_hook(lambda _, inputs: calls["vae"].append(len(inputs[0])))
        return vae

    def text_encoder_of(*arguments: Any) -> Any:
        encoder = dataclasses.replace(load_text_encoder(*arguments), batch_tokens=tokens)
        model = encoder.network.model
        grid = lambda _, __, named: calls["tower"].append(len(named["grid_thw"]))  # noqa: E731
        model.visual.register_forward_pre_hook(grid, with_kwargs=True)
        count = lambda _, __, named: calls["language model"].append(len(named["inputs_embeds"]))  # noqa: E731
        model.language_model.register_forward_pre_hook(count, with_kwargs=True)
        return encoder

    monkeypatch.setattr(encoders, "load_vae", vae_of)
    monkeypatch.setattr(encoders, "load_text_encoder", text_encoder_of)
    monkeypatch.setattr(encoders, "encode_pictures", lambda vae, each, _: encode_pictures(vae, each, pixels))
    return calls


def entries(cache: Path) -> dict[str, Path]:
    return {str(path.relative_to(cache)): path for path in cache.rglob("[!.]*.safetensors")}


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
def test_batches_equal_one_by_one(
    base_of: Callable[[str], ModelConfig],
    pairs: DatasetConfig,
    tmp_path: Path,
    preprocessing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, encoding = BaseModel(base_of("edit-v2")), small_encoding(num_eval_images=1, preprocessing=preprocessing)
    encode = functools.partial(encode_dataset, pair_folders(pairs), base, encoding)
    alone = encode(tmp_path / "alone")
    calls = in_batches(monkeypatch, 3 * 96 * 96, 4096)
    together = encode(tmp_path / "together")
    assert together.pairs == alone.pairs and max(calls["vae"]) == 3
    assert max(calls["tower"]) > 1 and max(calls["language model"]) > 1
    assert sum(calls["tower"]) == 16 and sum(calls["language model"]) == 17, "nothing is encoded twice"
    one, other = entries(tmp_path / "alone"), entries(tmp_path / "together")
    assert one.keys() == other.keys() and len(one) > 40
    for name, path in one.items():
        wanted, found = read_tensors(path), read_tensors(other[name])
        for key in wanted:
            difference = (found[key].float() - wanted[key].float()).abs().max()
            assert difference <= ROUNDING * wanted[key].float().abs().max(), (name, key)


def test_in_bf16_batches_differ_by_rounding(model: ModelConfig) -> None:
    """Both ways lie equally far from float32."""
    pictures = torch.rand(3, 3, 96, 64, generator=torch.Generator().manual_seed(4))
    exact_vae = load_vae(BaseModel(model), CPU)
    exact = torch.stack(list(encode_pictures(exact_vae, pictures)))
    rounded = exact_vae.to(torch.bfloat16)
    alone, together = (torch.stack(list(encode_pictures(rounded, pictures, each))) for each in (0, 10**6))
    errors = [float((each - exact).norm() / exact.norm()) for each in (alone, together)]
    assert 1e-4 < errors[0] < 2e-2 and errors[1] == pytest.approx(errors[0], rel=0.2)
    assert float((alone - together).norm() / exact.norm()) <= errors[0]


class StopAfter(SilentObserver):
    """Asks to pause after `limit` results."""

    def __init__(self, limit: int) -> None:
        self.limit, self.done = limit, 0

    def on_progress(self, phase: str, done: int, total: int) -> None:
        self.done += phase in ("Encoding pictures", "Encoding prompts")

    def should_stop(self) -> Stop:
        return Stop.PAUSE if self.done >= self.limit else Stop.NO


def results(cache: Path) -> int:
    return sum(name.startswith(("latents", "prompt")) for name in entries(cache))


@pytest.mark.parametrize("limit", [1, 4, 26])
def test_a_stop_keeps_all_results_of_a_batch(
    base_of: Callable[[str], ModelConfig],
    pairs: DatasetConfig,
    tmp_path: Path,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = in_batches(monkeypatch, 3 * 96 * 96, 4096)
    observer = StopAfter(limit)
    with pytest.raises(Interrupted):
        encode_dataset(pair_folders(pairs), BaseModel(base_of("edit-v2")), small_encoding(), tmp_path / "c", observer)
    assert results(tmp_path / "c") == observer.done == sum(calls["vae"]) + sum(calls["language model"]) >= limit


@pytest.mark.parametrize("batched", [False, True])
def test_a_full_disk_ends_in_our_error_and_loses_nothing(
    base_of: Callable[[str], ModelConfig],
    pairs: DatasetConfig,
    tmp_path: Path,
    batched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, cache = BaseModel(base_of("edit-v2")), tmp_path / "cache"
    encode = functools.partial(encode_dataset, pair_folders(pairs), base, small_encoding(num_eval_images=0), cache)
    if batched:
        in_batches(monkeypatch, 3 * 96 * 96, 4096)
    written: list[Path] = []

    def full(path: Path, tensors: Any) -> None:
        if len(written) >= 30:
            with disk_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(path, tensors)
        written.append(path)

    monkeypatch.setattr(read_ahead, "write_tensors", full)
    with pytest.raises(DiskError, match=r"The disk is full, so .*safetensors can't be written: .* free\. Free disk"):
        encode()
    assert all(map(is_whole, written)) and set(written) == set(entries(cache).values())
    times = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(read_ahead, "write_tensors", write_tensors)
    encode()
    assert {path: path.stat().st_mtime_ns for path in written} == times, "what was written is not made again"
    assert not encode(observer=Never()).missing()


class Never(SilentObserver):
    """Fails if anything is encoded."""

    def on_progress(self, phase: str, done: int, total: int) -> None:
        assert not phase.startswith("Encoding")


def test_the_observer_of_batches_is_told_of_every_result(
    base_of: Callable[[str], ModelConfig], pairs: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_batches(monkeypatch, 3 * 96 * 96, 4096)
    told: list[tuple[str, int, int]] = []

    class Listener(SilentObserver):
        def on_progress(self, phase: str, done: int, total: int) -> None:
            told.append((phase, done, total))

    encode_dataset(
        pair_folders(pairs),
        BaseModel(base_of("edit-v2")),
        small_encoding(num_eval_images=0),
        tmp_path / "c",
        Listener(),
    )
    for phase, total in (("Encoding pictures", 24), ("Encoding prompts", 16)):
        assert [each for each in told if each[0] == phase] == [(phase, done, total) for done in range(1, total + 1)]
