"""Reads weights from .safetensors files: unquantised, fp8 and int8 in ComfyUI's layouts, NF4 in diffusers' layout.

ComfyUI's older layout marks a file with an entry `scaled_fp8` and stores scales as `<layer>.scale_weight`. The newer
one stores scales as `<layer>.weight_scale`, and the format as JSON: per layer in `<layer>.comfy_quant`, or for the
whole file in the header under `_quantization_metadata`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelFileError
from .stored import FP8, Read, StoredWeight

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
_SCALES = ("scale_weight", "weight_scale")
_COMPANIONS = (*_SCALES, "scale_input", "input_scale", "comfy_quant")
_MARKERS = ("scaled_fp8", "__index_timestep_zero__", "__layered__")
_NF4_STATE = "quant_state.bitsandbytes__nf4"
_NF4_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _NF4_STATE)
_MAX_JSON = 4096  # bytes read of a layer's comfy_quant; a real one has under a hundred
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, *FP8)


class SafetensorsSource:
    """A WeightSource for one or several .safetensors files."""

    def __init__(self, place: Path, files: Sequence[Path], prefixes: Sequence[str] = ()) -> None:
        self.place = place
        self._file_of: dict[str, Path] = {}
        stored: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        for path in files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    self._file_of[name], stored[name] = path, tuple(file.get_slice(name).get_shape())
                self._layers |= _header_layers(path, file.metadata() or {})
        self._prefix = _common_prefix(stored, prefixes)
        names = {name.removeprefix(self._prefix): shape for name, shape in stored.items() if self._has_prefix(name)}
        self.markers = frozenset(name for name in names if name in _MARKERS)
        self._entries = frozenset(names)
        weights = {name: shape for name, shape in names.items() if not self._is_companion(name)}
        packed = [name for name in weights if f"{name}.{_NF4_STATE}" in names]
        self.shapes = {**weights, **self._unpacked_shapes(packed)}
        self.packing = "NF4" if packed else ""

    @property
    def is_rotated(self) -> bool:
        """Implements WeightSource.is_rotated. Reads the layers' settings."""
        layers = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        with self._files() as get:
            return any(self._settings_of(layer, get).get("convrot") for layer in layers)

    def _has_prefix(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def _is_companion(self, name: str) -> bool:
        layer, _, last = name.rpartition(".")
        if name in _MARKERS or (last in _COMPANIONS and f"{layer}.weight" in self._entries):
            return True
        return any(name.endswith(f".weight.{each}") for each in _NF4_COMPANIONS)

    def _unpacked_shapes(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        if not names:
            return {}
        with self._files() as get:
            states = {name: bytes(get(f"{name}.{_NF4_STATE}").tolist()) for name in names}
        return {name: tuple(json.loads(state)["shape"]) for name, state in states.items()}

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Implements WeightSource.opened."""
        with self._files() as get:
            yield lambda name: self._read(name, get)

    @contextmanager
    def _files(self) -> Iterator[Any]:
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}

            def get(name: str) -> Tensor:
                path = self._file_of[self._prefix + name]
                if path not in handles:
                    handles[path] = stack.enter_context(_open(path))
                return handles[path].get_tensor(self._prefix + name)

            yield get

    def _read(self, name: str, get: Any) -> StoredWeight:
        codes = get(name)
        if f"{name}.{_NF4_STATE}" in self._entries:
            keys = [each for each in _NF4_COMPANIONS if f"{name}.{each}" in self._entries]
            return StoredWeight(codes, nf4={key: get(f"{name}.{key}") for key in keys})
        layer = name.removesuffix(".weight") if name.endswith(".weight") else ""
        settings = self._settings_of(layer, get) if layer else {}
        scale_name = next((f"{layer}.{each}" for each in _SCALES if f"{layer}.{each}" in self._entries), "")
        scale = get(scale_name) if scale_name and codes.ndim == 2 else None
        codes = self._codes_in_format(name, codes, settings)
        if codes.dtype in (*FP8, torch.int8):
            scale = self._checked_scale(name, codes, scale)
            return StoredWeight(codes, scale, self._rotation(name, codes, settings))
        return StoredWeight(codes)

    def _settings_of(self, layer: str, get: Any) -> dict[str, Any]:
        """The layer's format settings in ComfyUI's newer layout; empty if there are none."""
        if f"{layer}.comfy_quant" in self._entries:
            entry = get(f"{layer}.comfy_quant")
            return _parsed(bytes(entry.view(torch.uint8).flatten()[:_MAX_JSON].tolist()), self.place.name, layer)
        return self._layers.get(layer) or self._layers.get(self._prefix + layer) or {}

    def _codes_in_format(self, name: str, codes: Tensor, settings: dict[str, Any]) -> Tensor:
        wanted = settings.get("format")
        if wanted is not None and wanted not in FORMATS:
            raise ModelFileError(
                f"{self.place.name} stores {name} in the unsupported format {wanted!r}. Choose a file in bf16, fp16, "
                f"fp32, {' or '.join(FORMATS)}."
            )
        if wanted is not None and codes.dtype == torch.uint8 and FORMATS[wanted] != torch.int8:
            codes = codes.view(FORMATS[wanted])
        if codes.dtype not in _DTYPES or codes.dtype == torch.uint8:
            raise ModelFileError(
                f"{self.place.name} stores {name} as {str(codes.dtype).removeprefix('torch.')} and doesn't state the "
                "format. Choose a bf16, fp8 or int8 file."
            )
        return codes

    def _checked_scale(self, name: str, codes: Tensor, scale: Tensor | None) -> Tensor | None:
        if scale is None:
            if codes.dtype == torch.int8:
                raise ModelFileError(f"{self.place.name} stores {name} as int8 without a scale. Download it again.")
            return None
        if scale.numel() not in (1, len(codes)):
            raise ModelFileError(
                f"{self.place.name} stores {name} with scales of shape {list(scale.shape)}; only one scale per weight "
                "or per row is supported. Choose another file."
            )
        return scale.float().reshape(()) if scale.numel() == 1 else scale.float().reshape(-1, 1)

    def _rotation(self, name: str, codes: Tensor, settings: dict[str, Any]) -> int:
        if not settings.get("convrot"):
            return 0
        size = settings.get("convrot_groupsize", 256)
        fits = isinstance(size, int) and size >= 4 and math.log(size, 4).is_integer() and codes.shape[-1] % size == 0
        if not fits:
            raise ModelFileError(
                f"{self.place.name} stores {name} rotated in groups of {size!r}. The group size must be a power of "
                f"four that divides its {codes.shape[-1]} columns; choose another file."
            )
        return size


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path.name} is not a complete .safetensors file ({error}). Download it again."
        ) from error
    with handle as file:
        yield file


def _common_prefix(names: dict[str, Any], prefixes: Sequence[str]) -> str:
    return next((prefix for prefix in prefixes if sum(name.startswith(prefix) for name in names) > 5), "")


def _header_layers(path: Path, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    text = metadata.get("_quantization_metadata")
    return dict(_parsed(text.encode(), path.name, "all layers").get("layers", {})) if text else {}


def _parsed(text: bytes, file: str, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text.rstrip(b"\x00 ")))
    except (ValueError, TypeError) as error:
        raise ModelFileError(
            f"The format of {where} in {file} is not valid JSON ({error}). Download the file again."
        ) from error
