"""Model files of strangers: a result or our own error, in bounded time and memory, for each part of the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from tests.support.limits import result_or_own_error
from trainer_core.config import ModelConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder_file import check_text_encoder_file
from trainer_core.qwen_image.vae import check_vae
from trainer_core.weights.source import open_weights

LOADED = (AutoencoderKLQwenImage, QwenImageTransformer2DModel)  # their first import takes seconds
# Names that some check looks at, alone or as the beginning or end of another.
MARKS = [
    *("txt_norm.weight", "img_in.weight", "txt_in.weight", "proj_out.weight"),
    *("transformer_blocks.0.attn.norm_added_k.weight", "transformer_blocks.0.attn.to_q.weight"),
    *("transformer_blocks.x.attn", "transformer_blocks.99999999999.a", "__index_timestep_zero__", "scaled_fp8"),
    *("model.layers.0.self_attn.k_proj.bias", "visual.blocks.0.attn.qkv.weight", "decoder.norm_out.gamma"),
    *("decoder.middle.0.residual.0.gamma", "encoder.conv_in.weight", "encoder.conv1.weight", "__layered__"),
]
ENDINGS = [
    *("", ".weight_scale", ".scale_weight", ".comfy_quant", ".input_scale", ".weight_scale_2", ".qweight", ".wscales"),
    *(".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4", ".lora_A.weight"),
]
PREFIXES = ["", "model.diffusion_model.", "transformer.", "text_encoders.qwen25_7b.transformer.", "vae."]
names = st.builds(
    lambda prefix, mark, ending: prefix + mark.removesuffix(".weight") * (ending != "") + mark * (not ending) + ending,
    st.sampled_from(PREFIXES),
    st.sampled_from(MARKS),
    st.sampled_from(ENDINGS),
)
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64])
shapes = st.lists(st.sampled_from([0, 1, 2, 16, 128, 512]), max_size=3).filter(lambda shape: math.prod(shape) < 70_000)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
formats = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["float8_e4m3fn", "int8_tensorwise", "nvfp4"]) | json_values,
        "convrot": st.booleans(),
        "convrot_groupsize": st.sampled_from([4, 16, 256, 3, 0, -4, 2**70]) | json_values,
        "shape": st.lists(st.integers(-2, 2**40), max_size=3) | json_values,
    },
)
settings = (formats | json_values).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30)
notes = settings.map(lambda data: torch.tensor(list(data), dtype=torch.uint8))
tensors = st.builds(lambda shape, kind: torch.zeros(shape, dtype=kind), shapes, types)
stored_tensors = st.dictionaries(names, tensors | notes, max_size=12)
headers = st.none() | st.builds(
    lambda values: json.dumps({"layers": values}),
    st.dictionaries(names.map(lambda name: name.removesuffix(".weight")), formats | json_values, max_size=3),
)


def open_as_each_part(data: bytes, suffix: str = ".safetensors") -> None:
    """Open a file as each part of the model, and read what the layout's reader promises to read."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        path.write_bytes(data)
        files = {f"{part}_file": str(path) for part in ("transformer", "text_encoder", "vae")}
        base = BaseModel(ModelConfig(**files, tokenizer="-", device="cpu"))
        result_or_own_error(lambda: base.network_settings)
        result_or_own_error(lambda: check_text_encoder_file(path))
        result_or_own_error(lambda: check_vae(base))
        result_or_own_error(lambda: read_all(path))


def read_all(path: Path) -> None:
    source = open_weights(path, tuple(filter(None, PREFIXES)))
    with source.opened() as read:
        for name in source.shapes:
            weight = read(name)
            if not weight.nf4:
                assert weight.dequantise(torch.float32).numel() == math.prod(source.shapes[name])


@given(stored_tensors, headers)
def test_any_names_shapes_types_and_formats(stored: dict[str, Tensor], header: str | None) -> None:
    open_as_each_part(save(stored, None if header is None else {"_quantization_metadata": header}))


WHOLE = save({name: torch.ones(16, 16) for name in MARKS[:6]}, {"format": "pt"})


@given(st.integers(0, len(WHOLE)), st.binary(max_size=4), st.integers(0, 400))
def test_files_cut_short_or_with_other_bytes(cut: int, other: bytes, place: int) -> None:
    open_as_each_part(WHOLE[:cut])
    open_as_each_part(WHOLE[:place] + other + WHOLE[place + len(other) :])
    open_as_each_part(other + WHOLE[cut:])


@given(st.binary(max_size=60), st.integers(0, 2**64 - 1), json_values)
def test_headers_of_any_content(begin: bytes, length: int, content: object) -> None:
    text = json.dumps(content).encode()
    open_as_each_part(begin)
    open_as_each_part(length.to_bytes(8, "little") + text)
    open_as_each_part(len(text).to_bytes(8, "little") + text)


def whole_gguf() -> bytes:
    from gguf import GGUFWriter

    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = GGUFWriter(path, "qwen_image")
        for name in MARKS[:6]:
            writer.add_tensor(name, np.ones((16, 16), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


GGUF = whole_gguf()


@given(st.integers(0, len(GGUF)), st.binary(max_size=9), st.integers(0, 700))
def test_gguf_cut_short_or_with_other_bytes(cut: int, other: bytes, place: int) -> None:
    open_as_each_part(GGUF[:cut], ".gguf")
    open_as_each_part(GGUF[:place] + other + GGUF[place + len(other) :], ".gguf")
