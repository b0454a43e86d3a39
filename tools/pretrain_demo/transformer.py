"""Part two of the pre-training: a narrow QwenImageTransformer2DModel for all three flavours."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from trainer_core.qwen_image.flavours import FLAVOURS, Flavour
from trainer_core.qwen_image.latents import denormalise, normalise, pack, token_shape, unpack

from . import vae as vae_part
from .averaging import RunningAverage
from .conditions import PromptEncoder
from .instructions import INSTRUCTIONS, NAMED_REFERENCE
from .pictures import PictureSource

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
PEAK_RATE, WARM_UP, LAST_RATE = 1.2e-3, 300, 0.01
SHIFT, UNIFORM_SHARE = 1.73, 0.3
SIZES = ((128, 128), (128, 128), (128, 128), (96, 160), (160, 96), (96, 96), (160, 160), (192, 128), (128, 192))
FLAVOUR_SHARES = (("edit-v1", 0.6), ("edit-v2", 0.17), ("edit-v3", 0.23))
LIVE_BLOCKS, USES, SEEN = 6, 8, 16  # blocks of pairs in use at once, steps per block, vision-encoded pictures per block
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks for training and sampling."""

    transformer: QwenImageTransformer2DModel
    vae: AutoencoderKLQwenImage
    prompts: PromptEncoder


def new_transformer() -> QwenImageTransformer2DModel:
    """An untrained network that predicts zero."""
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(**CONFIG)
    for block in transformer.transformer_blocks:
        for part in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
            part.bias.data.view(6, -1)[2::3] = 0.3  # gates
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def set_flavour(transformer: QwenImageTransformer2DModel, flavour: Flavour) -> None:
    """Set whether references are modulated at timestep zero, as the flavour needs it."""
    transformer.zero_cond_t = flavour.zero_cond_t
    for block in transformer.transformer_blocks:
        block.zero_cond_t = flavour.zero_cond_t


