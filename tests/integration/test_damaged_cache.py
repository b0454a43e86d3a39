"""Damage in the cache is noticed and named, and what was damaged is encoded again with the same result."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning import encoded as encoded_module
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.entry import entry_path
from trainer_core.config import LoraConfig, ModelConfig, TrainConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError, DiskError
from trainer_core.files import read_tensors
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora


@pytest.fixture
def encode(model: ModelConfig, tmp_path: Path) -> Callable[[], EncodedDataset]:
    folders = make_pairs(tmp_path / "pairs", 2)

    def run() -> EncodedDataset:
        return encode_dataset(pair_folders(folders), BaseModel(model), small_encoding(), tmp_path / "cache")

    return run


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [20, -1], ids=["header", "data"])
@pytest.mark.parametrize("kind", ["latents", "prompt"])
def test_training_names_a_damaged_entry_and_the_next_start_encodes_it(
    encode: Callable[[], EncodedDataset], model: ModelConfig, tmp_path: Path, kind: str, place: int
) -> None:
    encoded = encode()
    entry = encoded.pairs[0]
    path = entry_path(encoded.cache_dir, kind, {"latents": entry.target, "prompt": entry.prompts[0]}[kind])
    wanted = read_tensors(path)[kind]
    flip(path, place)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=1,
        lora=LoraConfig(lora_rank=2),
    )
    with pytest.raises(DatasetError) as caught:
        train_lora(config)
    message = str(caught.value)
    assert entry.key in message and "Encode the dataset again" in message
    if place < 0:  # a header that can't be read is found before, when the run looks for missing entries
        aside = path.with_name(f"{path.name}.damaged")
        assert path.name in message and aside.name in message
        assert aside.is_file() and not path.exists()
    encode()
    assert torch.equal(read_tensors(path)[kind], wanted)
    assert train_lora(config).steps_done == 1


def test_a_folder_in_the_place_of_an_entry_is_named(encode: Callable[[], EncodedDataset]) -> None:
    encoded = encode()
    path = entry_path(encoded.cache_dir, "latents", encoded.pairs[0].target)
    path.unlink()
    path.mkdir()
    with pytest.raises(DiskError, match=f"{path} is a folder, but a file is needed there"):
        encode()
    path.rmdir()
    encode()
    assert encoded.missing() == ()


def test_an_entry_that_cannot_be_read_is_not_called_damaged(
    encode: Callable[[], EncodedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole, as with too many open files, so it keeps its name."""
    encoded = encode()
    entry = encoded.pairs[0]
    path = entry_path(encoded.cache_dir, "prompt", entry.prompts[0])

    def refused(_: Path) -> dict[str, torch.Tensor]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(encoded_module, "read_tensors", refused)
    with pytest.raises(DatasetError, match=r"can't be read \(prompt.*Too many open files"):
        encoded.load_prompt(entry, entry.prompts[0])
    assert path.is_file()
    path.unlink()
    with pytest.raises(DatasetError, match=r"A prompt in the cache .* can't be read \(prompt.*no such file"):
        encoded.prompt_tokens(entry.prompts[0])


def test_damaged_visual_tokens_are_encoded_again(
    encode: Callable[[], EncodedDataset], caplog: pytest.LogCaptureFixture
) -> None:
    encoded = encode()
    entry = encoded.pairs[0]
    prompt = entry_path(encoded.cache_dir, "prompt", entry.prompts[0])
    wanted = read_tensors(prompt)["prompt"]
    for path in (encoded.cache_dir / "conditioning_image_embeds").rglob("*.safetensors"):
        flip(path, -1)
    prompt.unlink()
    encode()
    assert "visual tokens" in caplog.text and "are damaged" in caplog.text
    torch.testing.assert_close(read_tensors(prompt)["prompt"], wanted, rtol=1e-5, atol=1e-5)


def damaged_manifests(text: str) -> dict[str, bytes]:
    values = json.loads(text)
    lacking = {name: value for name, value in values.items() if name != "validation_pairs"}
    return {
        "empty": b"",
        "no UTF-8": b"\xff" + text.encode(),
        "a list": b"[]",
        "null": b"null",
        "nested": b"[" * 100_000,
        "another format": json.dumps({**values, "format": 9}).encode(),
        "pairs is a number": json.dumps({**values, "pairs": 5}).encode(),
        "a pair is a text": json.dumps({**values, "pairs": ["x"]}).encode(),
        "a pair lacks its target": json.dumps({**values, "pairs": [{"key": "a"}]}).encode(),
        "an unknown name": json.dumps({**values, "coming": 1}).encode(),
        "without held-out pairs": json.dumps(lacking).encode(),
        "another key": text.replace(values["pairs"][0]["target"], "0" * 32).encode(),
        "another caption": text.replace("negative", "positive", 1).encode(),
        "cut": text[:-40].encode(),
    }


def test_a_damaged_manifest_is_named_and_written_again(encode: Callable[[], EncodedDataset]) -> None:
    encoded = encode()
    whole = encoded.manifest.read_text(encoding="utf-8")
    for what, data in damaged_manifests(whole).items():
        encoded.manifest.write_bytes(data)
        with pytest.raises(DatasetError, match=r"(?s)Encode the dataset again") as caught:
            load_encoded(encoded.manifest)
        assert str(encoded.manifest) in str(caught.value), what
    encode()
    assert load_encoded(encoded.manifest) == encoded
    encoded.manifest.unlink()
    encoded.manifest.mkdir()
    with pytest.raises(DatasetError, match="not a file"):
        load_encoded(encoded.manifest)
