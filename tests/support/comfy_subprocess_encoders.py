"""Inside ComfyUI: its two Qwen edit nodes with its own tokenizer and a narrow version of its Qwen2.5-VL.

Input: pictures [1, H, W, 3] as `picture.<name>`, the narrow network's weights as `weights.<name>`, and cases (node
name, prompt, picture names). Output for each case: the tokens, the inputs of the vision tower and the VAE, and the
embeddings.
"""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy.text_encoders import llama, qwen_image, qwen_vl
from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus
from comfy_subprocess_weights import vae_weights
from comfyui_version import __version__
from torch import Tensor

IMAGE_PAD = 151655
VAE_WIDTH = 8
# transformers and ComfyUI 0.33 restore the row and column order of the vision tokens after the windowed attention.
# ComfyUI 0.3.75 leaves them in window order.
RESTORES_ORDER = "argsort" in inspect.getsource(qwen_vl.Qwen2VLVisionTransformer.forward)


def build_narrow(config: dict[str, Any], weights: dict[str, Tensor]) -> qwen_image.QwenImageTEModel:
    """ComfyUI's text encoder with these weights and the sizes of a transformers configuration."""
    text, vision = config["text_config"], config["vision_config"]
    fields = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ]

    class Narrow(llama.Qwen25_7BVLI_Config):
        head_dim = text["hidden_size"] // text["num_attention_heads"]
        rope_dims = text["rope_scaling"]["mrope_section"]

    class NarrowVision(qwen_vl.Qwen2VLVisionTransformer):
        def __init__(self, hidden_size: int = 0, output_hidden_size: int = 0, **others: Any) -> None:
            super().__init__(
                hidden_size=vision["hidden_size"],
                output_hidden_size=vision["out_hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_heads=vision["num_heads"],
                num_layers=vision["depth"],
                window_size=vision["window_size"],
                **others,
            )
            self.fullatt_block_indexes = vision["fullatt_block_indexes"]
            self.restores_order = True

        def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
            tokens = super().forward(pixel_values, image_grid_thw)
            if RESTORES_ORDER or not self.restores_order:
                return tokens
            return tokens[torch.argsort(self.get_window_index(image_grid_thw)[0])]

    llama.Qwen25_7BVLI_Config = lambda **_: Narrow(**{field: text[field] for field in fields})
    llama.qwen_vl.Qwen2VLVisionTransformer = NarrowVision
    encoder = qwen_image.QwenImageTEModel(device="cpu", dtype=torch.float32)
    encoder.qwen25_7b.transformer.load_state_dict(weights, strict=True)
    return encoder


class NarrowClip:
    """The CLIP methods that a node calls, with ComfyUI's tokenizer and a narrow text encoder; records their inputs."""

    def __init__(self, encoder: qwen_image.QwenImageTEModel) -> None:
        self.tokenizer = qwen_image.QwenImageTokenizer()
        self.encoder = encoder
        self.tokens: list[Any] = []
        self.images: list[Tensor] = []

    def tokenize(self, text: str, images: list[Tensor], **options: Any) -> dict[str, Any]:
        """Like comfy.sd.CLIP.tokenize."""
        self.images = images
        tokens = self.tokenizer.tokenize_with_weights(text, images=images, **options)
        self.tokens = tokens["qwen25_7b"][0]
        return tokens

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> list[Any]:
        """Like comfy.sd.CLIP.encode_from_tokens_scheduled, without schedules."""
        embeds, _, extra = self.encoder.encode_token_weights(tokens)
        assert "attention_mask" not in extra
        return [[embeds, {}]]


class RecordingVae(comfy.sd.VAE):
    """A narrow VAE that crops as ComfyUI does, and returns the pixels for the network in place of latents."""

    def __init__(self) -> None:
        super().__init__(sd=vae_weights(VAE_WIDTH))

    def encode(self, pixels: Tensor) -> Tensor:
        """The cropped pixels [B, H, W, 3] that the network would get."""
        return self.vae_encode_crop_pixels(pixels)


def encode(
    case: dict[str, Any], pictures: dict[str, Tensor], clip: NarrowClip, vae: RecordingVae
) -> tuple[dict[str, Tensor], Any]:
    """Execute a case's node; returns its tensors and token ids (IMAGE_PAD for each image)."""
    if case["node"] == "TextEncodeQwenImageEdit":
        chosen = {"image": pictures[case["pictures"][0]]} if case["pictures"] else {}
        output = TextEncodeQwenImageEdit.execute(clip, case["prompt"], vae, **chosen)
    else:
        chosen = {f"image{slot + 1}": pictures[name] for slot, name in enumerate(case["pictures"])}
        output = TextEncodeQwenImageEditPlus.execute(clip, case["prompt"], vae, **chosen)
    embeds, options = output.args[0][0]
    tensors = {"embeds": embeds}
    for number, pixels in enumerate(options.get("reference_latents", [])):
        tensors[f"reference.{number}"] = pixels
    for number, image in enumerate(clip.images):
        tensors[f"patches.{number}"], tensors[f"grid.{number}"] = qwen_vl.process_qwen2vl_images(image)
    if clip.images:
        vision = clip.encoder.qwen25_7b.transformer.visual
        patches, grid = tensors["patches.0"], tensors["grid.0"]
        tensors["tokens_restored"], vision.restores_order = vision(patches, grid), False
        tensors["tokens_as_they_are"], vision.restores_order = vision(patches, grid), True
        tensors["window_order"] = vision.get_window_index(grid)[0]
    return tensors, [int(token) if isinstance(token, numbers.Integral) else IMAGE_PAD for token, *_ in clip.tokens]


def sizes_of(originals: list[list[int]], *, in_graph: bool = False) -> list[Any]:
    """For each picture size, the sizes [width, height] the nodes scale to: v1, plus (vision), plus (reference).

    With `in_graph`, FluxKontextImageScale comes first, as in ComfyUI's templates, and the size it scales to is listed
    first.
    """
    from comfy_extras.nodes_flux import FluxKontextImageScale  # here, because it imports another package named utils

    asked: list[list[int]] = []

    def record(samples: Tensor, width: int, height: int, *_: object) -> Tensor:
        asked.append([width, height])
        return samples

    class SilentClip:
        def tokenize(self, *_: object, **__: object) -> None: ...

        def encode_from_tokens_scheduled(self, _: object) -> list[Any]:
            return [[torch.zeros(1), {}]]

    class SilentVae:
        def encode(self, pixels: Tensor) -> Tensor:
            return torch.zeros(1)

    upscale, comfy.utils.common_upscale = comfy.utils.common_upscale, record
    rows = []
    for width, height in originals:
        asked.clear()
        image = torch.zeros(()).expand(1, height, width, 3)
        if in_graph:
            FluxKontextImageScale.execute(image)
            image = torch.zeros(()).expand(1, asked[0][1], asked[0][0], 3)
        TextEncodeQwenImageEdit.execute(SilentClip(), "", SilentVae(), image)
        TextEncodeQwenImageEditPlus.execute(SilentClip(), "", SilentVae(), image)
        rows.append(list(asked))
    comfy.utils.common_upscale = upscale
    return rows


@torch.no_grad()
def main(tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run all cases and compute the sizes of `values["sizes"]`."""
    answer: dict[str, Tensor] = {"nothing": torch.zeros(1)}
    pictures = {name.removeprefix("picture."): each for name, each in tensors.items() if name.startswith("picture.")}
    weights = {name.removeprefix("weights."): each for name, each in tensors.items() if name.startswith("weights.")}
    clip = NarrowClip(build_narrow(values["config"], weights))
    vae, tokens = RecordingVae(), []
    for number, case in enumerate(values["cases"]):
        outcome, ids = encode(case, pictures, clip, vae)
        answer.update({f"{number}.{name}": tensor for name, tensor in outcome.items()})
        tokens.append(ids)
    facts = {"version": __version__, "restores_order": RESTORES_ORDER}
    sizes = {"sizes": sizes_of(values["sizes"]), "in_graph": sizes_of(values["photos"], in_graph=True)}
    return answer, {"tokens": tokens, **sizes, **facts}
