"""The VAE and the text encoder as `encode_dataset` needs them: a digest for the cache keys, and a loader.

This module loads those of the base model. nodes/host_encoders.py provides ComfyUI's instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import EncodingConfig, digest
from ..device import free_bytes
from ..errors import ConfigError
from ..events import Observer
from ..qwen_image.base_model import BaseModel
from ..qwen_image.folder import ModelFolder, weights_digest
from ..qwen_image.text_encoder import Picture, load_text_encoder
from ..qwen_image.vae import batch_pixels, encode_pictures, load_vae

# Pictures [3, H, W] in 0..1 -> their normalised latents [C, H/8, W/8], float32 on any device, in the same order. Takes
# several pictures before it yields the first latents if they share a forward pass.
EncodePictures = Callable[[Iterable[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True, slots=True)
class PictureEncoder:
    """`digest` covers everything besides the picture that affects its latents. `loaded` keeps the network in memory
    while its context is open."""

    digest: str
    loaded: Callable[[Observer], AbstractContextManager[EncodePictures]]


class EncodePrompts(Protocol):
    """A loaded text encoder. It encodes each picture once and reuses the result for all captions.

    Both methods take several inputs before they yield the first result if these share a forward pass.
    """

    def see_all(self, pictures: Iterable[Picture]) -> Iterator[Any]:
        """The encoding of each picture: VisualTokens if the PromptEncoder has a `visual_digest`."""
        ...

    def encode_all(self, prompts: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[Tensor]:
        """Embeddings [L, D] of each caption with its results of `see_all`, float32 on any device."""
        ...


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """`digest` covers everything besides caption and pictures that affects embeddings, including flavour and
    preprocessing. `visual_digest` does so for the visual tokens of a picture; empty if they can't be cached."""

    digest: str
    loaded: Callable[[Observer], AbstractContextManager[EncodePrompts]]
    visual_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Replacements for the base model's encoders; None uses the base model's."""

    pictures: PictureEncoder | None = None
    prompts: PromptEncoder | None = None

    def check(self, encoding: EncodingConfig) -> None:
        """Raise ConfigError if the settings do not work with replaced encoders, which are ComfyUI's."""
        if self.pictures and encoding.reference_latents == "on_the_fly":
            raise ConfigError(
                "reference_latents is 'on_the_fly', which uses the base model's VAE while training, but a ComfyUI VAE "
                "is connected. Set reference_latents to cached or disconnect vae."
            )
        if (self.pictures or self.prompts) and encoding.preprocessing != "comfyui":
            raise ConfigError(
                f"preprocessing is {encoding.preprocessing!r}, but a ComfyUI CLIP or VAE is connected, which works "
                "with comfyui only. Set preprocessing to comfyui or disconnect clip and vae."
            )


def own_pictures(base: BaseModel, device: torch.device) -> PictureEncoder:
    """Loader of the base model's VAE."""

    @contextmanager
    def loaded(observer: Observer) -> Iterator[EncodePictures]:
        vae = load_vae(base, device, observer)
        at_once = batch_pixels(free_bytes(device), vae.dtype.itemsize) if device.type == "cuda" else 0
        yield lambda pictures: encode_pictures(vae, pictures, at_once)

    return PictureEncoder(digest([base.vae_digest, base.config.mixed_precision]), loaded)


def own_prompts(base: BaseModel, encoding: EncodingConfig, device: torch.device) -> PromptEncoder:
    """Loader of the base model's text encoder."""

    @contextmanager
    def loaded(observer: Observer) -> Iterator[EncodePrompts]:
        yield load_text_encoder(base, encoding.preprocessing, device, observer)

    folder, model = base.folder, base.config
    network = [encoding.preprocessing, model.mixed_precision, weights_digest(folder.text_encoder)]
    network += [model.text_encoder_precision] if model.text_encoder_precision != "none" else []
    tokenizer = [weights_digest(folder.tokenizer), _bytes_digest(folder.tokenizer)]
    libraries = _libraries(folder) if encoding.preprocessing == "diffusers" else []
    return PromptEncoder(
        digest([model.flavour, *network, *tokenizer, *libraries]), loaded, digest([*network, *libraries])
    )


def _libraries(folder: ModelFolder) -> list[str]:
    """Cache key of patches and positions if the transformers library computes them, see text_encoder.py."""
    import transformers

    return [weights_digest(folder.processor), transformers.__version__]


def _bytes_digest(folder: Path) -> str:
    path = folder / "merges.txt"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
