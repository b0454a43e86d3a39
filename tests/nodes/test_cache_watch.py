"""A queued graph encodes again if part of the cache was deleted."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trainer_core.conditioning.encoded import EncodedDataset


def entries(encoded: EncodedDataset) -> list[Path]:
    return sorted(encoded.cache_dir.glob("*/*/*.safetensors"))


@pytest.fixture
def copied(encoded: EncodedDataset, tmp_path: Path) -> EncodedDataset:
    """A dataset with a copy of its cache, which the test may damage."""
    shutil.copytree(encoded.cache_dir, tmp_path / "cache")
    return dataclasses.replace(encoded, manifest=tmp_path / "cache" / "datasets" / encoded.manifest.name)


def removed(encoded: EncodedDataset) -> None:
    entries(encoded)[0].unlink()


def cut_short(encoded: EncodedDataset) -> None:
    path = entries(encoded)[0]
    path.write_bytes(path.read_bytes()[:-1])


def without_manifest(encoded: EncodedDataset) -> None:
    encoded.manifest.unlink()


def made_again_empty(encoded: EncodedDataset) -> None:
    """The new folder may get the old one's inode number."""
    shutil.rmtree(encoded.cache_dir)
    encoded.cache_dir.mkdir()


@pytest.mark.parametrize("loss", [removed, cut_short, without_manifest, made_again_empty])
def test_a_loss_changes_the_fingerprint_once(
    loss: Callable[[EncodedDataset], None], copied: EncodedDataset, pack_module: Callable[[str], ModuleType]
):
    watch = pack_module("cache_watch").CacheWatch()
    watch.watch(copied)
    assert watch.losses() == watch.losses() == "0"
    loss(copied)
    watch.watch(copied)  # as when the node has encoded again
    assert [watch.losses() for _ in range(3)] == ["1", "1", "1"]
    watch.watch(copied)
    assert watch.losses() == "2"


def test_it_looks_once_a_second(
    copied: EncodedDataset, pack_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
):
    now, module = [0.0], pack_module("cache_watch")
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    watch = module.CacheWatch()
    watch.watch(copied)
    assert watch.losses() == "0"
    removed(copied)
    now[0] = 0.9
    assert watch.losses() == "0"
    now[0] = 1.0
    assert watch.losses() == "1"
