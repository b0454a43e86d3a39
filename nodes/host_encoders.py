"""Encode pairs with ComfyUI's CLIP and VAE objects, with the same results as ComfyUI's Qwen edit nodes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfyui_version
import torch
from torch import Tensor

from ..trainer_core.config import FlavourName, digest
from ..trainer_core.errors import ConfigError, DatasetError
from ..trainer_core.qwen_image.flavours import FLAVOURS, Flavour
from ..trainer_core.text import brief
from .host_call import free_memory

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ..trainer_core.conditioning.encoders import EncodePictures, EncodePrompts, Encoders

_TOKENS = "qwen25_7b"  # the only key in the output of ComfyUI's tokenizer for Qwen-Image
_SAMPLES = 256  # values per weight that go into a digest
_CHANNELS = 16


def connected_encoders(sockets: dict[str, Any], flavour: FlavourName) -> Encoders:
    """Encoders for the `clip` and `vae` in `sockets`.

    Create and use them inside one `host_call.long_call`, which removes LoRA patches from the weights.

    Raises:
        ConfigError: a connected socket delivers nothing, or a LoRA or hook modifies its network.
    """
    from ..trainer_core.conditioning.encoders import Encoders, PictureEncoder, PromptEncoder

    empty = [name for name in ("clip", "vae") if name in sockets and sockets[name] is None]
    if empty:
        raise ConfigError(
            f"The loader connected to {' and '.join(empty)} delivers None. Connect a separate loader for it."
        )
    pictures = prompts = None
    if "vae" in sockets:
        vae = sockets["vae"]
        parts = ["comfyui vae", _digest_of(vae.patcher, "vae"), str(vae.vae_dtype)]
        pictures = PictureEncoder(digest(parts), lambda _: _vae_loaded(vae))
    if "clip" in sockets:
        clip = sockets["clip"]
        parts = ["comfyui clip", flavour, _digest_of(clip.patcher, "clip"), clip.layer_idx]
        parts += [repr(sorted(clip.tokenizer_options.items())), comfyui_version.__version__]
        prompts = PromptEncoder(digest(parts), lambda _: _clip_loaded(clip, FLAVOURS[flavour]))
    return Encoders(pictures=pictures, prompts=prompts)


def foreseen_encoders(connected: Collection[str]) -> Encoders:
    """Encoders that stand for the sockets `clip` and `vae` before the graph runs. They encode nothing, and no entry of
    the cache is theirs."""
    from ..trainer_core.conditioning.encoders import Encoders, PictureEncoder, PromptEncoder

    def loaded(_observer: Any) -> Any:
        raise ConfigError("This network is not known before the graph runs.")

    pictures = PictureEncoder("not known yet", loaded) if "vae" in connected else None
    prompts = PromptEncoder("not known yet", loaded) if "clip" in connected else None
    return Encoders(pictures=pictures, prompts=prompts)


@contextmanager
def _vae_loaded(vae: VAE) -> Iterator[EncodePictures]:
    """An EncodePictures for the VAE, which ComfyUI loads on first use. One at a time: ComfyUI encodes a batch of
    pictures as a video."""
    yield lambda pictures: (encode_picture(vae, pixels) for pixels in pictures)
    free_memory()


@dataclass(frozen=True, slots=True)
class _ClipPrompts:
    """Passes pictures through unchanged: ComfyUI's CLIP encodes the pictures again with every caption."""

    clip: CLIP
    flavour: Flavour

    def see_all(self, pictures: Iterable[Any]) -> Iterator[Any]:
        yield from pictures

    def encode_all(self, prompts: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[Tensor]:
        for caption, seen in prompts:
            yield encode_prompt(self.clip, self.flavour, caption, seen)


@contextmanager
def _clip_loaded(clip: CLIP, flavour: Flavour) -> Iterator[EncodePrompts]:
    yield _ClipPrompts(clip, flavour)
    free_memory()


def encode_picture(vae: VAE, pixels: Tensor) -> Tensor:
    """Normalised latents [16, H/8, W/8] of pixels [3, H, W] in 0..1.

    Raises:
        ConfigError: not a Qwen-Image VAE.
    """
    with torch.inference_mode():
        latents = vae.encode(pixels.movedim(0, -1).unsqueeze(0))
        if latents.ndim != 5 or latents.shape[1] != _CHANNELS or latents.shape[2] != 1:
            raise ConfigError(
                f"The connected VAE produces latents of shape {list(latents.shape)}; Qwen-Image needs "
                f"[1, {_CHANNELS}, 1, H, W]. Connect Load VAE with qwen_image_vae.safetensors."
            )
        latents = comfy.latent_formats.Wan21().process_in(latents.float())[0, :, 0].cpu()
    return latents.clone()


def encode_prompt(clip: CLIP, flavour: Flavour, caption: str, pictures: Sequence[Any]) -> Tensor:
    """Embeddings [L, D] of a caption with pictures [3, H, W], as in ComfyUI's TextEncodeQwenImageEdit (Plus).

    Raises:
        ConfigError: not a Qwen-Image CLIP.
        DatasetError: the caption contains the picture placeholder token.
    """
    from ..trainer_core.qwen_image.text_encoder import PICTURE_TOKEN

    if pictures and PICTURE_TOKEN in caption:
        raise DatasetError(
            f"The caption {brief(caption)} contains {PICTURE_TOKEN}, the placeholder of a picture. Remove it."
        )
    images = [picture.movedim(0, -1).unsqueeze(0) for picture in pictures]
    # edit-v1 has no picture markers; there the ComfyUI node uses the tokenizer's own template
    template = {"llama_template": flavour.template} if flavour.picture_marker else {}
    markers = "".join(flavour.picture_marker.format(number + 1) for number in range(len(images)))
    with torch.inference_mode():
        tokens = clip.tokenize(markers + caption, images=images, **template)
        if set(tokens) != {_TOKENS}:
            raise ConfigError(
                "The connected CLIP is not Qwen-Image's text encoder. Connect Load CLIP with qwen_2.5_vl_7b and type "
                "qwen_image."
            )
        embeds, options = clip.encode_from_tokens_scheduled(tokens)[0]
        embeds, mask = embeds[0].float().cpu(), options.get("attention_mask")
        if mask is not None:
            embeds = embeds[mask[0].bool().cpu()]
    return embeds.clone()


def _digest_of(patcher: ModelPatcher, socket: str) -> str:
    """Digest of the names, shapes, dtypes and sampled bytes of all weights, so that equal networks share cache entries.

    Raises:
        ConfigError: a LoRA or hook modifies the network, or its weights are not in memory.
    """
    if patcher.patches or getattr(patcher, "forced_hooks", None) is not None:
        raise ConfigError(
            f"A LoRA or hook modifies the network connected to {socket}. The cache can't distinguish such changes. "
            f"Connect {socket} directly to its loader."
        )
    hasher = hashlib.sha256()
    # not state_dict: GGUF loaders put placeholders there
    for name, weight in itertools.chain(patcher.model.named_parameters(), patcher.model.named_buffers()):
        stored = getattr(weight, "_qdata", weight).detach().as_subclass(Tensor)
        hasher.update(f"{name}\x00{list(weight.shape)}\x00{list(stored.shape)}\x00{stored.dtype}\x00".encode())
        if stored.is_meta:
            raise ConfigError(f"The network connected to {socket} has no weights in memory. Use a different loader.")
        flat = stored.reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)].contiguous().cpu()
        hasher.update(sample.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]
