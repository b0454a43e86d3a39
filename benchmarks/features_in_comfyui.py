"""Checks the files of `benchmarks.features --keep FOLDER`: `python -m benchmarks.features_in_comfyui FOLDER`.

ComfyUI's own loader applies every file to the demo's transformer. The table shows how many layers changed, and how far
ComfyUI's velocity is from the trainer's, relative to what the file changes. Complaints in ComfyUI's log are counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from tests.support.comfy_subprocess import run_in_comfyui
from tools.comfyui import comfyui_dir
from trainer_core.adapters.inject import load_into
from trainer_core.config import DEMO_MODEL, ModelConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.folder import DEMO_FOLDER
from trainer_core.qwen_image.latents import denormalise
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

CASE = {"name": "one", "references": 1, "method": "index"}
SIDE = 16  # side of the latents, for pictures of 128 pixels


def inputs(width: int) -> tuple[Tensor, Tensor, Condition]:
    """Random noisy latents, sigma and condition."""
    generator = stream(0, "features in comfyui")
    latents, reference = (torch.randn(1, 16, SIDE, SIDE, generator=generator) for _ in range(2))
    return latents, torch.tensor([0.6]), Condition((reference,), torch.randn(1, 9, width, generator=generator))


@torch.no_grad()
def ours(file: Path | None) -> Tensor:
    """The velocity that the trainer predicts, with the LoRA file if given."""
    tokenizer = str(comfyui_dir() / "comfy/text_encoders/qwen25_tokenizer")
    model = ModelConfig(base=DEMO_MODEL, tokenizer=tokenizer, mixed_precision="no")
    transformer = load_transformer(BaseModel(model), torch.device("cpu"))
    if file is not None:
        load_into(transformer, file)
    return predict_velocity(transformer, *inputs(transformer.config.joint_attention_dim))


def theirs(files: list[Path], work: Path) -> tuple[dict[str, Tensor], dict[str, list[str]], list[str]]:
    """ComfyUI's velocities by file, the layers that it changed by file, and its log."""
    config = json.loads((DEMO_FOLDER / "transformer/config.json").read_text(encoding="utf-8"))
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config  # ComfyUI's constants
    names = ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    latents, sigma, condition = inputs(config["joint_attention_dim"])
    reference = denormalise(condition.reference_latents[0], vae.latents_mean, vae.latents_std)
    tensors = {"latents": latents, "sigma": sigma, "prompt": condition.prompt_embeds, "reference.0": reference}
    question = {
        "model_file": str(DEMO_FOLDER / "transformer/diffusion_pytorch_model.safetensors"),
        "lora_files": {file.stem: str(file.absolute()) for file in files},
        "narrow": {name: config[name] for name in names},
        "cases": [CASE],
    }
    named = {f"one.{name}": tensor for name, tensor in tensors.items()}
    answer = run_in_comfyui(comfyui_dir(), "comfy_subprocess_lora.py", work, named, question)
    return answer.tensors, answer.values["layers"], answer.log


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args().folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    with tempfile.TemporaryDirectory() as work:
        velocities, layers, log = theirs(files, Path(work))
    complaints = sum("not loaded" in line.lower() or "error" in line.lower() for line in log)
    base = ours(None)
    print(f"{len(files)} files, {complaints} complaints in ComfyUI's log\n")
    print("| row | layers changed in ComfyUI | difference |\n| --- | --- | --- |")
    for file in files:
        found, wanted = velocities[f"{file.stem}.one"], ours(file)
        difference = float((found - wanted).norm() / (wanted - base).norm())
        print(f"| {file.stem} | {len(layers[file.stem])} | {difference:.1e} |")


if __name__ == "__main__":
    main()
