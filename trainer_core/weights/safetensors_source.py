"""Reads weights from .safetensors files: unquantised, fp8 and int8 in ComfyUI's layouts, NF4 in diffusers' layout.

ComfyUI's older layout marks a file with an entry `scaled_fp8` and stores scales as `<layer>.scale_weight`. The newer
one stores scales as `<layer>.weight_scale`, and the format as JSON: per layer in `<layer>.comfy_quant`, or for the
whole file in the header under `_quantization_metadata`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelFileError
from ..json_text import parse_json
from ..text import brief, reason_of, shown
from .packed import packed_layout
from .stored import FP8, Read, StoredWeight

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
_SCALES = ("scale_weight", "weight_scale")
_COMPANIONS = (*_SCALES, "scale_input", "input_scale", "comfy_quant")
_MARKERS = ("scaled_fp8", "__index_timestep_zero__", "__layered__")
_NF4_STATE = "quant_state.bitsandbytes__nf4"
_NF4_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _NF4_STATE)
_MAX_JSON = 4096  # bytes of a layer's format or NF4 state; a real one has some hundred
_TYPES = ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "I8")  # as safetensors names them


class SafetensorsSource:
    """A WeightSource for one or several .safetensors files."""

    def __init__(self, place: Path, files: Sequence[Path], prefixes: Sequence[str] = (), instead: str = "") -> None:
        self.place, self._instead = place, instead or "Choose a bf16, fp8 or int8 file."
        self._file_of: dict[str, Path] = {}
        stored: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        self._layers: dict[str, Any] = {}
        for path in files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    part = file.get_slice(name)
                    self._file_of[name], stored[name] = path, tuple(part.get_shape())
                    self._types[name] = str(part.get_dtype())
                self._layers |= _header_layers(path, file.metadata() or {})
        self._stored, self._prefix = stored, _common_prefix(stored, prefixes)
        names = {name.removeprefix(self._prefix): shape for name, shape in stored.items() if self._has_prefix(name)}
        self.markers = frozenset(name for name in names if name in _MARKERS)
        self._entries = frozenset(names)
        weights = {name: shape for name, shape in names.items() if not self._is_companion(name)}
        packed = [name for name in weights if f"{name}.{_NF4_STATE}" in names]
        self.shapes = {**weights, **self._unpacked_shapes(packed)}
        self.packing = "NF4" if packed else ""
        self._check_formats(names)

    @property
    def is_rotated(self) -> bool:
        """Implements WeightSource.is_rotated. Reads the layers' settings."""
        layers = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        with self._files() as get:
            return any(self._settings_of(layer, get).get("convrot") for layer in layers)

    def _has_prefix(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def _check_formats(self, names: Mapping[str, tuple[int, ...]]) -> None:
        """Check that each weight's format can be read, from names, types, shapes and the layers' settings.

        Raises:
            ModelFileError: some can't; names the format, and one of the weights.
        """
        layout, example = packed_layout(names)
        if layout:
            raise self._unreadable(layout, example)
        with self._files() as get:
            for name in self.shapes:
                layer, _, kind = name.rpartition(".")
                if kind not in ("weight", "bias"):  # other entries of a file are not loaded
                    continue
                settings = self._settings_of(layer, get) if kind == "weight" else {}
                if unreadable := self._unreadable_format(name, layer, settings):
                    raise self._unreadable(unreadable, name)

    def _unreadable_format(self, name: str, layer: str, settings: dict[str, Any]) -> str:
        """The format of a weight that can't be read; empty if it can."""
        stored, wanted, shape = self._types[self._prefix + name], settings.get("format"), self.shapes[name]
        if wanted is not None and (not isinstance(wanted, str) or wanted not in FORMATS):
            return f"ComfyUI's format {brief(wanted)}"
        if f"{name}.{_NF4_STATE}" in self._entries:
            return ""
        if stored not in _TYPES and not (stored == "U8" and wanted is not None and FORMATS[wanted] in FP8):
            return f"the type {stored} without a known format"
        scale = next((f"{layer}.{each}" for each in _SCALES if f"{layer}.{each}" in self._entries), "")
        if scale and len(shape) == 2 and math.prod(self._shape_of(scale)) not in (1, shape[0]):
            return f"blocks, with scales of shape {list(self._shape_of(scale))}"
        if len(shape) == 2:
            self._rotation(name, settings)
        return "int8 without a scale" if stored == "I8" and not (scale and len(shape) == 2) else ""

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._stored[self._prefix + name]

    def _unreadable(self, format_: str, name: str) -> ModelFileError:
        return ModelFileError(
            f"{self.place.name} stores weights such as {shown(name)} in {format_}, which can't be trained on. "
            f"{self._instead}"
        )

    def _is_companion(self, name: str) -> bool:
        layer, _, last = name.rpartition(".")
        if name in _MARKERS or (last in _COMPANIONS and f"{layer}.weight" in self._entries):
            return True
        return any(name.endswith(f".weight.{each}") for each in _NF4_COMPANIONS)

    def _unpacked_shapes(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        if not names:
            return {}
        with self._files() as get:
            states = {name: self._json_of(f"{name}.{_NF4_STATE}", get) for name in names}
        return {name: self._shape_in(state, name) for name, state in states.items()}

    def _shape_in(self, state: dict[str, Any], name: str) -> tuple[int, ...]:
        shape = state.get("shape")
        if not isinstance(shape, list) or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ModelFileError(f"{self.place.name} states no shape for {shown(name)}. Download it again.")
        return tuple(shape)

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
        if codes.dtype == torch.uint8 and (unreadable := self._unreadable_format(name, layer, settings)):
            raise self._unreadable(unreadable, name)
        if codes.dtype == torch.uint8:
            codes = codes.view(FORMATS[settings["format"]])
        if codes.dtype not in (*FP8, torch.int8):
            return StoredWeight(codes)
        if scale is not None:
            scale = scale.float().reshape(()) if scale.numel() == 1 else scale.float().reshape(-1, 1)
        return StoredWeight(codes, scale, self._rotation(name, settings))

    def _settings_of(self, layer: str, get: Any) -> dict[str, Any]:
        """The layer's format settings in ComfyUI's newer layout; empty if there are none."""
        if f"{layer}.comfy_quant" in self._entries:
            return self._json_of(f"{layer}.comfy_quant", get)
        found = self._layers.get(layer) or self._layers.get(self._prefix + layer) or {}
        return found if isinstance(found, dict) else {}

    def _json_of(self, name: str, get: Any) -> dict[str, Any]:
        """The JSON object that a tensor's bytes are."""
        is_text = self._types[self._prefix + name] == "U8" and math.prod(self._shape_of(name)) <= _MAX_JSON
        text = bytes(get(name).flatten().tolist()) if is_text else b""
        return _parsed(text.rstrip(b"\0 "), f"{shown(name)} in {self.place.name}")

    def _rotation(self, name: str, settings: dict[str, Any]) -> int:
        if not settings.get("convrot"):
            return 0
        size, columns = settings.get("convrot_groupsize", 256), self.shapes[name][-1]
        if (
            not isinstance(size, int)
            or not 4 <= size <= columns
            or not math.log(size, 4).is_integer()
            or columns % size
        ):
            raise ModelFileError(
                f"{self.place.name} stores {shown(name)} rotated in groups of {brief(size)}. The group size must be a "
                f"power of four that divides its {columns} columns. {self._instead}"
            )
        return size


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path.name} is not a complete .safetensors file ({reason_of(error)}). Download it again."
        ) from error
    with handle as file:
        yield file


def _common_prefix(names: dict[str, Any], prefixes: Sequence[str]) -> str:
    return next((prefix for prefix in prefixes if sum(name.startswith(prefix) for name in names) > 5), "")


def _header_layers(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get("_quantization_metadata")
    layers = _parsed(text, f"_quantization_metadata in the header of {path.name}").get("layers") if text else None
    return layers if isinstance(layers, dict) else {}


def _parsed(text: str | bytes, where: str) -> dict[str, Any]:
    """The format of a layer or file, a JSON object."""
    values = parse_json(text, where, error=ModelFileError)
    if not isinstance(values, dict):
        raise ModelFileError(f"{where} is not a JSON object. Download the file again.")
    return values
