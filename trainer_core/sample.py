"""Edits one picture, with or without a LoRA, with the encoding and forward pass that training uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .adapters.frozen_loras import load_with_frozen_loras, read_frozen_loras
from .adapters.inject import load_parts
from .adapters.plan import read_parts
from .adapters.reader import AdapterPart
from .adapters.second_lora import read_second_lora, with_second_lora
from .conditioning.caption_lengths import too_long
from .conditioning.pictures import View, plan_reference, render, to_picture, vision_picture
from .config import EncodingConfig, ModelConfig, Preprocessing, TrainConfig, ValidationConfig
from .data.pairing import too_narrow
from .device import pick_device, release_memory
from .errors import ConfigError, Problems
from .events import SILENT, Observer, raise_if_stopped
from .geometry import Box, Size, bucket_size, crop_box, differ_by_rounding
from .memory.placement import apply_memory, blocks_on_host, stream_blocks
from .precision.quantise import converter
from .qwen_image.base_model import BaseModel
from .qwen_image.flavours import FLAVOURS
from .qwen_image.latents import LATENT_CHANNELS, VAE_FACTOR
from .qwen_image.positions import follow_comfyui
from .qwen_image.sampling import sample_latents, schedule_of
from .qwen_image.stops import stop_before_each
from .qwen_image.text_encoder import check_text_encoder, load_text_encoder
from .qwen_image.types import Condition
from .qwen_image.vae import check_vae, decode_latents, encode_picture, load_vae
from .rng import stream
from .settings import check_plain, limits_of
from .text import LONGEST_PROMPT

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One edit to sample.

    `references`: RGB pictures in order. `size`: of the result in pixels, multiples of 16; None for the first
    reference's aspect ratio with an area of `resolution`². `lora_file`: None for the base model alone. `memory_of`:
    stream the transformer's blocks from host memory as this run does; None keeps all on the device. `sampling`: steps,
    guidance, schedule and few-step LoRA, as for validation; its other settings are not used.
    """

    model: ModelConfig
    references: tuple[Image.Image, ...]
    prompt: str
    negative_prompt: str = " "
    preprocessing: Preprocessing = "comfyui"
    match_target_res: bool = False
    lora_file: Path | None = None
    lora_strength: float = 1.0
    size: Size | None = None
    resolution: int = 1024
    sampling: ValidationConfig = field(default_factory=ValidationConfig)
    seed: int = 0
    memory_of: TrainConfig | None = None

    @property
    def encoding(self) -> EncodingConfig:
        """The encoding settings, as for training."""
        return EncodingConfig(
            resolution=self.resolution, preprocessing=self.preprocessing, match_target_res=self.match_target_res
        )


def sample_edit(request: SampleRequest, observer: Observer = SILENT) -> Image.Image:
    """Encode, sample and decode, with one network in memory at a time.

    Raises:
        ConfigError: there is no reference, or more than the flavour takes; a reference is too long and narrow; the
            size isn't a multiple of 16; a prompt has more tokens than the largest `tokenizer_max_length`.
        ModelFileError: a part of the model can't be loaded, or the LoRA file belongs to another model.
        MissingPackageError: a setting needs a package that is not installed.
        JobError: several of these.
        Interrupted: the observer wants to stop.
    """
    base = BaseModel(request.model)
    size, device, loras = _checked(request, base)
    views = [_views(picture, request, size) for picture in request.references]
    references = _reference_latents(request, base, [view for view, _ in views], device, observer)
    release_memory()
    raise_if_stopped(observer)
    prompts = _prompts(request, base, [view for _, view in views], device, observer)
    release_memory()
    raise_if_stopped(observer)
    latents = _draw(request, base, loras, references, prompts, size, device, observer)
    release_memory()
    return to_picture(decode_latents(load_vae(base, device, observer), latents))


def check_sample(request: SampleRequest) -> None:
    """Check all that `sample_edit` would refuse, without reading weights other than the LoRA's.

    Raises:
        TrainerError: as `sample_edit`.
    """
    _checked(request, BaseModel(request.model))


class _Loras(NamedTuple):
    """The weight changes of the LoRA and of the few-step LoRA; empty without one."""

    lora: Mapping[str, AdapterPart]
    few_step: Mapping[str, AdapterPart]


def _checked(request: SampleRequest, base: BaseModel) -> tuple[Size, torch.device, _Loras]:
    """Find all problems before a network is loaded. Returns the result's size, the device and the LoRAs."""
    problems = Problems()
    size = problems.attempt(lambda: _checked_size(request))
    device = problems.attempt(lambda: pick_device(request.model.device))
    problems.attempt(lambda: converter(request.model.base_model_precision))
    problems.attempt(lambda: check_vae(base))
    problems.attempt(lambda: check_text_encoder(base, request.preprocessing))
    problems.attempt(lambda: schedule_of(base, request.sampling.drawing))
    loras = problems.attempt(lambda: _loras(request, base))
    for name in ("prompt", "negative_prompt"):
        problems.attempt(partial(_check_prompt, name, getattr(request, name), base))
    problems.raise_all()
    assert size is not None
    assert device is not None
    assert loras is not None
    return size, device, loras


