"""ComfyUI's own CLIP and VAE objects as encoders of pairs: what its Qwen edit nodes would put into CONDITIONING."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
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
from .host import free_memory

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ..trainer_core.conditioning.encoders import EncodePicture, EncodePrompts, Encoders

_TOKENS = "qwen25_7b"  # the one key of the tokens of ComfyUI's tokenizer for Qwen-Image
_SAMPLES = 256  # values of each weight that a digest reads
_CHANNELS = 16


def connected_encoders(sockets: dict[str, Any], flavour: FlavourName) -> Encoders:
    """Encoders for those of `clip` and `vae` that are in `sockets`, to be made and used within one `host.long_call`,
    which has brought all weights back to their files' values.

    Raises:
        ConfigError: nothing comes through a connected socket, or a network that a LoRA or hook changes.
    """
    from ..trainer_core.conditioning.encoders import Encoders, PictureEncoder, PromptEncoder

    empty = [name for name in ("clip", "vae") if name in sockets and sockets[name] is None]
    if empty:
        raise ConfigError(f"Nothing comes through {' and '.join(empty)}: the file has none. Use a loader of its own.")
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


@contextmanager
def _vae_loaded(vae: VAE) -> Iterator[EncodePicture]:
    """ComfyUI loads by itself at the first use."""
    yield lambda pixels: encode_picture(vae, pixels)
    free_memory()


@dataclass(frozen=True, slots=True)
class _ClipPrompts:
    """ComfyUI's CLIP sees the pictures anew with every caption: what it would keep of them is inside its tokens."""

    clip: CLIP
    flavour: Flavour

    def see(self, picture: Any) -> Any:
        return picture

    def encode_seen(self, caption: str, seen: Sequence[Any]) -> Tensor:
        return encode_prompt(self.clip, self.flavour, caption, seen)


@contextmanager
def _clip_loaded(clip: CLIP, flavour: Flavour) -> Iterator[EncodePrompts]:
    yield _ClipPrompts(clip, flavour)
    free_memory()


def encode_picture(vae: VAE, pixels: Tensor) -> Tensor:
    """Normalised latents [16, H/8, W/8] of pixels [3, H, W] in 0..1, as the model gets them from a latent.

    Raises:
        ConfigError: the VAE is none of Qwen-Image's kind.
    """
    with torch.inference_mode():
        latents = vae.encode(pixels.movedim(0, -1).unsqueeze(0))
        if latents.ndim != 5 or latents.shape[1] != _CHANNELS or latents.shape[2] != 1:
            raise ConfigError(
                f"The connected VAE gives latents {list(latents.shape)}, Qwen-Image's gives [1, {_CHANNELS}, 1, H, W]. "
                "Connect Load VAE with qwen_image_vae.safetensors."
            )
        latents = comfy.latent_formats.Wan21().process_in(latents.float())[0, :, 0].cpu()
    return latents.clone()


def encode_prompt(clip: CLIP, flavour: Flavour, caption: str, pictures: Sequence[Any]) -> Tensor:
    """Embeddings [L, D] of a caption seen with pictures [3, H, W], as TextEncodeQwenImageEdit (Plus) makes them.

    Raises:
        ConfigError: the CLIP is none of Qwen-Image's kind.
        DatasetError: the caption itself holds a picture's placeholder.
    """
    from ..trainer_core.qwen_image.text_encoder import PICTURE_TOKEN

    if pictures and PICTURE_TOKEN in caption:
        raise DatasetError(f"The caption {caption!r} holds {PICTURE_TOKEN}, which stands for a picture. Remove it.")
    images = [picture.movedim(0, -1).unsqueeze(0) for picture in pictures]
    # without markers, as in edit-v1, the node leaves the template to ComfyUI's tokenizer
    template = {"llama_template": flavour.template} if flavour.picture_marker else {}
    markers = "".join(flavour.picture_marker.format(number + 1) for number in range(len(images)))
    with torch.inference_mode():
        tokens = clip.tokenize(markers + caption, images=images, **template)
        if set(tokens) != {_TOKENS}:
            raise ConfigError(
                "The connected CLIP is not Qwen-Image's text encoder. Connect Load CLIP with qwen_2.5_vl_7b and the "
                "type qwen_image."
            )
        embeds, options = clip.encode_from_tokens_scheduled(tokens)[0]
        embeds, mask = embeds[0].float().cpu(), options.get("attention_mask")
        if mask is not None:
            embeds = embeds[mask[0].bool().cpu()]
    return embeds.clone()


def _digest_of(patcher: ModelPatcher, socket: str) -> str:
    """Equal for equal networks: names, shapes and dtypes of all weights, and a sample of each one's bytes."""
    if patcher.patches or getattr(patcher, "forced_hooks", None) is not None:
        raise ConfigError(
            f"A LoRA or hook changes the network connected to {socket}, which the cache could not tell apart. Connect "
            f"{socket} to its loader."
        )
    hasher = hashlib.sha256()
    # not state_dict: loaders of GGUF put placeholders there
    for name, weight in itertools.chain(patcher.model.named_parameters(), patcher.model.named_buffers()):
        stored = getattr(weight, "_qdata", weight).detach().as_subclass(Tensor)
        hasher.update(f"{name}\x00{list(weight.shape)}\x00{list(stored.shape)}\x00{stored.dtype}\x00".encode())
        if stored.is_meta:
            raise ConfigError(f"The network connected to {socket} has no weights in memory yet. Use another loader.")
        flat = stored.reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)].contiguous().cpu()
        hasher.update(sample.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]
