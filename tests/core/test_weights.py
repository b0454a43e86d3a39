"""Weight files: names and shapes come from the header, weights are read one by one, and errors name the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer_core.errors import ModelFileError
from trainer_core.weights.source import open_weights
from trainer_core.weights.stored import StoredWeight, dequantise, hadamard


def read(place: Path, name: str, prefixes: tuple[str, ...] = ()) -> StoredWeight:
    with open_weights(place, prefixes).opened() as weight:
        return weight(name)


def test_a_prefix_that_most_names_have_is_cut_off(tmp_path: Path) -> None:
    tensors = {f"model.block.{number}.weight": torch.full((2, 3), float(number)) for number in range(6)}
    save_file({**tensors, "vae.weight": torch.ones(1)}, tmp_path / "all.safetensors")
    source = open_weights(tmp_path / "all.safetensors", ("transformer.", "model."))
    assert source.shapes == {f"block.{number}.weight": (2, 3) for number in range(6)}
    assert torch.equal(read(source.place, "block.4.weight", ("model.",)).codes, tensors["model.block.4.weight"])


def test_parts_of_a_folder_are_one_source(tmp_path: Path) -> None:
    parts = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.zeros(3)}}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
    index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_weights(tmp_path).shapes == {"a": (2,), "b": (3,)}
    assert torch.equal(read(tmp_path, "b").codes, torch.zeros(3))
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"two\.safetensors"):
        open_weights(tmp_path)


def test_an_index_can_not_point_outside_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ModelFileError, match="outside"):
        open_weights(index.parent)


@pytest.mark.parametrize("file", ["weights.pt", "cut.safetensors", "cut.gguf", "missing"])
def test_what_can_not_be_read_is_named(file: str, tmp_path: Path) -> None:
    if file != "missing":
        (tmp_path / file).write_bytes(b"cut")
    with pytest.raises(ModelFileError, match=file):
        open_weights(tmp_path / file)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5, 0.25])])
def test_fp8_is_codes_times_scale(scale: torch.Tensor, tmp_path: Path) -> None:
    codes = torch.tensor([[1.0, -2.0], [4.0, 0.5]])
    tensors = {"layer.weight": codes.to(torch.float8_e4m3fn), "layer.scale_weight": scale}
    save_file({**tensors, "scaled_fp8": torch.zeros(0)}, tmp_path / "fp8.safetensors")
    source = open_weights(tmp_path / "fp8.safetensors")
    assert (source.shapes, source.markers) == ({"layer.weight": (2, 2)}, {"scaled_fp8"})
    weight = read(source.place, "layer.weight")
    assert weight.is_quantised
    assert torch.equal(weight.dequantise(torch.float32), codes * scale.reshape(-1, 1))


def test_int8_without_a_scale_is_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(ModelFileError, match=r"int8\.safetensors .*layer\.weight"):
        read(tmp_path / "int8.safetensors", "layer.weight")


def test_a_rotation_is_its_own_inverse() -> None:
    matrix = hadamard(16, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix, torch.eye(16), atol=1e-6)
    codes = torch.arange(-16, 16, dtype=torch.int8).reshape(2, 16)
    scale = torch.tensor([[0.5], [0.25]])
    assert torch.allclose(dequantise(codes, scale, 16, torch.float32), codes.float() * scale @ matrix)
