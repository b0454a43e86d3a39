"""Inside ComfyUI: Encode Edit Pairs with ComfyUI's CLIP and VAE, compared with ComfyUI's own Qwen edit nodes.

CLIP and VAE are narrow versions of ComfyUI's classes. Input: the narrow text encoder's weights, and cases with a base
model, its flavour, dataset folders, reference pictures and a caption.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from comfy.cli_args import args

args.use_pytorch_cross_attention = True  # as on cards; ComfyUI's own attention on CPUs needs 1 GB for a picture

import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy_subprocess_encoders
import comfy_subprocess_host
import comfy_subprocess_lora
import comfy_subprocess_weights
import numpy as np
import torch
from comfy.text_encoders import qwen_image
from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod
from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus
from comfy_subprocess_lora import SUPPORTS_TIMESTEP_ZERO
from PIL import Image
from torch import Tensor

VAE_WIDTH = 4


def make_clip(config: dict[str, Any], weights: dict[str, Tensor]) -> comfy.sd.CLIP:
    """A CLIP made by ComfyUI's own constructor, after `build_narrow` has replaced the classes by narrow ones."""
    comfy_subprocess_encoders.build_narrow(config, weights)
    target = types.SimpleNamespace(params={}, clip=qwen_image.QwenImageTEModel, tokenizer=qwen_image.QwenImageTokenizer)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    network = clip.cond_stage_model.qwen25_7b.transformer
    network.load_state_dict(weights, strict=True)
    network.visual.restores_order = False  # uses this ComfyUI's own forward unchanged
    return clip


def encoding_once(vae: comfy.sd.VAE) -> comfy.sd.VAE:
    """The VAE, which now remembers the latents of pictures: each picture of a megapixel takes seconds.

    Pixels that differ in one bit are another picture, so a comparison of latents still compares the pixels.
    """
    encode, known = vae.encode, dict[tuple[torch.Size, bytes], Tensor]()

    def once(pixels: Tensor) -> Tensor:
        key = (pixels.shape, pixels.numpy().tobytes())
        if key not in known:
            known[key] = encode(pixels)
        return known[key].clone()

    vae.encode = once
    return vae


def opened(path: str) -> Tensor:
    """The picture [1, H, W, 3] in 0..1, as LoadImage gives it."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)


@functools.cache
def conditioning_of(
    clip: comfy.sd.CLIP, vae: comfy.sd.VAE, caption: str, references: tuple[str, ...], plus: bool
) -> Any:
    """The CONDITIONING of TextEncodeQwenImageEditPlus or, without `plus`, TextEncodeQwenImageEdit."""
    images = [opened(path) for path in references]
    if not plus:
        return TextEncodeQwenImageEdit.execute(clip, caption, vae, images[0]).args[0]
    named = {f"image{number + 1}": image for number, image in enumerate(images)}
    return TextEncodeQwenImageEditPlus.execute(clip, caption, vae, **named).args[0]


def by_comfyui(case: dict[str, Any], clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, Tensor]:
    """Embeddings and references that ComfyUI's nodes put into CONDITIONING, and the velocity with it.

    The references are normalised for the model. For edit-v3 (2511), ComfyUI's node for the references' method follows.
    There is no velocity if this ComfyUI doesn't know that method.
    """
    plus = case["flavour"] != "edit-v1"
    conditioning = conditioning_of(clip, vae, case["caption"], tuple(case["references"]), plus)
    if case["flavour"] == "edit-v3":
        conditioning = FluxKontextMultiReferenceLatentMethod.execute(conditioning, "index_timestep_zero").args[0]
    embeds, options = conditioning[0]
    process_in = comfy.supported_models.QwenImage.latent_format().process_in
    references = {f"reference.{n}": process_in(each)[0, :, 0] for n, each in enumerate(options["reference_latents"])}
    found = {"embeds": embeds[0], **references}
    if case["flavour"] != "edit-v3" or SUPPORTS_TIMESTEP_ZERO:
        found["velocity"] = velocity_with(case, embeds, options)
    return found


def velocity_with(case: dict[str, Any], embeds: Tensor, options: dict[str, Any]) -> Tensor:
    """Velocity [16, H, W] of the case's transformer with a CONDITIONING, as ComfyUI's sampler calls it."""
    question = {"narrow": case["narrow"], "model_file": case["transformer"]}
    model = comfy_subprocess_lora.load(question).model
    latents, sigma = torch.tensor(case["latents"]).unsqueeze(2), torch.tensor([case["sigma"]])
    conditions = model.extra_conds(noise=latents, device=latents.device, cross_attn=embeds, **options)
    denoised = model.apply_model(latents, sigma, **{name: each.cond for name, each in conditions.items()})
    return ((latents - denoised) / sigma)[0, :, 0]


class Runner:
    """Runs Encode Edit Pairs on the dataset of one case; `small`: on small pictures, of the first reference only."""

    def __init__(self, module: Any, case: dict[str, Any], *, small: bool = False) -> None:
        self.small = small
        self.node = module("nodes.encode").EncodePairs.PREPARE_CLASS_CLONE({})  # as ComfyUI calls a node
        config, pairing = module("trainer_core.config"), module("trainer_core.data.pairing")
        folders = {
            "target_dir": case["target_dir"],
            "reference_dirs": tuple(case["reference_dirs"][: 1 if small else None]),
        }
        self.dataset = pairing.pair_folders(config.DatasetConfig(**folders))
        self.model = config.ModelConfig(base=case["base"], flavour=case["flavour"], mixed_precision="no", device="cpu")

    def __call__(self, preprocessing: str = "comfyui", **sockets: Any) -> Any:
        widgets = {
            "resolution": 96,
            "match_target_res": self.small,
            "num_eval_images": 0,
            "validation_negative_prompt": " ",
            "seed": 0,
        }
        return self.node.execute(self.model, self.dataset, preprocessing=preprocessing, **widgets, **sockets).args[0]

    def stored(self, **sockets: Any) -> dict[str, Tensor]:
        """The cached embeddings and reference latents of the case's first pair."""
        encoded = self(**sockets)
        pair = encoded.load(encoded.pairs[0])
        references = {f"reference.{n}": each for n, each in enumerate(pair.reference_latents)}
        return {"embeds": pair.prompt_embeds, **references}


