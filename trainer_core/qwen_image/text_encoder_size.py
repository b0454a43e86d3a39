"""The text encoder's memory: its weights, and which layers are streamed from host memory when it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from ..config import BaseModelPrecision
from ..precision.weight_bytes import WeightShapes, stored_bytes
from .base_model import BaseModel
from .folder import DEMO_FOLDER
from .text_encoder_file import KEPT_LAYERS, LAYERS, TOKEN_EMBEDDINGS, stored_shapes
from .vae import GAPS

STREAM_BUFFERS = 2  # device buffers that take turns: one computes while the other is filled
BATCH_TOKENS = 4096  # of pictures or prompts that share a forward pass on CUDA; a larger one is hardly faster
_TOKEN_ELEMENTS = 93_061  # working memory per token, at the peak in the vision tower (4 patches); 67,856 for prompts
_LIBRARIES = 100 * 2**20  # bytes of workspaces of cuBLAS and others, which torch's allocator counts

Shapes = Iterable[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderSize:
    """Bytes of the text encoder's weights.

    `layer`: of one of the language model's `layers`. `embeddings`: of the token embeddings, which stay in host memory.
    `others`: of the rest, which is mostly the vision tower. `dequantised`: of two copies of the largest quantised layer
    in the compute dtype; 0 if none is quantised. `element_bytes`: of an unquantised weight.
    """

    layers: int
    layer: int
    embeddings: int
    others: int
    dequantised: int
    element_bytes: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.embeddings + self.others + self.layers * self.layer

    def device_bytes(self, streamed: int, largest_picture: int = 0) -> int:
        """Device memory while encoding, at the peak, with so many streamed layers. `largest_picture`: its tokens."""
        resident = self.layers - streamed + min(streamed, STREAM_BUFFERS)
        batch = self.element_bytes * _TOKEN_ELEMENTS * max(BATCH_TOKENS, largest_picture)
        return self.others + resident * self.layer + self.dequantised + batch + _LIBRARIES

    def streamed_layers(self, free: int, largest_picture: int = 0) -> int:
        """The number of layers to stream so that encoding needs at most `free` bytes with a margin, if any does."""
        fitting = (n for n in range(self.layers) if self.device_bytes(n, largest_picture) + GAPS <= free)
        return next(fitting, self.layers)


def text_encoder_size(
    base: BaseModel, element_bytes: int, precision: BaseModelPrecision, *, with_head: bool = False
) -> TextEncoderSize:
    """The size of a base model's text encoder in a precision, from its files' headers. 0 for the demo's small one.

    `with_head`: its language head is loaded too. It counts as one of the `others`.

    Raises:
        ModelFileError: the files aren't those of a Qwen2.5-VL.
    """
    place = base.folder.text_encoder
    if place.is_relative_to(DEMO_FOLDER):
        return TextEncoderSize(layers=0, layer=0, embeddings=0, others=0, dequantised=0, element_bytes=element_bytes)
    shapes = stored_shapes(place, with_head=with_head)
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    in_file = sum(file.stat().st_size for file in files) / sum(map(math.prod, shapes.values()))

    def size_of(part: Shapes) -> int:
        return stored_bytes(_weight_shapes(part), precision, element_bytes, in_file=in_file)

    layers = {name.removeprefix(f"{LAYERS}.").split(".")[0] for name in shapes if name.startswith(f"{LAYERS}.")}
    first = [each for each in shapes.items() if each[0].startswith(f"{LAYERS}.0.")]
    embeddings = [each for each in shapes.items() if each[0].startswith(TOKEN_EMBEDDINGS)]
    others = [each for each in shapes.items() if not each[0].startswith((f"{LAYERS}.", TOKEN_EMBEDDINGS))]
    largest = max(rows * columns for rows, columns in _weight_shapes(first).matrices)
    return TextEncoderSize(
        layers=len(layers),
        layer=size_of(first),
        embeddings=size_of(embeddings),
        others=size_of(others),
        dequantised=0 if precision == "none" else 2 * largest * element_bytes,
        element_bytes=element_bytes,
    )


def spread(streamed: int, layers: int) -> tuple[int, ...]:
    """Numbers of the streamed layers, spread evenly: resident ones compute while the next streamed one is copied."""
    return tuple(number * layers // streamed for number in range(streamed))


def _weight_shapes(part: Shapes) -> WeightShapes:
    named = list(part)
    matrices = tuple((shape[0], shape[1]) for name, shape in named if _is_quantised(name, shape))
    everything = sum(math.prod(shape) for _, shape in named)
    return WeightShapes(matrices, everything - sum(rows * columns for rows, columns in matrices))


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    layer, _, kind = name.rpartition(".")
    is_linear = kind == "weight" and len(shape) == 2 and layer != TOKEN_EMBEDDINGS
    return is_linear and not any(fnmatch(layer, pattern) for pattern in KEPT_LAYERS)
