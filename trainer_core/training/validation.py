"""Loss and pictures of held-out pairs, with the forward pass of training. Does not change the rest of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.inject import without_dropout, without_lora
from ..conditioning.batches import pad_prompts
from ..conditioning.encoded import EncodedDataset
from ..conditioning.types import EncodedPair
from ..config import ValidationConfig
from ..device import release_memory
from ..events import Observer, SampleReport, raise_if_stopped
from ..qwen_image.base_model import BaseModel
from ..qwen_image.sampling import load_scheduler, sample_latents
from ..qwen_image.transformer import predict_velocity
from ..qwen_image.types import Condition
from ..qwen_image.vae import load_vae
from ..rng import stream
from .ema import Weights
from .objective import noisy_latents, velocity_loss
from .validation_pictures import Shot, Standard, plan_shots, report_pictures

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

LOSS_SIGMAS = (0.2, 0.4, 0.6, 0.8)


class Validator:
    """Validates a run. Keeps the base model's latents and the targets' VAE results from the first validation."""

    def __init__(self, encoded: EncodedDataset, base: BaseModel, config: ValidationConfig) -> None:
        self._encoded, self._base_model, self._config = encoded, base, config
        self._scheduler = load_scheduler(base.folder.scheduler)
        self._shots = plan_shots(encoded.validation_pairs[: config.num_validation_images], config.sizes)
        self._base: dict[Shot, Tensor] = {}
        self._standards: dict[Shot, Standard] = {}

    def __bool__(self) -> bool:
        """False if no pair is held out."""
        return bool(self._encoded.validation_pairs)

    @torch.no_grad()
    def loss(self, transformer: QwenImageTransformer2DModel, device: torch.device, observer: Observer) -> float:
        """Mean loss of all held-out pairs at the noise levels LOSS_SIGMAS. Each pair's noise is fixed.

        Raises:
            Interrupted: the observer wants to stop.
        """
        losses = []
        with without_dropout(transformer):
            for entry in self._encoded.validation_pairs:
                pair = self._encoded.load(entry)
                target = pair.target_latents.unsqueeze(0).to(device)
                condition = _condition(pair, pair.prompt_embeds, device)
                weights = None if pair.loss_weights is None else pair.loss_weights.unsqueeze(0).to(device)
                noise = self._noise("validation-loss", entry.key, entry.shape, device)
                for sigma in LOSS_SIGMAS:
                    raise_if_stopped(observer)
                    noisy = noisy_latents(target, torch.tensor([sigma], device=device), noise)
                    velocity = predict_velocity(transformer, noisy.latents, noisy.sigma, condition)
                    losses.append(velocity_loss(velocity, noisy.target_velocity, weights))
        return float(torch.cat(losses).mean())

    @torch.no_grad()
    def sample(
        self,
        transformer: QwenImageTransformer2DModel,
        device: torch.device,
        variants: Mapping[str, Weights],
        *,
        step: int,
        grid_file: Path,
        observer: Observer,
    ) -> SampleReport | None:
        """Sample the shots with the base model and with each of `variants`, and save the grid. None without shots.

        Raises:
            Interrupted: the observer wants to stop.
        """
        if not self._shots:
            return None
        missing = [shot for shot in self._shots if shot not in self._base]
        total = len(missing) + len(self._shots) * len(variants)
        places = ((number, total) for number in range(total))
        pictures: dict[str, dict[Shot, Tensor]] = {"base": self._base}
        with without_dropout(transformer):
            with without_lora(transformer):
                for shot in missing:
                    self._base[shot] = self._draw(transformer, shot, device, observer, next(places))
            for name, weights in variants.items():
                with weights():
                    drawn = (self._draw(transformer, shot, device, observer, next(places)) for shot in self._shots)
                    pictures[name] = dict(zip(self._shots, drawn, strict=True))
        vae = load_vae(self._base_model, device)
        report = report_pictures(self._encoded, vae, pictures, self._standards, step=step, grid_file=grid_file)
        del vae
        release_memory()
        return report

    def _draw(
        self,
        transformer: QwenImageTransformer2DModel,
        shot: Shot,
        device: torch.device,
        observer: Observer,
        place: tuple[int, int],
    ) -> Tensor:
        """Sample a shot's latents [C, H, W] and move them to the CPU. The noise depends only on the pair and the size.

        `place` is the number of shots before this one and of all shots, for the progress report.
        """
        steps, (number, total) = self._config.validation_num_inference_steps, place
        pair = self._encoded.load(shot.entry)
        prompt, negative = (self._encoded.load_prompt(shot.entry, key) for key in (shot.prompt, shot.entry.negative))
        at_size = "" if shot.at_own_size else f"\x00{shot.size.width}x{shot.size.height}"
        latents = sample_latents(
            transformer,
            self._noise("validation", shot.entry.key + at_size, shot.latents_shape, device),
            _condition(pair, prompt, device),
            scheduler=self._scheduler,
            num_steps=steps,
            guidance=self._config.validation_guidance,
            negative=_condition(pair, negative, device),
            observer=observer,
            on_step=lambda done: observer.on_progress(
                "Drawing validation pictures", number * steps + done, total * steps
            ),
        )
        return latents[0].cpu()

    def _noise(self, purpose: str, index: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise [1, C, H, W] for a `shape` [C, H, W]."""
        generator = stream(self._config.validation_seed, purpose, index)
        return torch.randn((1, *shape), generator=generator).to(device)


def _condition(pair: EncodedPair, prompt: Tensor, device: torch.device) -> Condition:
    """The pair's references with a prompt [L, D], as a batch of 1."""
    references = tuple(latents.unsqueeze(0) for latents in pair.reference_latents)
    return Condition(references, *pad_prompts([prompt])).to(device)
