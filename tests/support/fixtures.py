"""Narrow models and encoded datasets, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.narrow import make_base, make_pairs, small_encoding
from tools.comfyui import comfyui_dir
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.qwen_image import prompt
from trainer_core.qwen_image.base_model import BaseModel


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """The Qwen2.5 tokenizer that ComfyUI ships."""
    named = os.environ.get("QWEN_TOKENIZER_DIR")  # a machine without ComfyUI
    return Path(named) if named else comfyui_dir() / "comfy" / "text_encoders" / "qwen25_tokenizer"


@pytest.fixture(scope="session", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """Reads a tokenizer's files once a session, and again when they differ: it takes a third of a second each time."""
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
    """`base_of("edit-v2")`: a narrow base model of that flavour."""
    made: dict[str, ModelConfig] = {}

    def base(flavour: str = "edit-v1") -> ModelConfig:
        if flavour not in made:
            made[flavour] = make_base(tmp_path_factory.mktemp(flavour) / "base", tokenizer_dir, flavour)
        return made[flavour]

    return base


@pytest.fixture(scope="session")
def model(base_of: Callable[[str], ModelConfig]) -> ModelConfig:
    """A narrow edit-v1."""
    return base_of("edit-v1")


@pytest.fixture(scope="session")
def encoded(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    """Seven pairs of two shapes for `model`, two of them held out."""
    root = tmp_path_factory.mktemp("encoded")
    dataset = pair_folders(make_pairs(root / "pairs", 7, ((96, 96), (128, 96))))
    return encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=2), root / "cache")
