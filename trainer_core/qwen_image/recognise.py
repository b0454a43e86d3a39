"""Tells by the names of its weights what a file is that was chosen in the wrong place, and what to choose instead."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ..config import FlavourName
from .flavours import FLAVOURS

Part = Literal["transformer", "text_encoder", "vae"]
QWEN_IMAGE = "a Qwen-Image transformer"
# Each kind with parts of names that only it has, in the order in which they are looked for.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora_unet_", ".lokr_w1", ".hada_w1", "lora_te")),
    ("a ControlNet", ("controlnet_blocks.", "controlnet_x_embedder.", "control_model.")),
    ("a text encoder of llama.cpp, in GGUF", ("token_embd.weight", "blk.0.attn_")),
    ("a vision tower of llama.cpp, in GGUF", ("v.blk.0.", "mm.0.weight")),
    ("a text encoder, T5", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("a text encoder, CLIP", ("text_model.encoder.layers.0.",)),
    ("a vision encoder, CLIP or SigLIP", ("vision_model.encoder.layers.0.",)),
    ("a text encoder, Qwen2.5-VL", ("visual.blocks.0.attn.qkv.bias",)),
    ("a text encoder, Qwen3 or Gemma 3", ("layers.0.self_attn.q_norm.",)),
    ("a text encoder", ("layers.0.self_attn.k_proj.",)),
    ("a VAE, that of Qwen-Image or Wan", ("decoder.middle.0.residual.", "decoder.mid_block.resnets.0.norm1.gamma")),
    ("a VAE of Wan 2.2", ("decoder.upsamples.0.upsamples.",)),
    ("a VAE of FLUX or Stable Diffusion", ("decoder.mid.block_1.", "decoder.mid_block.resnets.0.norm1.weight")),
    ("a transformer of FLUX or HunyuanVideo", ("double_blocks.0.", "single_blocks.0.", "single_transformer_blocks.0.")),
    ("a transformer of Stable Diffusion 3", ("joint_blocks.0.",)),
    ("a transformer of Wan", ("blocks.0.cross_attn.", "condition_embedder.")),
    ("a transformer of Lumina or Z-Image", ("noise_refiner.0.", "context_refiner.0.")),
    ("a network of Stable Diffusion or SDXL", ("input_blocks.0.", "down_blocks.0.resnets.0.")),
    (QWEN_IMAGE, ("transformer_blocks.0.img_mod.1.", "transformer_blocks.0.txt_mlp.")),
    ("a transformer of another model", ("transformer_blocks.0.attn.add_k_proj.",)),
)
LAYERED_MARKS = ("__layered__", "time_text_embed.addition_t_embedding.weight")


@dataclass(frozen=True, slots=True)
class Download:
    """A file of ComfyUI's edit templates. `folder` is below ComfyUI's models folder, `gigabytes` are 10^9 bytes."""

    name: str
    folder: str
    repository: str
    gigabytes: float

    @property
    def url(self) -> str:
        """Where the file is downloaded from."""
        return f"https://huggingface.co/Comfy-Org/{self.repository}/resolve/main/split_files/{self.folder}/{self.name}"


_EDIT, _IMAGE = "Qwen-Image-Edit_ComfyUI", "Qwen-Image_ComfyUI"
_DOWNLOADS = {
    each.name: each
    for each in (  # the best of each folder first
        Download("qwen_image_edit_2511_bf16.safetensors", "diffusion_models", _EDIT, 40.9),
        Download("qwen_image_edit_2511_fp8mixed.safetensors", "diffusion_models", _EDIT, 20.5),
        Download("qwen_image_edit_2511_int8_convrot.safetensors", "diffusion_models", _EDIT, 20.5),
        Download("qwen_image_edit_2509_bf16.safetensors", "diffusion_models", _EDIT, 40.9),
        Download("qwen_image_edit_2509_fp8mixed.safetensors", "diffusion_models", _EDIT, 20.5),
        Download("qwen_image_edit_2509_fp8_e4m3fn.safetensors", "diffusion_models", _EDIT, 20.4),
        Download("qwen_image_edit_bf16.safetensors", "diffusion_models", _EDIT, 40.9),
        Download("qwen_image_edit_fp8_e4m3fn.safetensors", "diffusion_models", _EDIT, 20.4),
        Download("qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders", _IMAGE, 9.4),
        Download("qwen_2.5_vl_7b.safetensors", "text_encoders", _IMAGE, 16.6),
        Download("qwen_image_vae.safetensors", "vae", _IMAGE, 0.3),
    )
}


def download(name: str) -> Download:
    """The file of ComfyUI's templates with this name.

    Raises:
        KeyError: there is none.
    """
    return _DOWNLOADS[name]


def template_files(folder: str) -> tuple[str, ...]:
    """Names of the files in a folder below ComfyUI's models folder that its edit templates use, best first."""
    return tuple(name for name, each in _DOWNLOADS.items() if each.folder == folder)


def how_to_get(name: str) -> str:
    """A sentence on where to get a file of ComfyUI's templates and where to put it; empty if it is none of these."""
    if name not in _DOWNLOADS:
        return ""
    file = download(name)
    return f"Download it ({file.gigabytes:g} GB) from {file.url} and put it into ComfyUI's folder models/{file.folder}."


def looks_like(names: Collection[str]) -> str:
    """A guess at what kind of file has weights of these names; empty if there is none."""
    for kind, marks in _KINDS:
        if any(mark in name for name in names for mark in marks):
            return kind
    return "a VAE" if any(name.startswith(("decoder.", "encoder.")) for name in names) else ""


def wrong_kind(name: str, wanted: str, lacks: str, names: Collection[str]) -> str:
    """The beginning of a sentence on a file that is not the `wanted` kind, because it has no weight `lacks`."""
    kind = looks_like(names)
    return f"{name} is not {wanted}: it has no {lacks}{kind and f'; it looks like {kind}'}."


def instead_of(part: Part, flavour: FlavourName = "edit-v2") -> str:
    """What to choose for a part of the model, by the names of the files in ComfyUI's templates."""
    if part != "transformer":
        folder = "text_encoders" if part == "text_encoder" else part
        return f"Choose {' or '.join(template_files(folder))} from models/{folder}."
    row = FLAVOURS[flavour]
    return f"Choose {row.comfyui_file} from models/diffusion_models, or the download {row.released_as}."


def doubts_by_name(name: str) -> str:
    """A note if a transformer file's name says that it should not be trained on; empty otherwise.

    The weights of these models have the same names and shapes as the edit models', so only the name tells.
    """
    plain = name.lower().replace("-", "_")
    if "qwen" in plain and "image" in plain and "edit" not in plain:
        return (
            f"The name of {name} says Qwen-Image without Edit. The text-to-image model has the same layout, so the "
            "content doesn't tell, but a LoRA for edits must be trained on an edit model."
        )
    if any(word in plain for word in ("lightning", "rapid", "turbo", "distill", "4step", "8step")):
        return (
            f"The name of {name} says that it is distilled to few steps. A LoRA trained on it may not fit other "
            "models. Train on the original model, and load a Lightning LoRA beside yours to generate in few steps."
        )
    return ""
