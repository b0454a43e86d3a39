"""Device memory of encoding: the VAE for pictures, then Qwen2.5-VL for prompts."""

from __future__ import annotations

import math
from fnmatch import fnmatch

from ..config import BaseModelPrecision
from ..qwen_image.base_model import BaseModel, compute_dtype
from ..qwen_image.folder import DEMO_FOLDER
from ..qwen_image.text_encoder_file import KEPT_LAYERS, stored_shapes
from ..qwen_image.vae_tiles import ENCODING_ELEMENTS
from .choose import SMALLER_PRECISIONS, Budget
from .network import WeightShapes, stored_bytes
from .plan import GAPS, GIB, VAE_WEIGHTS

_PROMPT_BYTES = GIB // 2  # activations of a prompt and of the pictures in it, without gradients


def text_encoder_bytes(base: BaseModel, precision: BaseModelPrecision, element_bytes: int) -> int:
    """Bytes of the text encoder's weights in a precision, from its files' headers; 0 for the demo's small one.

    `element_bytes`: of an unquantised weight.

    Raises:
        ModelFileError: the files aren't those of a Qwen2.5-VL.
    """
    place = base.folder.text_encoder
    if place.is_relative_to(DEMO_FOLDER):
        return 0
    shapes = stored_shapes(place)
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    everything = sum(math.prod(shape) for shape in shapes.values())
    matrices = tuple((shape[0], shape[1]) for name, shape in shapes.items() if _is_quantised(name, shape))
    others = everything - sum(rows * columns for rows, columns in matrices)
    in_file = sum(file.stat().st_size for file in files) / everything
    return stored_bytes(WeightShapes(matrices, others), precision, element_bytes, in_file=in_file)


def encoding_in_words(base: BaseModel, largest_picture: int, budget: Budget) -> tuple[str, bool]:
    """Report lines, and whether encoding fits. `largest_picture` is in pixels."""
    model = base.config
    element_bytes = 4 if budget.is_shared else compute_dtype(model).itemsize  # on the CPU, encoding computes in float32
    pictures = element_bytes * (VAE_WEIGHTS + ENCODING_ELEMENTS * largest_picture)
    weights = text_encoder_bytes(base, model.text_encoder_precision, element_bytes)
    prompts = weights + _PROMPT_BYTES
    needed = max(pictures, prompts) + GAPS
    fits = needed <= budget.device_bytes
    lines = [
        f"Encoding, before training: {pictures / GIB:.1f} GiB for pictures, {prompts / GIB:.1f} GiB for prompts "
        f"(text encoder {weights / GIB:.1f}, text_encoder_precision {model.text_encoder_precision}).",
        f"Encoding {'fits' if fits else 'does not fit'}: it needs {needed / GIB:.1f} GiB of device memory (with a "
        f"margin of {GAPS / GIB:.1f} GiB), {budget.device_bytes / GIB:.1f} GiB available.",
    ]
    if not fits:
        lines.append(_advice(base, pictures, budget))
    return "\n".join(lines), fits


def _advice(base: BaseModel, pictures: int, budget: Budget) -> str:
    if pictures + GAPS > budget.device_bytes:
        return "Lower resolution or the size of the references."
    for precision in SMALLER_PRECISIONS:
        smaller = text_encoder_bytes(base, precision, compute_dtype(base.config).itemsize)
        if smaller + _PROMPT_BYTES + GAPS <= budget.device_bytes:
            return f"Set text_encoder_precision to {precision}, which needs {smaller / GIB:.1f} GiB."
    return "Encode on a larger device, or once on the CPU (device cpu); training then reads everything from the cache."


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    layer, _, kind = name.rpartition(".")
    is_linear = kind == "weight" and len(shape) == 2 and not layer.endswith("embed_tokens")
    return is_linear and not any(fnmatch(layer, pattern) for pattern in KEPT_LAYERS)
