"""The two networks of encoding as `encode_dataset` uses them: a digest for the cache's keys, and a way to load.

Here are our own loaders. Others may stand in their place, as nodes/host_encoders.py does with ComfyUI's objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import EncodingConfig, digest
from ..errors import ConfigError
from ..events import Observer
from ..qwen_image.base_model import BaseModel
from ..qwen_image.folder import ModelFolder, weights_digest
from ..qwen_image.text_encoder import Picture, load_text_encoder
from ..qwen_image.vae import encode_picture, load_vae

EncodePicture = Callable[[Tensor], Tensor]  # [3, H, W] in 0..1 to normalised latents [C, H/8, W/8], float32, CPU


@dataclass(frozen=True, slots=True)
class PictureEncoder:
    """`digest`: of all that decides latents besides the picture. The network is in memory while `loaded` is open."""

    digest: str
    loaded: Callable[[Observer], AbstractContextManager[EncodePicture]]


class EncodePrompts(Protocol):
    """A text encoder at work: it sees a picture once, and then encodes captions with what it saw."""

    def see(self, picture: Picture) -> Any:
        """What it keeps of a picture: VisualTokens where PromptEncoder has a `visual_digest`."""

    def encode_seen(self, caption: str, seen: Sequence[Any]) -> Tensor:
        """Embeddings [L, D], float32, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """`digest`: of all that decides embeddings besides caption and pictures, the flavour and policy among it.
    `visual_digest`: of all that decides visual tokens besides the picture; empty where they can't be kept."""

    digest: str
    loaded: Callable[[Observer], AbstractContextManager[EncodePrompts]]
    visual_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """What stands in the place of our own loaders; none does by default."""

    pictures: PictureEncoder | None = None
    prompts: PromptEncoder | None = None

    def check(self, encoding: EncodingConfig) -> None:
        """Raises ConfigError where the settings are not for the encoders given here, which are ComfyUI's."""
        if self.pictures and encoding.reference_latents == "on_the_fly":
            raise ConfigError(
                "reference_latents is 'on_the_fly', which encodes with the base model's VAE while training, but "
                "ComfyUI's own VAE is connected. Choose cached, or disconnect vae."
            )
        if (self.pictures or self.prompts) and encoding.preprocessing != "comfyui":
            raise ConfigError(
                f"preprocessing is {encoding.preprocessing!r}, but ComfyUI's own CLIP or VAE is connected, which goes "
                "with `comfyui` only. Choose that, or disconnect clip and vae."
            )


def own_pictures(base: BaseModel, device: torch.device) -> PictureEncoder:
    """The VAE of the base model."""

    @contextmanager
    def loaded(_observer: Observer) -> Iterator[EncodePicture]:
        vae = load_vae(base, device)
        yield lambda pixels: encode_picture(vae, pixels)

    return PictureEncoder(digest([base.vae_digest, base.config.mixed_precision]), loaded)


def own_prompts(base: BaseModel, encoding: EncodingConfig, device: torch.device) -> PromptEncoder:
    """The text encoder of the base model."""

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
    """What decides patches and positions where transformers makes them, see text_encoder.py."""
    import transformers

    return [weights_digest(folder.processor), transformers.__version__]


def _bytes_digest(folder: Path) -> str:
    path = folder / "merges.txt"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
