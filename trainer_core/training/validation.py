"""Loss and pictures of held-out pairs, with the forward pass of training. Does not change the rest of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.inject import without_dropout, without_lora
from ..adapters.reader import AdapterPart
from ..adapters.second_lora import with_second_lora
from ..conditioning.encoded import EncodedDataset
from ..config import ValidationConfig, digest
from ..device import release_memory
from ..events import Observer, SampleReport, raise_if_stopped
from ..qwen_image.base_model import BaseModel
from ..qwen_image.folder import weights_digest
from ..qwen_image.sampling import ComfySchedule, sample_latents, schedule_of
from ..qwen_image.transformer import predict_velocity
from ..qwen_image.vae import load_vae
from ..rng import stream
from .ema import Weights
from .objective import noisy_latents, velocity_loss
from .validation_pictures import (
    Shot,
    Standard,
    incomparable,
    keep_base,
    mean_psnr,
    read_base,
    report_pictures,
    validation_shots,
)

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

LOSS_SIGMAS = (0.2, 0.4, 0.6, 0.8)
_DRAWN_BY = 2  # raise it when the same settings draw other pictures, so that the base model's are drawn again


class Validator:
    """Validates a run. Keeps the targets' VAE results in memory, and the base model's latents in the run folder."""

    def __init__(
        self,
        encoded: EncodedDataset,
        base: BaseModel,
        config: ValidationConfig,
        shots: Sequence[Shot] | None = None,
        few_step_lora: Mapping[str, AdapterPart] | None = None,
    ) -> None:
        """`shots`: the pictures to draw; None for all that the settings ask for. `few_step_lora`: the weight changes of
        `validation_lora`, if there is one."""
        self._encoded, self._base_model, self._config = encoded, base, config
        self._drawing, self._few_step_lora = config.drawing, few_step_lora or {}
        self._scheduler = schedule_of(base, self._drawing)
        self._shots = validation_shots(encoded, config) if shots is None else tuple(shots)
        self._base: dict[Shot, Tensor] = {}
        self._standards: dict[Shot, Standard] = {}

    def __bool__(self) -> bool:
        """False if no pair is held out."""
        return bool(self._encoded.validation_pairs)

    @property
    def unmeasured(self) -> str:
        """Why pictures of this run will not be compared with their targets; empty if all will."""
        return incomparable(self._shots)

    @torch.no_grad()
    def loss(self, transformer: QwenImageTransformer2DModel, device: torch.device, observer: Observer) -> float:
        """Mean loss of all held-out pairs at the noise levels LOSS_SIGMAS. Each pair's noise is fixed.

        Raises:
            Interrupted: the observer wants to stop.
        """
        losses, sigmas = [], torch.tensor(LOSS_SIGMAS, device=device)
        with without_dropout(transformer):
            for entry in self._encoded.validation_pairs:
                pair = self._encoded.load(entry)
                target = pair.target_latents.unsqueeze(0).to(device)
                condition = pair.condition().to(device)
                weights = None if pair.loss_weights is None else pair.loss_weights.unsqueeze(0).to(device)
                noise = self._noise("validation-loss", entry.key, entry.shape, device)
                for sigma in sigmas.split(1):
                    raise_if_stopped(observer)
                    noisy = noisy_latents(target, sigma, noise)
                    velocity = predict_velocity(transformer, noisy.latents, noisy.sigma, condition)
                    losses.append(velocity_loss(velocity, noisy.target_velocity, weights))
        return float(torch.cat(losses).mean())

    @property
    def measured_as(self) -> str:
        """A digest of what determines a validation's results, besides the weights."""
        shots = [self._base_name(shot) for shot in self._shots]
        return digest([self._encoded.manifest.stem.partition("-")[2], self._config.validation_seed, *shots])[:16]

    @property
    def draws_targets(self) -> bool:
        """Whether pictures are drawn that can be compared with their targets."""
        return any(shot.has_target for shot in self._shots)

    @torch.no_grad()
    def psnr(self, transformer: QwenImageTransformer2DModel, device: torch.device, observer: Observer) -> float | None:
        """Mean PSNR (dB) of the pictures that the network draws now; None if none can be compared with its target.

        Raises:
            Interrupted: the observer wants to stop.
        """
        shots = [shot for shot in self._shots if shot.has_target]
        strength = self._config.validation_lora_strength
        with without_dropout(transformer), with_second_lora(transformer, self._few_step_lora, strength, device):
            drawn = {
                shot: self._draw(transformer, shot, device, observer, (number, len(shots)))
                for number, shot in enumerate(shots)
            }
        vae = load_vae(self._base_model, device, observer)
        found = mean_psnr(self._encoded, vae, drawn, self._standards)
        del vae
        release_memory()
        return found

    @torch.no_grad()
    def sample(
        self,
        transformer: QwenImageTransformer2DModel,
        device: torch.device,
        variants: Mapping[str, Weights],
        *,
        step: int,
        grid_file: Path,
        base_folder: Path,
        observer: Observer,
    ) -> SampleReport | None:
        """Sample the shots with the base model and with each of `variants`, and save the grid. None without shots.

        The base model's latents are read from `base_folder`, and drawn only if that lacks them. With a few-step LoRA,
        the transformer must run uncompiled.

        Raises:
            Interrupted: the observer wants to stop.
        """
        if not self._shots:
            return None
        files = {shot: base_folder / self._base_name(shot) for shot in self._shots if shot not in self._base}
        self._base |= {shot: latents for shot, path in files.items() if (latents := read_base(path, shot)) is not None}
        missing = [shot for shot in self._shots if shot not in self._base]
        total = len(missing) + len(self._shots) * len(variants)
        places = ((number, total) for number in range(total))
        strength = self._config.validation_lora_strength
        with without_dropout(transformer), with_second_lora(transformer, self._few_step_lora, strength, device):
            with without_lora(transformer):
                for shot in missing:
                    self._base[shot] = self._draw(transformer, shot, device, observer, next(places))
                    keep_base(files[shot], self._base[shot])
            pictures = {"base": {shot: self._base[shot] for shot in self._shots}}
            for name, weights in variants.items():
                with weights():
                    drawn = (self._draw(transformer, shot, device, observer, next(places)) for shot in self._shots)
                    pictures[name] = dict(zip(self._shots, drawn, strict=True))
        vae = load_vae(self._base_model, device, observer)
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
        steps, (number, total) = self._drawing.steps, place
        pair = self._encoded.load(shot.entry)
        prompt, negative = (self._encoded.load_prompt(shot.entry, key) for key in (shot.prompt, shot.entry.negative))
        latents = sample_latents(
            transformer,
            self._noise("validation", _noise_index(shot), shot.latents_shape, device),
            pair.condition(prompt).to(device),
            scheduler=self._scheduler,
            num_steps=steps,
            guidance=self._drawing.guidance,
            negative=pair.condition(negative).to(device),
            observer=observer,
            on_step=lambda done: observer.on_progress(
                "Drawing validation pictures", number * steps + done, total * steps
            ),
        )
        return latents[0].cpu()

    def _base_name(self, shot: Shot) -> str:
        """Name of the file of the base model's latents: a digest of all that determines them."""
        model, config = self._base_model.config, self._config
        schedule = self._scheduler_key()
        determining = [
            _DRAWN_BY,
            self._base_model.transformer_digest,
            *(model.flavour, model.base_model_precision, model.quantize_via, model.quantize_activations),
            *(model.mixed_precision, self._encoded.preprocessing, schedule),
            *(self._drawing.steps, self._drawing.guidance, config.validation_seed),
            *(shot.prompt, shot.entry.negative, shot.entry.references, _noise_index(shot), shot.latents_shape),
        ]
        determining += [[weights_digest(Path(lora.file)), lora.strength] for lora in model.frozen_loras]
        if self._few_step_lora:
            determining += [weights_digest(Path(config.validation_lora)), config.validation_lora_strength]
        return f"{digest(determining)}.safetensors"

    def _scheduler_key(self) -> object:
        """All that determines the noise levels."""
        if isinstance(self._scheduler, ComfySchedule):
            return ["comfyui", self._scheduler.shift]
        return {name: each for name, each in self._scheduler.config.items() if not name.startswith("_")}

    def _noise(self, purpose: str, index: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise [1, C, H, W] for a `shape` [C, H, W]."""
        generator = stream(self._config.validation_seed, purpose, index)
        return torch.randn((1, *shape), generator=generator).to(device, non_blocking=True)


def _noise_index(shot: Shot) -> str:
    """What a shot's noise depends on besides the seed: the pair, and the size if it isn't the pair's own."""
    return shot.entry.key + ("" if shot.at_own_size else f"\x00{shot.size.width}x{shot.size.height}")
