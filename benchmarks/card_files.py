"""Writes a Qwen-Image-Edit in ComfyUI's file layouts with random weights, for `benchmarks.cards`.

    python -m benchmarks.card_files FOLDER [--layers 1] [--text-encoder fp8|bf16] [--device cuda]

Names, shapes and types are those of the files that ComfyUI's edit templates download: the transformer in plain fp8, the
text encoder in scaled fp8 or bf16, the VAE in bf16 with Wan's names. Weights are drawn on the device, one at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.card_probe import fewer_layers
from tools.comfyui import comfyui_dir

TRANSFORMER = "diffusion_models/qwen_image_edit_2509_fp8_e4m3fn.safetensors"
TEXT_ENCODERS = {
    "fp8": "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "bf16": "text_encoders/qwen_2.5_vl_7b.safetensors",
}
VAE = "vae/qwen_image_vae.safetensors"
WHOLE_TRANSFORMER, WHOLE_VAE = 60, 96  # blocks, channels of the first layer
_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
_FP8_MAX = 448.0

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type by name


def transformer_layout(layers: int) -> Layout:
    """The tensors of the transformer: all in fp8, without scales."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        network = QwenImageTransformer2DModel(num_layers=layers or WHOLE_TRANSFORMER)
    return {name: (tuple(each.shape), torch.float8_e4m3fn) for name, each in network.named_parameters()}


def text_encoder_layout(kind: str, layers: int) -> Layout:
    """The tensors of the text encoder: scaled fp8 for linear layers and bf16 for all others, or bf16 for all."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from trainer_core.qwen_image import text_encoder_file

    if layers:
        fewer_layers(layers)[".qwen_image.text_encoder_file"](text_encoder_file)
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**text_encoder_file.qwen25_vl_7b()))
    network.lm_head = nn.Identity()
    layout: Layout = {"scaled_fp8": ((0,), torch.float8_e4m3fn)} if kind == "fp8" else {}
    for module_name, module in network.named_modules():
        name = module_name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        for part, parameter in module.named_parameters(recurse=False):
            scaled = kind == "fp8" and part == "weight" and isinstance(module, nn.Linear)
            layout[f"{name}.{part}"] = (tuple(parameter.shape), torch.float8_e4m3fn if scaled else torch.bfloat16)
            if scaled:
                layout[f"{name}.scale_weight"] = ((), torch.float32)
    return layout


def vae_layout(width: int) -> Layout:
    """The tensors of the VAE, with Wan's names, from ComfyUI's own class."""
    sys.path.insert(0, str(comfyui_dir()))
    from comfy.cli_args import args  # type: ignore[import-not-found]

    args.cpu = True  # ComfyUI starts no device then
    from comfy.ldm.wan.vae import WanVAE  # type: ignore[import-not-found]

    with torch.device("meta"):
        network = WanVAE(
            dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0,
            temperal_downsample=[False, True, True],
        )  # fmt: skip
    return {name: (tuple(each.shape), torch.bfloat16) for name, each in network.state_dict().items()}


def tensors_of(layout: Layout, device: torch.device) -> Iterator[Tensor]:
    """Random tensors in the layout's order, on a scale that keeps activations in range."""
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.zeros(())
    for name, (shape, dtype) in layout.items():
        if name.endswith(".scale_weight"):
            yield scale  # the weight came just before it
            continue
        drawn = torch.randn(shape, generator=generator, device=device)
        if drawn.ndim > 1:
            drawn /= drawn[0].numel() ** 0.5
        else:
            is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            drawn = drawn * 0.1 + is_gain
        if name.removesuffix(".weight") + ".scale_weight" in layout:
            scale = (drawn.abs().max() / _FP8_MAX).cpu()
            drawn = drawn / scale.to(device)
        yield drawn.to(dtype)


def write(path: Path, layout: Layout, device: torch.device) -> None:
    """Write a .safetensors file tensor by tensor, under a temporary name until it is complete."""
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors_of(layout, device):
            file.write(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    unfinished.replace(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="layers of each network, for a small trial; default: all")
    parser.add_argument("--text-encoder", choices=list(TEXT_ENCODERS), default="fp8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    made = {
        TRANSFORMER: lambda: transformer_layout(given.layers),
        TEXT_ENCODERS[given.text_encoder]: lambda: text_encoder_layout(given.text_encoder, given.layers),
        VAE: lambda: vae_layout(8 if given.layers else WHOLE_VAE),
    }
    for name, layout in made.items():
        path, start = given.folder / name, time.perf_counter()
        if path.is_file():
            continue
        write(path, layout(), torch.device(given.device))
        print(f"{path} {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
