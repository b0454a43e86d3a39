"""Writes transformer files in the layouts that users have, all from the same bfloat16 weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn
GROUP = 256


def random_weights(config: dict) -> Weights:
    """Random bfloat16 weights on the scale of a trained transformer's, the same at each call."""
    with torch.device("meta"):
        empty = QwenImageTransformer2DModel(**config)
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, parameter in empty.named_parameters():
        drawn = torch.empty(parameter.shape).normal_(generator=generator)
        scaled = drawn / parameter.shape[1] ** 0.5 if parameter.ndim > 1 else drawn * 0.1 + ("norm" in name)
        weights[name] = scaled.bfloat16()
    return weights


def config_of(weights: Weights) -> str:
    """The config.json of a transformer with these weights and one block."""
    heads = len(weights["img_in.weight"]) // 128
    return json.dumps({"_class_name": "QwenImageTransformer2DModel", "num_layers": 1, "num_attention_heads": heads})


def matrices(weights: Weights) -> Weights:
    """The weights that such files quantise: the blocks' matrices, by layer name."""
    found = {name: each for name, each in weights.items() if name.startswith("transformer_blocks.") and each.ndim == 2}
    return {name.removesuffix(".weight"): each for name, each in found.items()}


def rest(weights: Weights) -> Weights:
    """All weights that are not in `matrices`, by tensor name."""
    return {name: each for name, each in weights.items() if name.removesuffix(".weight") not in matrices(weights)}


def as_bytes(values: dict) -> Tensor:
    """JSON as a uint8 tensor, as in the `comfy_quant` entries of the newer layout."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def scaled_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes and one scale for the whole tensor."""
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).to(E4M3), scale


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes and one scale per row [out, 1]."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def rotated(weight: Tensor) -> Tensor:
    """Multiply each group of 256 columns by the Hadamard matrix, built from its published 4 x 4 seed matrix."""
    seed = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).float() / 2
    matrix = torch.kron(torch.kron(seed, seed), torch.kron(seed, seed))
    return (weight.float().view(len(weight), -1, GROUP) @ matrix.T).flatten(1)


def bf16(weights: Weights, path: Path) -> Path:
    save_file(weights, path)
    return path


def prefixed(weights: Weights, path: Path) -> Path:
    """fp16 weights with a full checkpoint's prefix, and a tensor of another part."""
    renamed = {f"model.diffusion_model.{name}": each.half() for name, each in weights.items()}
    save_file({**renamed, "first_stage_model.x": torch.zeros(1)}, path)
    return path


def plain_fp8(weights: Weights, path: Path) -> Path:
    save_file({name: each.to(E4M3) for name, each in weights.items()}, path)
    return path


def older_fp8(weights: Weights, path: Path) -> Path:
    """Quantises every linear layer: ComfyUI rounds all of such a file to fp8, biases without a scale."""
    tensors = {"scaled_fp8": torch.empty(2, dtype=E4M3)}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if weight.ndim == 2:
            tensors[name], tensors[f"{layer}.scale_weight"] = scaled_fp8(weight)
        else:
            tensors[name] = weight.to(E4M3).bfloat16() if kind == "bias" else weight
    save_file(tensors, path)
    return path


def header_fp8(weights: Weights, path: Path) -> Path:
    tensors = rest(weights)
    for layer, weight in matrices(weights).items():
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"] = scaled_fp8(weight)
    layers = {layer: {"format": "float8_e4m3fn"} for layer in matrices(weights)}
    note = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, path, metadata={"_quantization_metadata": note})
    return path


def newer(
    weights: Weights, path: Path, codes: Callable[[Tensor], tuple[Tensor, Tensor]], note: dict[str, object]
) -> Path:
    """The newer layout: a `comfy_quant` entry for each quantised layer."""
    tensors = rest(weights)
    for layer, weight in matrices(weights).items():
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"] = codes(weight)
        tensors[f"{layer}.comfy_quant"] = as_bytes(note)
    save_file(tensors, path)
    return path


def entry_fp8(weights: Weights, path: Path) -> Path:
    return newer(weights, path, scaled_fp8, {"format": "float8_e4m3fn"})


def int8(weights: Weights, path: Path) -> Path:
    return newer(weights, path, int8_rows, {"format": "int8_tensorwise", "per_row": True})


def rotated_int8(weights: Weights, path: Path) -> Path:
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
    return newer(weights, path, lambda weight: int8_rows(rotated(weight)), note)


def gguf(weights: Weights, path: Path, kind_of_matrices: str = "Q8_0") -> Path:
    """GGUF: the blocks' matrices in the given type, all other weights in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    path = path.with_suffix(".gguf")
    writer = GGUFWriter(path, "qwen_image")
    chosen = matrices(weights)
    for name, weight in weights.items():
        values = weight.float().numpy()
        kind = GGMLQuantizationType[kind_of_matrices if name.removesuffix(".weight") in chosen else "F32"]
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parts(weights: Weights, path: Path) -> Path:
    """A folder in diffusers' layout, with the weights in two files."""
    path = path.with_suffix("")
    path.mkdir()
    (path / "config.json").write_text(config_of(weights))
    names, index = list(weights), {}
    for number, half in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, path / file)
        index |= dict.fromkeys(half, file)
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def nf4(weights: Weights, path: Path) -> Path:
    """A folder as diffusers saves a transformer quantised to NF4 by bitsandbytes."""
    from bitsandbytes.functional import quantize_4bit

    path = path.with_suffix("")
    path.mkdir()
    (path / "config.json").write_text(config_of(weights))
    tensors = rest(weights)
    for layer, weight in matrices(weights).items():
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors[f"{layer}.weight"] = codes
        tensors |= {f"{layer}.weight.{key}": each for key, each in state.as_dict(packed=True).items()}
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    return path