def keys_of(run: Runner, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, str]:
    """Cache keys [target, prompt] of the first pair for different combinations of networks, by label."""
    both, own, only_clip, only_vae = run(clip=clip, vae=vae), run(), run(clip=clip), run(vae=vae)
    rows = {"both": both, "again": run(clip=clip, vae=vae), "own": own, "only clip": only_clip, "only vae": only_vae}
    weight = clip.cond_stage_model.qwen25_7b.transformer.model.layers[0].mlp.up_proj.weight
    comfy.model_management.unload_all_models()
    weight.data += 0.1
    rows["other clip"] = run(clip=clip, vae=vae)
    weight.data -= 0.1
    return {name: [each.pairs[0].target, each.pairs[0].prompts[0]] for name, each in rows.items()}


def refusals(run: Runner, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, outcome: Any) -> dict[str, str]:
    """Error messages for unsupported networks and combinations, by label."""
    patched = clip.clone()
    key = next(iter(patched.patcher.model.state_dict()))
    patched.add_patches({key: ("diff", (torch.zeros(1),))})
    flat = types.SimpleNamespace(
        patcher=vae.patcher, vae_dtype=torch.float16, encode=lambda _: torch.zeros(1, 16, 12, 12)
    )
    other = clip.clone()
    other.tokenizer = types.SimpleNamespace(tokenize_with_weights=lambda *_, **__: {"l": [], "t5xxl": []})
    other.layer_idx = -2  # another cache key, so that the prompt is encoded again
    return {
        "diffusers": outcome(lambda: run("diffusers", clip=clip)),
        "diffusers, vae": outcome(lambda: run("diffusers", vae=vae)),
        "patched": outcome(lambda: run(clip=patched)),
        "nothing": outcome(lambda: run(clip=None, vae=None)),
        "flat vae": outcome(lambda: run(vae=flat)),
        "other clip": outcome(lambda: run(clip=other)),
    }


@torch.inference_mode()
def main(tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode all cases with both nodes; cache keys and error messages for small pictures of edit-v2."""
    import folder_paths

    module = comfy_subprocess_host.pack(values["repo"])
    folder_paths.set_output_directory(values["output"])
    clip = make_clip(values["config"], tensors)
    vae = encoding_once(comfy.sd.VAE(sd=comfy_subprocess_weights.vae_weights(VAE_WIDTH)))
    answer = {}
    for number, case in enumerate(values["cases"]):
        ours = Runner(module, case).stored(clip=clip, vae=vae)
        theirs = by_comfyui(case, clip, vae)
        answer.update({f"{number}.ours.{name}": tensor for name, tensor in ours.items()})
        answer.update({f"{number}.theirs.{name}": tensor.float().clone() for name, tensor in theirs.items()})
    run = Runner(module, next(case for case in values["cases"] if case["flavour"] == "edit-v2"), small=True)
    facts = {
        "supports_timestep_zero": SUPPORTS_TIMESTEP_ZERO,
        "keys": keys_of(run, clip, vae),
        "refusals": refusals(run, clip, vae, comfy_subprocess_host.outcome),
    }
    return answer, facts