def _loras(request: SampleRequest, base: BaseModel) -> _Loras:
    """Reads the LoRAs. Checks the transformer's headers, also without a LoRA, and the frozen LoRAs."""
    network, few_step = base.network, request.sampling.validation_lora
    read_frozen_loras(base)
    return _Loras(
        {} if request.lora_file is None else read_parts(network, request.lora_file),
        read_second_lora(network, Path(few_step)) if few_step else {},
    )


def _check_prompt(name: str, text: str, base: BaseModel) -> None:
    check_plain(str, name, text, LONGEST_PROMPT)
    limit = limits_of(EncodingConfig, "tokenizer_max_length").max
    assert limit is not None
    for problem in too_long([(name, text)], int(limit), base.folder.tokenizer):
        raise ConfigError(problem)


def _checked_size(request: SampleRequest) -> Size:
    count, row = len(request.references), FLAVOURS[request.model.flavour]
    if not 1 <= count <= row.max_references:
        raise ConfigError(f"There are {count} reference pictures, but {row.title} takes 1 to {row.max_references}.")
    for number, picture in enumerate(request.references, 1):
        if problem := too_narrow(Size(*picture.size)):
            raise ConfigError(f"Reference picture {number} {problem} Crop it.")
    if request.size is None:
        return bucket_size(Size(*request.references[0].size), request.encoding.resolution)
    if any(side % (2 * VAE_FACTOR) or side <= 0 for side in request.size):
        raise ConfigError(f"size must be multiples of 16 pixels, got {request.size.width} x {request.size.height}.")
    return request.size


def _views(picture: Image.Image, request: SampleRequest, size: Size) -> tuple[View, View]:
    """A reference for the VAE and for the text encoder: whole, as in ComfyUI's node and in the pipelines.

    Cropped to the result's aspect ratio with match_target_res, and with policy comfyui also where its size differs from
    the result's by rounding only: FluxKontextImageScale does so in ComfyUI's graphs.
    """
    own, flavour, encoding = Size(*picture.size), FLAVOURS[request.model.flavour], request.encoding
    whole = plan_reference(Box(0, 0, *own), flavour, encoding, size)
    if encoding.match_target_res or (encoding.preprocessing == "comfyui" and differ_by_rounding(whole[0].size, size)):
        return plan_reference(crop_box(own, size), flavour, encoding, size, framing="alike")
    return whole


def _reference_latents(
    request: SampleRequest, base: BaseModel, views: list[View], device: torch.device, observer: Observer
) -> tuple[Tensor, ...]:
    vae = load_vae(base, device, observer)
    pairs = zip(request.references, views, strict=True)
    return tuple(encode_picture(vae, render(picture, view)).unsqueeze(0) for picture, view in pairs)


def _prompts(
    request: SampleRequest, base: BaseModel, views: list[View], device: torch.device, observer: Observer
) -> list[Tensor]:
    encoder = load_text_encoder(base, request.encoding.preprocessing, device, observer)
    seen = [encoder.see(vision_picture(*each)) for each in zip(request.references, views, strict=True)]
    return [encoder.encode_seen(text, seen) for text in (request.prompt, request.negative_prompt)]


def load_with_lora(
    base: BaseModel,
    device: torch.device,
    lora: Mapping[str, AdapterPart],
    strength: float,
    preprocessing: Preprocessing,
    observer: Observer,
    memory_of: TrainConfig | None,
) -> QwenImageTransformer2DModel:
    """The transformer with a LoRA, ready to sample. `preprocessing` and `memory_of`: as in SampleRequest."""
    on_host = ()
    if memory_of is not None:
        checkpointing = memory_of.gradient_checkpointing
        on_host = blocks_on_host(memory_of.memory, base.num_blocks, checkpointing=checkpointing)
    transformer = load_with_frozen_loras(base, device, observer, on_host=on_host)
    stream = stream_blocks(transformer, on_host, device, memory_of.memory) if memory_of else None
    stop_before_each(transformer.transformer_blocks, observer)
    if preprocessing == "comfyui":
        follow_comfyui(transformer)
    load_parts(transformer, lora, strength)
    if memory_of is not None:
        apply_memory(transformer, stream, device, memory_of)
    return transformer


def _draw(
    request: SampleRequest,
    base: BaseModel,
    loras: _Loras,
    references: tuple[Tensor, ...],
    prompts: list[Tensor],
    size: Size,
    device: torch.device,
    observer: Observer,
) -> Tensor:
    """Latents [C, H, W] of the result."""
    transformer = load_with_lora(
        base, device, loras.lora, request.lora_strength, request.preprocessing, observer, request.memory_of
    )
    conditions = [Condition(references, prompt.unsqueeze(0)).to(device) for prompt in prompts]
    shape = (1, LATENT_CHANNELS, size.height // VAE_FACTOR, size.width // VAE_FACTOR)
    noise = torch.randn(shape, generator=stream(request.seed, "sample")).to(device)
    drawing = request.sampling.drawing
    with with_second_lora(transformer, loras.few_step, request.sampling.validation_lora_strength, device):
        drawn = sample_latents(
            transformer,
            noise,
            conditions[0],
            scheduler=schedule_of(base, drawing),
            num_steps=drawing.steps,
            guidance=drawing.guidance,
            negative=conditions[1],
            observer=observer,
            on_step=lambda done: observer.on_progress("Sampling", done, drawing.steps),
        )
    return drawn[0].cpu()
