"""Menus tell from a file's header whether it is an edit model, which release it is, and how its weights are stored."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from tools.comfyui import REPO
from trainer_core.config import BaseModelPrecision, FlavourName
from trainer_core.qwen_image.installed import (
    Installed,
    Stored,
    fitting_precision,
    flavour_by_name,
    installed_at,
    is_text_encoder,
)
from trainer_core.qwen_image.recognise import how_to_get, template_files

EDIT = ("transformer_blocks.0.attn.add_k_proj.weight", "txt_norm.weight", "img_in.weight", "proj_out.weight")
TEXT_ENCODER = ("visual.blocks.0.attn.qkv.bias", *(f"model.layers.{n}.self_attn.k_proj.bias" for n in range(28)))


def write(path: Path, *names: str, dtype: str = "BF16") -> Path:
    """A .safetensors file with these weights, which have no elements."""
    entries = {name: {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]} for name in names}
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


@pytest.mark.parametrize(
    ("name", "more", "dtype", "found"),
    [
        ("qwen_image_edit_2509_fp8_e4m3fn", (), "F8_E4M3", Installed("edit-v2", "fp8")),
        ("renamed", ("__index_timestep_zero__",), "BF16", Installed("edit-v3", "plain")),
        ("renamed", (), "I8", Installed(None, "int8")),
        ("qwen_image_edit_bf16", (), "BF16", Installed("edit-v1", "plain")),
        ("x", ("a.weight.quant_state.bitsandbytes__nf4",), "U8", Installed(None, "nf4")),
        ("layered", ("__layered__",), "BF16", None),
        ("control", ("controlnet_blocks.0.weight",), "BF16", None),
    ],
)
def test_a_file_by_its_header(
    name: str, more: tuple[str, ...], dtype: str, found: Installed | None, tmp_path: Path
) -> None:
    assert installed_at(write(tmp_path / f"{name}.safetensors", *EDIT, *more, dtype=dtype)) == found
    prefixed = (f"model.diffusion_model.{each}" for each in (*EDIT, *more))
    assert installed_at(write(tmp_path / f"b/{name}.safetensors", *prefixed, dtype=dtype)) == found


@pytest.mark.parametrize("lacking", EDIT)
def test_other_networks_and_parts_of_a_model_are_left_out(lacking: str, tmp_path: Path) -> None:
    names = [name for name in EDIT if name != lacking]
    assert installed_at(write(tmp_path / "qwen_image_edit_bf16.safetensors", *names)) is None


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "Qwen-Image-Edit-2509-Q4_K_M.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\0".join(name.encode() for name in EDIT))
    assert installed_at(path) == Installed("edit-v2", "gguf")


def test_files_that_are_none(tmp_path: Path) -> None:
    empty, page, pipe = (tmp_path / f"{name}.safetensors" for name in ("empty", "page", "pipe"))
    empty.write_bytes(b"")
    page.write_text("<!doctype html>" + " ".join(EDIT))
    os.mkfifo(pipe)
    assert [installed_at(path) for path in (empty, page, pipe, tmp_path / "none.safetensors")] == [None] * 4


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", "x")
    assert installed_at(path) is None
    write(path, *EDIT)
    assert installed_at(path) == Installed(None, "plain")


def folder(place: Path, pipeline: str, **config: object) -> Path:
    """A model in diffusers' layout; returns its transformer."""
    write(place / "transformer/diffusion_pytorch_model-00001-of-00005.safetensors", "img_in.weight")
    values = {"_class_name": "QwenImageTransformer2DModel", **config}
    (place / "transformer/config.json").write_text(json.dumps(values))
    if pipeline:
        (place / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return place / "transformer"


@pytest.mark.parametrize(
    ("name", "pipeline", "config", "flavour"),
    [
        ("a", "QwenImageEditPipeline", {}, "edit-v1"),
        ("a", "QwenImageEditPlusPipeline", {"zero_cond_t": False}, "edit-v2"),
        ("a", "QwenImageEditPlusPipeline", {"zero_cond_t": True}, "edit-v3"),
        ("Qwen-Image-Edit-2509", "", {}, "edit-v2"),
        ("a", "", {}, None),
    ],
)
def test_a_folder_by_its_configuration(
    name: str, pipeline: str, config: dict[str, object], flavour: FlavourName | None, tmp_path: Path
) -> None:
    assert installed_at(folder(tmp_path / name, pipeline, **config)) == Installed(flavour, "plain")


@pytest.mark.parametrize(
    ("pipeline", "config"),
    [
        ("QwenImagePipeline", {}),
        ("QwenImageLayeredPipeline", {}),
        ("", {"_class_name": "FluxTransformer2DModel"}),
        ("", {"use_layer3d_rope": True}),
    ],
)
def test_a_folder_of_another_model(pipeline: str, config: dict[str, object], tmp_path: Path) -> None:
    assert installed_at(folder(tmp_path / "a", pipeline, **config)) is None


def test_the_demo_model_is_one() -> None:
    assert installed_at(REPO / "trainer_core/demo/model/transformer") is not None


@pytest.mark.parametrize(
    ("name", "flavour"),
    [
        ("Qwen-Image-Edit-2511-Q8_0", "edit-v3"),
        ("qwen_image_edit_2509_fp8mixed", "edit-v2"),
        ("Qwen_Image_Edit-Q4_K_S", "edit-v1"),
        ("my-merge-20250911", None),
        ("qwen_image_edit_fp8_e4m3fn", "edit-v1"),
        ("Qwen-Image-Edit-Plus", None),
        ("qwen_image_fp8_e4m3fn", None),
        ("Qwen-Rapid-AIO-v9", None),
        ("firered_image_edit_1.0_bf16", None),
    ],
)
def test_what_a_name_says(name: str, flavour: FlavourName | None) -> None:
    assert flavour_by_name(name) == flavour


@pytest.mark.parametrize(
    ("stored", "wanted", "precision"),
    [
        ("plain", "int8-quanto", "int8-quanto"),
        ("plain", "none", "none"),
        ("gguf", "int8-quanto", "int8-quanto"),
        ("fp8", "int8-quanto", "file"),
        ("int8", "none", "file"),
        ("fp8", "nf4-bnb", "nf4-bnb"),
        ("nf4", "int8-quanto", "nf4-bnb"),
    ],
)
def test_the_precision_for_stored_weights(
    stored: Stored, wanted: BaseModelPrecision, precision: BaseModelPrecision
) -> None:
    assert fitting_precision(stored, wanted) == precision


def test_the_text_encoder_is_told_from_the_smaller_one(tmp_path: Path) -> None:
    assert is_text_encoder(write(tmp_path / "7b.safetensors", *TEXT_ENCODER))
    larger = (f"model.layers.{n}.self_attn.k_proj.bias" for n in range(28, 36))
    assert not is_text_encoder(write(tmp_path / "3b.safetensors", *TEXT_ENCODER, *larger))
    assert not is_text_encoder(tmp_path)


def test_where_to_get_a_file_of_the_templates() -> None:
    assert how_to_get("qwen_image_vae.safetensors") == (
        "Download it (0.3 GB) from https://huggingface.co/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/"
        "qwen_image_vae.safetensors and put it into ComfyUI's folder models/vae."
    )
    assert how_to_get("mine.safetensors") == ""
    assert template_files("diffusion_models")[0] == "qwen_image_edit_2511_bf16.safetensors"
