"""The VAE: loading it, and converting between pictures and normalised latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..device import copied_to
from ..errors import ModelFileError
from ..events import SILENT, Observer
from ..packages import explained_imports
from ..text import brief, reason_of, shown
from ..weights.source import open_weights
from ..weights.stored import WeightSource
from .base_model import BaseModel
from .batching import in_batches
from .folder import config_errors, read_json
from .latents import LATENT_CHANNELS, VAE_FACTOR, denormalise, normalise
from .recognise import instead_of, wrong_kind
from .stops import stop_before_each
from .vae_tiles import ENCODING_ELEMENTS, decode_raw, encode_raw

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage


VAE_WEIGHTS = 44_599_603  # of the VAE that `for_pictures` returns
GAPS = 2**29  # bytes of device memory that are left to fragmentation
_BATCH_PIXELS = 4 * 2**20  # a larger batch is hardly faster
_WAN_MARK, _WIDTH_FROM = "decoder.middle.0.residual.0.gamma", "decoder.norm_out.gamma"


def load_vae(base: BaseModel, device: torch.device, observer: Observer = SILENT) -> AutoencoderKLQwenImage:
    """Load a base model's VAE for pictures, frozen, in bf16 on accelerators and float32 on the CPU.

    The VAE raises Interrupted between two convolutions if the observer wants to stop.

    Raises:
        ModelFileError: the folder or file is not an AutoencoderKLQwenImage.
    """
    place, config = base.folder.vae, base.config
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" and device.type != "cpu" else torch.float32
    vae = _from_file(place, dtype) if place.is_file() else _from_folder(place, dtype)
    for_pictures(vae)
    stop_before_each((each for each in vae.modules() if isinstance(each, _PictureConv)), observer)
    return vae.to(device).eval().requires_grad_(False)  # noqa: FBT003


def for_pictures(vae: AutoencoderKLQwenImage) -> None:
    """Reduce a video VAE to what pictures need, in place. A picture's convolutions then take a third of the work.

    Results for pictures stay the same: the convolutions are causal in time, and a picture is a video's first frame, so
    all earlier frames are zeros. Only the last time slice of each kernel has an effect.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    for module in list(vae.modules()):
        for name, child in module.named_children():
            if name == "time_conv":
                setattr(module, name, nn.Identity())  # works between frames; never called for the first one
            elif isinstance(child, QwenImageCausalConv3d):
                setattr(module, name, _PictureConv(child))


class _PictureConv(nn.Module):
    """The 2D convolution that equals a causal one for a single frame: [B, in, 1, H, W] to [B, out, 1, H', W']."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1].detach().clone())
        self.bias = conv.bias
        self.stride, self.padding = conv.stride[1:], tuple(size // 2 for size in conv.kernel_size[1:])

    def forward(self, x: Tensor, cache: None = None) -> Tensor:  # noqa: ARG002 - for earlier frames
        return functional.conv2d(x.squeeze(2), self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


def check_vae(base: BaseModel) -> None:
    """Check by the files' headers that the base model's VAE is the one of Qwen-Image.

    Raises:
        ModelFileError: it is not, or a file is damaged.
    """
    place = base.folder.vae
    if place.is_file():
        _empty_for(_without_values(_open(place)), place)
    else:
        _check_folder(place)


def _without_values(source: WeightSource) -> dict[str, Tensor]:
    """The weights on the meta device."""
    return {name: torch.empty(shape, device="meta") for name, shape in source.shapes.items()}


def _check_folder(place: Path) -> None:
    """Check the class, the configuration, and the names and shapes of the weights. diffusers would draw missing ones.

    Raises:
        ModelFileError: they aren't those of Qwen-Image's VAE.
    """
    with explained_imports("diffusers"):
        from diffusers import AutoencoderKLQwenImage

    config = read_json(place / "config.json")
    if (name := config.get("_class_name")) != "AutoencoderKLQwenImage":
        raise ModelFileError(f"The VAE in {place} has the class {brief(name)}. {instead_of('vae')}")
    weights = _without_values(open_weights(place, instead=instead_of("vae")))
    with config_errors(place / "config.json"), torch.device("meta"):
        vae: AutoencoderKLQwenImage = AutoencoderKLQwenImage.from_config(config)  # type: ignore[assignment]
        of_latents = (vae.config.z_dim, len(vae.config.latents_mean), len(vae.config.latents_std))
        of_pictures = vae.config.get("input_channels", 3)
    if of_pictures != 3 or set(of_latents) != {LATENT_CHANNELS}:
        raise ModelFileError(
            f"The VAE in {place} is not Qwen-Image's: it has {of_pictures} picture channels and {of_latents[0]} latent "
            f"channels instead of 3 and {LATENT_CHANNELS}{_other_vae(weights)}. {instead_of('vae')}"
        )
    _check_weights(weights, vae, place)


def _open(place: Path) -> WeightSource:
    if place.suffix == ".gguf":
        raise ModelFileError(f"{place.name} is a GGUF file, which a VAE can't be read from. {instead_of('vae')}")
    return open_weights(place, ("vae.", "first_stage_model."), instead_of("vae"))


def _from_folder(place: Path, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    from diffusers import AutoencoderKLQwenImage

    _check_folder(place)
    try:
        return AutoencoderKLQwenImage.from_pretrained(place, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"The VAE in {place} can't be loaded ({reason_of(error)}). Download it again.") from error


def _from_file(place: Path, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    """Load a VAE with Qwen-Image's depth and the file's width. Weight names may be Wan's or diffusers'."""
    source = _open(place)
    _empty_for(_without_values(source), place)
    with source.opened() as read:
        vae, weights = _empty_for({name: read(name).dequantise(dtype) for name in source.shapes}, place)
    vae.load_state_dict(weights, assign=True)
    return vae


def _empty_for(weights: dict[str, Tensor], place: Path) -> tuple[AutoencoderKLQwenImage, dict[str, Tensor]]:
    """A VAE on the meta device as wide as these weights, and the weights by diffusers' names.

    Raises:
        ModelFileError: they aren't those of Qwen-Image's VAE.
    """
    with explained_imports("diffusers"):
        from diffusers import AutoencoderKLQwenImage
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if _WAN_MARK in weights:
        weights = convert_wan_vae_to_diffusers(weights)
    if _WIDTH_FROM not in weights or not weights[_WIDTH_FROM].ndim:
        lacks = f"{_WAN_MARK} and no {_WIDTH_FROM}"
        raise ModelFileError(f"{wrong_kind(place.name, 'a Qwen-Image VAE', lacks, weights)} {instead_of('vae')}")
    with torch.device("meta"):  # drawing initial weights takes longer than reading the file's
        vae = AutoencoderKLQwenImage(base_dim=len(weights[_WIDTH_FROM]))
    _check_weights(weights, vae, place)
    return vae, weights


def _check_weights(weights: dict[str, Tensor], vae: AutoencoderKLQwenImage, place: Path) -> None:
    """Raises ModelFileError if the weights aren't exactly those of this VAE."""
    wanted = vae.state_dict()
    wrong = [name for name, each in wanted.items() if name not in weights or weights[name].shape != each.shape]
    if wrong or len(weights) != len(wanted):
        unknown = [name for name in weights if name not in wanted]
        shown_place = place if place.is_dir() else place.name
        raise ModelFileError(
            f"{shown_place} is not a Qwen-Image VAE, or incomplete: {len(wrong)} of {len(wanted)} weights are missing "
            f"or have the wrong shape, {len(unknown)} are unknown (first: {shown((wrong + unknown)[0])})"
            f"{_other_vae(weights)}. {instead_of('vae')}"
        )