@torch.no_grad()
def latents_of(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """Normalised latents of pictures [B, 3, H, W]."""
    return normalise(vae_part.encode(vae, pictures)[0], vae.config.latents_mean, vae.config.latents_std)


@torch.no_grad()
def pictures_of(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] of normalised latents."""
    raw = denormalise(latents.float(), vae.config.latents_mean, vae.config.latents_std)
    return vae_part.decode(vae, raw).clamp(0, 1)


@dataclass(slots=True)
class Block:
    """Encoded pairs of one shape and flavour, all [N, ...]. Several steps draw from it: encoding is expensive."""

    flavour: Flavour
    captions: list[str]
    references: tuple[Tensor, ...]
    target: Tensor
    seen: Tensor
    grids: list[Tensor]
    uses: int


def train_transformer(
    networks: Networks, source: PictureSource, *, seconds: float, batch: int
) -> QwenImageTransformer2DModel:
    """Train `networks.transformer` for `seconds`. It ends with the averaged weights."""
    transformer = networks.transformer
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    average = RunningAverage(transformer, 0.999)
    chooser = random.Random(0)
    blocks: list[Block | None] = [None] * LIVE_BLOCKS
    start, step, elapsed = time.monotonic(), 0, 0.0
    while elapsed < seconds:
        rate = min(1.0, (step + 1) / WARM_UP) * max(LAST_RATE, math.cos(elapsed / seconds * math.pi / 2) ** 2)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        with torch.autocast(source.device.type, torch.bfloat16, enabled=source.device.type == "cuda"):
            block = blocks[step % LIVE_BLOCKS]
            if block is None or block.uses == 0:
                block = blocks[step % LIVE_BLOCKS] = _new_block(networks, source, chooser, batch)
            loss = _loss(networks, source, chooser, block)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(transformer)
        if step % 250 == 0:
            _LOG.info("transformer step %d loss %.4f at %.0f s", step, loss.item(), elapsed)
        step, elapsed = step + 1, time.monotonic() - start
    _LOG.info("transformer: %d steps, batch %d", step, batch)
    average.copy_to(transformer)
    return transformer.requires_grad_(False).eval()  # noqa: FBT003


@torch.no_grad()
def _new_block(networks: Networks, source: PictureSource, chooser: random.Random, batch: int) -> Block:
    """Draw pictures, apply edits, and encode both.

    The vision tower encodes only SEEN pictures per block, and each pair gets the tokens of any of them. Its weights are
    random, so the transformer need not learn from its features, only get used to them.
    """
    flavour = FLAVOURS[chooser.choices(*zip(*FLAVOUR_SHARES, strict=True))[0]]  # type: ignore[arg-type]
    num_references = chooser.choice((1, 1, 2, 3)) if flavour.max_references > 1 else 1
    height, width = chooser.choice(SIZES)
    size = max(8, batch * 128 * 128 // (height * width) // (1 if flavour.max_references == 1 else 1 + num_references))
    pairs = size * USES // 2
    pictures = [source.batch(pairs, height, width) for _ in range(num_references)]
    pictures = [picture[torch.randperm(pairs, device=source.device)] for picture in pictures]
    target, captions = edited(pictures, chooser)
    views = [networks.prompts.see(flavour, picture[:SEEN]) for picture in pictures]
    return Block(
        flavour=flavour,
        captions=captions,
        references=tuple(latents_of(networks.vae, picture) for picture in pictures),
        target=latents_of(networks.vae, target),
        seen=torch.cat([view for view, _ in views], 1),
        grids=[grid for _, grid in views],
        uses=USES,
    )


def _loss(networks: Networks, source: PictureSource, chooser: random.Random, block: Block) -> Tensor:
    block.uses -= 1
    size = 2 * len(block.captions) // USES
    chosen = chooser.sample(range(len(block.captions)), size)
    index = torch.tensor(chosen).to(source.device)
    seen = block.seen[torch.randint(len(block.seen), (size,), device=source.device)]
    embeds, mask = networks.prompts.encode_seen(
        block.flavour, [block.captions[number] for number in chosen], seen, block.grids, as_text=chooser.random() < 0.15
    )
    references = [latents[index] for latents in block.references]
    latents = block.target[index]
    noise = torch.randn(latents.shape, device=source.device, generator=source.generator)
    sigma = noise_levels(source, size)
    level = sigma.view(-1, 1, 1, 1)
    set_flavour(networks.transformer, block.flavour)
    noisy = (1 - level) * latents + level * noise
    velocity = _velocity(networks.transformer, noisy, sigma, references, embeds, mask)
    return mse_loss(velocity.float(), noise - latents)


def _velocity(
    transformer: Any, latents: Tensor, sigma: Tensor, references: Sequence[Tensor], embeds: Tensor, mask: Tensor
) -> Tensor:
    """The velocity [B, C, H, W] by diffusers' own forward, which can train all weights. `mask` is [B, L]."""
    pictures, target = (latents, *references), pack(latents).shape[1]
    (tokens,) = transformer(
        hidden_states=torch.cat(list(map(pack, pictures)), dim=1),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=[list(map(token_shape, pictures))] * len(latents),
        return_dict=False,
    )
    return unpack(tokens[:, :target], *latents.shape[-2:])


def noise_levels(source: PictureSource, batch: int) -> Tensor:
    """Noise levels sigma [B]: a mix of shifted logit-normal and uniform draws."""
    draws = torch.randn(batch, device=source.device, generator=source.generator).sigmoid()
    shifted = SHIFT * draws / (1 + (SHIFT - 1) * draws)
    return torch.where(source.uniform(batch) < UNIFORM_SHARE, source.uniform(batch), shifted)


def edited(references: Sequence[Tensor], chooser: random.Random) -> tuple[Tensor, list[str]]:
    """Targets [B, 3, H, W] and captions for a batch, with an instruction per pair."""
    target, captions, done, batch = references[0].clone(), [], 0, len(references[0])
    total = sum(instruction.weight for instruction in INSTRUCTIONS)
    if len(references) > 1:
        done = batch // 4
        for index in range(done):
            number = chooser.randrange(len(references))
            target[index] = references[number][index]
            captions.append(chooser.choice(NAMED_REFERENCE).format(number + 1))
    rest, passed = batch - done, 0.0
    for instruction in INSTRUCTIONS:
        passed += instruction.weight
        end = batch - rest + round(rest * passed / total)
        target[done:end] = instruction.edit(target[done:end])
        captions.extend(chooser.choice(instruction.phrasings) for _ in range(done, end))
        done = end
    return target, captions


@torch.no_grad()
def sample(
    networks: Networks, flavour: Flavour, captions: Sequence[str], references: Sequence[Tensor], num_steps: int
) -> Tensor:
    """Sample pictures [B, 3, H, W] with Euler steps and without guidance. The noise has a fixed seed."""
    set_flavour(networks.transformer, flavour)
    embeds, mask = networks.prompts.encode(flavour, captions, references)
    seen = [latents_of(networks.vae, picture) for picture in references]
    latents = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(1)).to(seen[0].device)
    levels = torch.linspace(1, 0, num_steps + 1, device=latents.device)
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    for now, then in pairwise(levels):
        sigma = now.expand(len(latents))
        velocity = _velocity(networks.transformer, latents, sigma, seen, embeds, mask)
        latents = latents + (then - now) * velocity.float()
    return pictures_of(networks.vae, latents)
