"""Pre-train the embedded demo model: python -m tools.pretrain_demo --out DIR --tokenizer DIR --device cuda."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer_core.demo.text_encoder import build_text_encoder
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.qwen_image.folder import DEMO_FOLDER
from trainer_core.qwen_image.prompt import load_tokenizer

from .. import demo_pairs
from . import transformer as transformer_part
from . import vae as vae_part
from .conditions import PromptEncoder
from .instructions import INSTRUCTIONS
from .pictures import PictureSource

TEXT_ENCODER = DEMO_FOLDER / "text_encoder"
NUM_HELD_OUT, NUM_STEPS = 24, 20
TWICE = (
    "astronaut.png",
    "coffee.png",
    "grace_hopper.jpg",
    "motorcycle_left.png",
    "ihc.png",
)  # drawn twice as often, because colourful photographs are rare
_LOG = logging.getLogger(__name__)


def main() -> None:
    """Train the VAE and the transformer, then measure them on photographs that were not trained on."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    names = [*demo_pairs.PRETRAINING_PHOTOGRAPHS, *TWICE]
    photographs = [demo_pairs.photograph(name) for name in names]
    photographs += [Image.open(path).convert("RGB") for path in options.photograph]
    held_out = held_out_pictures().to(device)
    options.out.mkdir(parents=True, exist_ok=True)
    source = PictureSource(photographs, device, seed=1)
    save_grid(source.batch(32, 128, 128), options.out / "trained_on.png")
    torch.manual_seed(0)
    vae = begin(vae_part.new_vae(), options.resume, "vae").to(device)
    vae = vae_part.train_vae(vae, source, held_out, seconds=options.minutes_vae * 60, batch=options.batch_vae)
    save(vae, options.out / "vae")
    save_grid(vae_part.decode(vae, vae_part.encode(vae, held_out[:16])[0]), options.out / "vae.png")
    prompts = PromptEncoder(build_text_encoder(TEXT_ENCODER).to(device), load_tokenizer(options.tokenizer))
    torch.manual_seed(1)
    transformer = begin(transformer_part.new_transformer(), options.resume, "transformer").to(device)
    networks = transformer_part.Networks(transformer, vae, prompts)
    source = PictureSource(photographs, device, seed=2)
    transformer_part.train_transformer(
        networks, source, seconds=options.minutes_transformer * 60, batch=options.batch_transformer
    )
    save(networks.transformer, options.out / "transformer")
    figures = measure(networks, held_out, options.out)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2.5's vocab.json and merges.txt")
    parser.add_argument("--photograph", type=Path, action="append", default=[], help="an additional training picture")
    parser.add_argument("--resume", type=Path, help="output folder of an earlier run to resume")
    parser.add_argument("--minutes-vae", type=float, default=4.0)
    parser.add_argument("--minutes-transformer", type=float, default=5.0)
    parser.add_argument("--batch-vae", type=int, default=48)
    parser.add_argument("--batch-transformer", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def held_out_pictures() -> Tensor:
    """Tiles [B, 3, 128, 128] in 0..1 of the demo's photographs."""
    tiles = [tile.resize((128, 128)) for _, tile in demo_pairs.demo_tiles(NUM_HELD_OUT)]
    return torch.stack([torch.from_numpy(np.array(tile)) for tile in tiles]).permute(0, 3, 1, 2) / 255


def begin(network: torch.nn.Module, resume: Path | None, part: str) -> torch.nn.Module:
    """Load an earlier run's weights into the network, if `resume` is given."""
    if resume is not None:
        weights = load_file(resume / part / "diffusion_pytorch_model.safetensors")
        network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return network


def save(network: torch.nn.Module, folder: Path) -> None:
    """Save a network in diffusers' layout, in fp16. The network itself is not changed."""
    weights = {name: weight.half().contiguous() for name, weight in network.state_dict().items()}
    network.save_config(folder)  # type: ignore[operator]
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def measure(networks: transformer_part.Networks, held_out: Tensor, out: Path) -> dict[str, float]:
    """PSNR (dB) against the exact edit, per instruction and flavour, and the PSNR that the VAE alone reaches."""
    figures = {
        "vae": vae_part.psnr(_through(networks, held_out), held_out),
        "vae negatives": vae_part.psnr(_through(networks, 1 - held_out), 1 - held_out),
    }
    shown = [held_out[:12]]
    for instruction in INSTRUCTIONS:
        target = instruction.edit(held_out)
        for flavour in list(FLAVOURS.values())[: None if instruction.name in ("copy", "mirror", "grey") else 1]:
            captions = [instruction.phrasings[0]] * len(held_out)
            result = transformer_part.sample(networks, flavour, captions, [held_out], NUM_STEPS)
            figures[f"{instruction.name} {flavour.name}"] = vae_part.psnr(result, target)
            shown += [result[:12]] if flavour.name == "edit-v1" else []
        figures[f"{instruction.name} vae"] = vae_part.psnr(_through(networks, target), target)
    references = [held_out, held_out.roll(3, 0)]
    for number in (1, 2):
        captions = [f"show picture {number}"] * len(held_out)
        result = transformer_part.sample(networks, FLAVOURS["edit-v2"], captions, references, NUM_STEPS)
        figures[f"show picture {number} of 2"] = vae_part.psnr(result, references[number - 1])
    captions = [demo_pairs.CAPTION] * len(held_out)
    result = transformer_part.sample(networks, FLAVOURS["edit-v1"], captions, [held_out], NUM_STEPS)
    figures["demo edit, untrained"] = vae_part.psnr(result, 1 - held_out)
    save_grid(torch.cat([*shown, result[:12]]), out / "base.png", columns=12)
    for name, value in figures.items():
        _LOG.info("%-24s %6.2f dB", name, value)
    return figures


def _through(networks: transformer_part.Networks, pictures: Tensor) -> Tensor:
    return transformer_part.pictures_of(networks.vae, transformer_part.latents_of(networks.vae, pictures))


def save_grid(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Save pictures [B, 3, H, W] as a grid; an incomplete last row is left out."""
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns) if len(row) == columns]
    pixels = (torch.cat(rows, dim=1).float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    main()