def _other_vae(weights: dict[str, Tensor]) -> str:
    """What a VAE with Qwen-Image's names but other shapes probably is, as the end of a sentence."""
    first = weights.get("encoder.conv_in.weight")
    channels = first.shape[1] if first is not None and first.ndim > 1 else 3
    return {4: "; it looks like the VAE of Qwen-Image-Layered", 12: "; it looks like a VAE of Wan 2.2"}.get(
        channels, ""
    )


def batch_pixels(free: int, element_bytes: int) -> int:
    """The pixels that `encode_pictures` takes at a time so that it needs at most `free` bytes, up to 4 megapixels."""
    return max(0, min(_BATCH_PIXELS, (free - GAPS) // (ENCODING_ELEMENTS * element_bytes)))


def encode_pictures(vae: AutoencoderKLQwenImage, pictures: Iterable[Tensor], batch_pixels: int = 0) -> Iterator[Tensor]:
    """Encode pictures [3, H, W] in 0..1 to normalised latents [C, H/8, W/8], the posterior's mode. They are float32 on
    the VAE's device.

    Consecutive pictures of one size share a forward pass, up to `batch_pixels` pixels. Sides are cropped centrally to
    multiples of 8, as in ComfyUI's VAE.
    """
    for batch in in_batches(pictures, batch_pixels, _pixels):
        yield from _encode(vae, torch.stack(batch))


def encode_picture(vae: AutoencoderKLQwenImage, picture: Tensor) -> Tensor:
    """`encode_pictures` for one picture, with the latents on the CPU."""
    return next(encode_pictures(vae, [picture])).cpu()


def _pixels(pictures: list[Tensor]) -> float:
    """Pixels of a batch; infinity if the sizes differ."""
    first = pictures[0].shape
    return len(pictures) * first[1] * first[2] if pictures[-1].shape == first else math.inf


@torch.no_grad()
def _encode(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    for dim in (2, 3):
        side = pictures.shape[dim]
        kept = side // VAE_FACTOR * VAE_FACTOR
        pictures = pictures.narrow(dim, (side % VAE_FACTOR) // 2, kept)
    pixels = (copied_to(vae.device, pictures) * 2 - 1).to(vae.dtype)
    latents = encode_raw(vae, pixels[:, :, None]).chunk(2, dim=1)[0][:, :, 0].float()
    return normalise(latents, vae.config.latents_mean, vae.config.latents_std)


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Decode normalised latents [C, H, W] to a picture [3, 8 H, 8 W] in 0..1 (float32, CPU)."""
    raw = denormalise(latents.float(), vae.config.latents_mean, vae.config.latents_std)
    pixels = decode_raw(vae, raw[None, :, None].to(vae.device, vae.dtype))[0, :, 0].cpu()
    return ((pixels.float() + 1) / 2).clamp(0, 1)
