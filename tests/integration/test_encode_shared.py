"""Encoding that is killed, that shares its cache with another run, or whose folders change meanwhile."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.forked import Forked
from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import load_encoded
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import DatasetConfig, ModelConfig, to_json
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError
from trainer_core.events import SilentObserver
from trainer_core.files import is_whole, read_tensors
from trainer_core.qwen_image.base_model import BaseModel


class Count(SilentObserver):
    """Counts the encoding results."""

    def __init__(self) -> None:
        self.made = 0

    def on_progress(self, phase: str, done: int, total: int) -> None:
        self.made += phase.startswith("Encoding")


def other_pixels(path: Path) -> None:
    """Replaces a picture with another one of the same size."""
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> DatasetConfig:
    """Eight pairs."""
    return make_pairs(tmp_path / "pairs", 8)


def entries(cache: Path) -> dict[str, Path]:
    """The cache's tensor files by their path relative to it, without hidden ones, which a kill leaves unfinished."""
    return {str(path.relative_to(cache)): path for path in cache.rglob("[!.]*.safetensors")}


def test_pictures_that_changed_are_named_and_all_others_encoded(
    model: ModelConfig, pairs: DatasetConfig, tmp_path: Path
) -> None:
    paired = pair_folders(pairs)
    target, reference = (Path(folder) for folder in (pairs.target_dir, pairs.reference_dirs[0]))
    other_pixels(target / "003.png")
    (reference / "005.png").unlink()
    (target / "006.png").write_bytes((target / "006.png").read_bytes()[:300])
    encoding = small_encoding(num_eval_images=0)
    with pytest.raises(DatasetError, match="run again while no other program changes the folders") as caught:
        encode_dataset(paired, BaseModel(model), encoding, tmp_path / "cache")
    assert len(caught.value.problems) == 3
    for name, words in (
        ("target/003.png", "has changed"),
        ("reference_1/005.png", "no such"),
        ("006.png", "has changed"),
    ):
        assert sum(f"{name}: " in line and words in line for line in caught.value.problems) == 1, name
    assert not (tmp_path / "cache" / "datasets").exists()
    (target / "006.png").unlink()
    (target / "005.png").unlink()
    (target / "006.txt").unlink()
    (target / "005.txt").unlink()
    rest, work = pair_folders(pairs), Count()
    encoded = encode_dataset(rest, BaseModel(model), encoding, tmp_path / "cache", work)
    assert work.made == 1, "only the changed target is encoded again"
    fresh = encode_dataset(rest, BaseModel(model), encoding, tmp_path / "fresh")
    for one, two in zip(encoded.pairs, fresh.pairs, strict=True):
        assert torch.equal(encoded.load(one).target_latents, fresh.load(two).target_latents)
        assert torch.equal(encoded.load(one).prompt_embeds, fresh.load(two).prompt_embeds)


class Meddler(SilentObserver):
    """Changes a picture and a caption and adds a picture, once, after the first result."""

    def __init__(self, config: DatasetConfig) -> None:
        self.folder, self.over = Path(config.target_dir), False

    def on_progress(self, phase: str, done: int, total: int) -> None:
        if not self.over:
            self.over = True
            other_pixels(self.folder / "000.png")
            (self.folder / "001.txt").write_text("something else entirely")
            Image.new("RGB", (96, 96)).save(self.folder / "new.png")


def test_a_folder_that_changes_while_encoding_is_reported(
    model: ModelConfig, pairs: DatasetConfig, tmp_path: Path
) -> None:
    paired = pair_folders(pairs)
    encoded = encode_dataset(paired, BaseModel(model), small_encoding(), tmp_path / "cache", Meddler(pairs))
    assert [Path(name).name for name in encoded.changed] == ["000.png", "001.txt", "new.png"]
    report = encoding_report(encoded)
    assert "while encoding: 3 (" in report and "001.txt" in report
    again = encode_dataset(paired, BaseModel(model), small_encoding(), tmp_path / "cache")
    assert again == encoded == load_encoded(encoded.manifest), "changes after the pairing have no effect"
    assert not again.changed and "while encoding" not in encoding_report(again)


def start(job: Path) -> Forked:
    """Starts `python -m trainer_core encode` in its own process."""
    return Forked("trainer_core", "encode", job)


def test_after_a_kill_two_runs_finish_it_together(model: ModelConfig, pairs: DatasetConfig, tmp_path: Path) -> None:
    encoding, cache, job = small_encoding(), tmp_path / "cache", tmp_path / "job.json"
    values = {"model": to_json(model), "dataset": to_json(pairs), "encoding": to_json(encoding)}
    job.write_text(json.dumps({**values, "cache_dir": str(cache), "run_dir": str(tmp_path / "run")}))
    killed = Forked("tests.support.killed", "write_tensors", 8, 0, "trainer_core", "encode", job)  # four threads write
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = entries(cache)
    assert 3 <= len(left) < 20
    assert all(map(is_whole, left.values()))
    torn = next(iter(left.values()))
    torn.write_bytes(torn.read_bytes()[:-7])  # as a full disk may leave it

    together = [start(job), start(job)]
    answers = [each.communicate() for each in together]
    assert [each.returncode for each in together] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    work = Count()
    encoded = encode_dataset(pair_folders(pairs), BaseModel(model), encoding, cache, work)
    assert work.made == 0 and str(encoded.manifest) == answers[0][0].strip()
    encode_dataset(pair_folders(pairs), BaseModel(model), encoding, tmp_path / "fresh")
    shared, fresh = entries(cache), entries(tmp_path / "fresh")
    assert shared.keys() == fresh.keys()
    for name, path in fresh.items():
        one, two = read_tensors(shared[name]), read_tensors(path)
        assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one), name
