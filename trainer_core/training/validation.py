"""Pictures and loss on held-out pairs, through the training's own forward. Nothing that follows is changed by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..conditioning.batches import pad_prompts
from ..conditioning.encoded import EncodedDataset, EncodedEntry
from ..conditioning.pictures import to_picture
from ..config import ModelConfig, ValidationConfig
from ..device import release_memory
from ..events import Observer, SampleReport, raise_if_stopped
from ..qwen_image.folder import model_folder
from ..qwen_image.sampling import load_scheduler, sample_latents
from ..qwen_image.transformer import predict_velocity
from ..qwen_image.types import Condition
from ..qwen_image.vae import decode_latents, load_vae
from ..rng import stream
from .grid import GridRow, save_picture, validation_grid
from .lora import without_lora
from .objective import noisy_latents, velocity_loss
from .sample_pictures import save_sample_pictures

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

LOSS_SIGMAS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out pair as tensors on the device: `target` [1, C, H, W], conditions with and without the caption,
    the loss's weights [1, 1, H, W] if there is a mask."""

    entry: EncodedEntry
    target: Tensor
    condition: Condition
    negative: Condition
    loss_weights: Tensor | None


class Validator:
    """Keeps the held-out pairs' tensors and the base model's pictures, which never change, between validations."""

    def __init__(self, encoded: EncodedDataset, model: ModelConfig, config: ValidationConfig) -> None:
        self._encoded, self._model, self._config = encoded, model, config
        self._scheduler = load_scheduler(model_folder(model).scheduler)
        self._base: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """False when no pair is held out."""
        return bool(self._encoded.validation_pairs)

    @torch.no_grad()
    def loss(self, transformer: QwenImageTransformer2DModel, device: torch.device, observer: Observer) -> float:
        """Mean loss over all held-out pairs at four fixed noise levels, with noise fixed per pair."""
        losses = []
        with _evaluating(transformer):
            for pair in self._pairs(device, self._encoded.validation_pairs):
                noise = self._noise(pair, "validation-loss")
                for sigma in LOSS_SIGMAS:
                    raise_if_stopped(observer)
                    noisy = noisy_latents(pair.target, torch.tensor([sigma], device=device), noise)
                    velocity = predict_velocity(transformer, noisy.latents, noisy.sigma, pair.condition)
                    losses.append(velocity_loss(velocity, noisy.target_velocity, pair.loss_weights))
        return float(torch.cat(losses).mean())

    @torch.no_grad()
    def sample(
        self,
        transformer: QwenImageTransformer2DModel,
        device: torch.device,
        *,
        step: int,
        grid_file: Path,
        observer: Observer,
    ) -> SampleReport | None:
        """Draw the held-out pairs with and without the adapter, save the grid. None where no picture is wanted.

        Raises:
            Interrupted: the observer wants to stop.
        """
        chosen = self._encoded.validation_pairs[: self._config.num_validation_images]
        if not chosen:
            return None
        drawn: dict[str, Tensor] = {}
        with _evaluating(transformer):
            for number, pair in enumerate(self._pairs(device, chosen)):
                if pair.entry.key not in self._base:
                    with without_lora(transformer):
                        self._base[pair.entry.key] = self._draw(transformer, pair, observer, number, len(chosen))
                drawn[pair.entry.key] = self._draw(transformer, pair, observer, number, len(chosen))
        return self._report(chosen, drawn, device, step, grid_file)

    def _draw(
        self,
        transformer: QwenImageTransformer2DModel,
        pair: HeldOut,
        observer: Observer,
        number: int,
        total: int,
    ) -> Tensor:
        steps = self._config.validation_num_inference_steps
        latents = sample_latents(
            transformer,
            self._noise(pair, "validation"),
            pair.condition,
            scheduler=self._scheduler,
            num_steps=steps,
            guidance=self._config.validation_guidance,
            negative=pair.negative,
            observer=observer,
            on_step=lambda done: observer.on_progress(
                "Drawing validation pictures", number * steps + done, total * steps
            ),
        )
        return latents[0].cpu()

    def _noise(self, pair: HeldOut, purpose: str) -> Tensor:
        generator = stream(self._config.validation_seed, purpose, pair.entry.key)
        return torch.randn(pair.target.shape, generator=generator).to(pair.target.device)

    def _pairs(self, device: torch.device, entries: tuple[EncodedEntry, ...]) -> Iterator[HeldOut]:
        for entry in entries:
            pair = self._encoded.load(entry)
            references = tuple(latents.unsqueeze(0) for latents in pair.reference_latents)
            conditions = [
                Condition(references, *pad_prompts([embeds])).to(device)
                for embeds in (pair.prompt_embeds, self._encoded.load_negative(entry))
            ]
            weights = None if pair.loss_weights is None else pair.loss_weights.unsqueeze(0).to(device)
            yield HeldOut(entry, pair.target_latents.unsqueeze(0).to(device), *conditions, loss_weights=weights)

    def _report(
        self,
        entries: tuple[EncodedEntry, ...],
        drawn: dict[str, Tensor],
        device: torch.device,
        step: int,
        grid_file: Path,
    ) -> SampleReport:
        vae = load_vae(self._model, device)
        rows, ratios = [], []
        for entry in entries:
            target, *references = (picture.float() / 255 for picture in self._encoded.load_pictures(entry))
            base, lora = (decode_latents(vae, latents[entry.key]) for latents in (self._base, drawn))
            ceiling = decode_latents(vae, self._encoded.load(entry).target_latents)
            ratios.append([psnr(picture, target) for picture in (base, lora, ceiling)])
            rows.append(
                GridRow(
                    references=tuple(map(to_picture, references)),
                    base=to_picture(base),
                    lora=to_picture(lora),
                    target=to_picture(target),
                    caption=entry.captions[0],
                )
            )
        del vae
        release_memory()
        save_sample_pictures(rows, grid_file.with_suffix(""))
        save_picture(validation_grid(rows), grid_file)
        base_db, lora_db, vae_db = (sum(column) / len(ratios) for column in zip(*ratios, strict=True))
        return SampleReport(step=step, grid_file=grid_file, psnr_base=base_db, psnr_lora=lora_db, psnr_vae=vae_db)


def psnr(picture: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1."""
    error = float((picture - target).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


@contextmanager
def _evaluating(transformer: torch.nn.Module) -> Iterator[None]:
    """Without dropout while the context lasts."""
    was_training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(was_training)
