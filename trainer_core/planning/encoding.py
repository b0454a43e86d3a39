"""Device memory of encoding: the VAE for pictures, then Qwen2.5-VL for prompts."""

from __future__ import annotations

import math

from ..qwen_image.base_model import BaseModel, compute_dtype
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.text_encoder_size import TextEncoderSize, text_encoder_size
from ..qwen_image.vae import GAPS, VAE_WEIGHTS, batch_pixels
from ..qwen_image.vae_tiles import ENCODING_ELEMENTS, least_encoding_bytes
from .choose import SMALLER_PRECISIONS, Budget
from .plan import GIB
from .workload import VISION_PATCH


def encoding_in_words(base: BaseModel, largest_picture: int, budget: Budget) -> tuple[str, bool]:
    """Report lines, and whether encoding fits. `largest_picture` is in pixels."""
    model = base.config
    element_bytes = 4 if budget.is_shared else compute_dtype(model).itemsize  # on the CPU, encoding computes in float32
    pictures = _picture_bytes(largest_picture, element_bytes, budget)
    size = text_encoder_size(base, element_bytes, model.text_encoder_precision)
    seen = FLAVOURS[model.flavour].vision_area // VISION_PATCH**2
    streamed = 0 if budget.is_shared else size.streamed_layers(budget.device_bytes, seen)
    prompts = size.device_bytes(streamed, seen)
    host = size.embeddings + streamed * size.layer
    if budget.is_shared:
        prompts, host = prompts + host, 0
    needed = max(pictures, prompts) + GAPS
    fits = needed <= budget.device_bytes and host <= budget.host_bytes
    lines = [
        f"Encoding, before training: {pictures / GIB:.1f} GiB for pictures, {prompts / GIB:.1f} GiB for prompts "
        f"(text encoder {size.weights / GIB:.1f}, text_encoder_precision {model.text_encoder_precision}).",
        f"Encoding {'fits' if fits else 'does not fit'}: it needs {needed / GIB:.1f} GiB of "
        f"{'RAM' if budget.is_shared else 'VRAM'} ({budget.device_bytes / GIB:.1f} GiB free), with a margin of "
        f"{GAPS / GIB:.1f} GiB.",
    ]
    if streamed:
        lines.insert(1, _streaming(base, size, streamed, host, budget))
    if not fits:
        lines.append(_advice(host, budget))
    return "\n".join(lines), fits


def _picture_bytes(largest_picture: int, element_bytes: int, budget: Budget) -> int:
    """Device memory of the VAE with a batch of pictures, with the largest picture, or with its tiles if that is all
    that fits."""
    weights = VAE_WEIGHTS * element_bytes
    free = budget.device_bytes - weights
    together = 0 if budget.is_shared else batch_pixels(free, element_bytes)
    whole = ENCODING_ELEMENTS * element_bytes * max(together, largest_picture)
    side = math.isqrt(largest_picture)
    return weights + (whole if whole + GAPS <= free else least_encoding_bytes(side, side, element_bytes))


def _streaming(base: BaseModel, size: TextEncoderSize, streamed: int, host: int, budget: Budget) -> str:
    words = (
        f"The text encoder does not fit: {streamed} of its {size.layers} layers are streamed from RAM "
        f"({host / GIB:.1f} GiB there), which takes longer."
    )
    for precision in SMALLER_PRECISIONS:
        smaller = text_encoder_size(base, size.element_bytes, precision)
        if smaller.weights < size.weights and not smaller.streamed_layers(budget.device_bytes):
            return f"{words} With text_encoder_precision {precision} it would fit."
    return words


def _advice(host: int, budget: Budget) -> str:
    if host > budget.host_bytes:
        return (
            f"It needs {host / GIB:.1f} GiB of RAM, but {budget.host_bytes / GIB:.1f} GiB are free. Close "
            "other programs or set text_encoder_precision to nf4-bnb."
        )
    return (
        "Lower resolution or the size of the references, encode on a larger device, or encode once on the CPU (device "
        "cpu); training then reads everything from the cache."
    )
