"""Fixtures: narrow models and encoded datasets, made once per test session."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.narrow import make_base, make_pairs, show_less, small_encoding
from tests.support.runs import twelve_steps
from tools.comfyui import comfyui_dir
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.qwen_image import prompt
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.flavours import FLAVOURS, MEGAPIXEL
from trainer_core.run import TrainResult, train_lora


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """Folder of the Qwen2.5 tokenizer that ComfyUI ships, or QWEN_TOKENIZER_DIR if set."""
    named = os.environ.get("QWEN_TOKENIZER_DIR")  # for machines without ComfyUI
    return Path(named) if named else comfyui_dir() / "comfy" / "text_encoders" / "qwen25_tokenizer"


@pytest.fixture(scope="session", autouse=True)
def small_sight() -> Iterator[None]:
    """Shows Qwen2.5-VL the references of edit-v1 at 96² pixels instead of 1024², which takes 0.6 s for each of them.

    Tests of the sizes themselves use the fixture `true_areas`.
    """
    row = show_less()
    yield
    FLAVOURS["edit-v1"] = row


@pytest.fixture
def true_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows Qwen2.5-VL the references of edit-v1 at their true size, against `small_sight`."""
    monkeypatch.setitem(FLAVOURS, "edit-v1", dataclasses.replace(FLAVOURS["edit-v1"], vision_area=MEGAPIXEL))


@pytest.fixture(scope="session", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """Loads each tokenizer once per test session, because that takes 0.3 s; reloads it if its files change."""
    read, known = prompt.load_tokenizer, {}

    def load(folder: Path) -> Any:
        facts = [(path, path.stat()) for path in sorted(folder.glob("*"))]
        files = tuple((path.name, fact.st_size, fact.st_mtime_ns) for path, fact in facts)
        if files not in known:
            known[files] = read(folder)
        return known[files]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "load_tokenizer", load)
        yield


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Callable[[str], ModelConfig]:
    """`base_of("edit-v2")` returns a narrow base model of that flavour."""
    made: dict[str, ModelConfig] = {}

    def base(flavour: str = "edit-v1") -> ModelConfig:
        if flavour not in made:
            made[flavour] = make_base(tmp_path_factory.mktemp(flavour) / "base", tokenizer_dir, flavour)
        return made[flavour]

    return base


@pytest.fixture(scope="session")
def model(base_of: Callable[[str], ModelConfig]) -> ModelConfig:
    """A narrow base model of flavour edit-v1."""
    return base_of("edit-v1")


@pytest.fixture(scope="session")
def encoded(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    """Seven pairs of two picture sizes, encoded for `model`; two are held out."""
    root = tmp_path_factory.mktemp("encoded")
    dataset = pair_folders(make_pairs(root / "pairs", 7, ((96, 96), (128, 96))))
    return encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=2), root / "cache")


@pytest.fixture(scope="session")
def unbroken(encoded: EncodedDataset, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The result of `twelve_steps`, for tests that compare another run with it."""
    return train_lora(twelve_steps(encoded, model, tmp_path_factory.mktemp("unbroken") / "run"))
