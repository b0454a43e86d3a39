"""The scale of a LoRA file's weight changes, where the file or its folder states alpha beside the tensors.

Programs keep alpha in one of three places. The first that is there applies:

1. a tensor `<layer>.alpha` (kohya, musubi-tuner, OneTrainer, LyCORIS, ComfyUI): the scale is alpha / rank;
2. `lora_adapter_metadata` in the header, peft's configuration as JSON (diffusers, SimpleTuner);
3. `adapter_config.json` beside the file, the same configuration (peft, diffusion-pipe).

Without any of them the scale is 1, as in ComfyUI and diffusers. The header's `ss_network_alpha` is not used: trainers
that write it also write alpha tensors, and musubi-tuner's converter multiplies them into the weights but keeps the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from ..json_text import parse_json, read_json
from ..text import brief

HEADER_KEY, KOHYAS_KEY = "lora_adapter_metadata", "ss_network_alpha"
CONFIG_FILE, MODEL_FILE = "adapter_config.json", "adapter_model.safetensors"
_COMPONENT = "transformer."  # a pipeline's part, before the keys in the header
_MAX_BYTES = 2**20  # of a configuration; a real one has a few KiB, or some hundred with patterns for every layer


@dataclass(frozen=True, slots=True)
class Scaling:
    """peft's configuration of an adapter, as far as it decides the scale. `place` says where it is, for messages."""

    place: str
    rank: float | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    use_rslora: bool = False
    use_dora: bool = False

    def scale_of(self, layer: str, rank: int | None) -> float:
        """The layer's scale, alpha / rank or alpha / √rank. `rank` is that of its tensors, None if they have none."""
        alpha, divisor = _matching(self.alpha_pattern, layer, self.alpha), rank or self.rank_of(layer)
        if alpha is None or not divisor:
            return 1.0
        return alpha / (math.sqrt(divisor) if self.use_rslora else divisor)

    def rank_of(self, layer: str) -> float | None:
        """The layer's rank as stated."""
        return _matching(self.rank_pattern, layer, self.rank)


def find_scaling(path: Path, header: Mapping[str, str], *, is_peft: bool) -> Scaling | None:
    """The configuration in a LoRA file's header, or else in the file beside it; None if there is neither.

    `adapter_config.json` describes `adapter_model.safetensors`, the only LoRA in its folder, or a file with peft's own
    names (`is_peft`).

    Raises:
        ModelFileError: the configuration can't be read, or its patterns are not names of layers.
    """
    if HEADER_KEY in header:
        where = f"{HEADER_KEY} in the header of {path.name}"
        values = parse_json(header[HEADER_KEY], where, max_bytes=_MAX_BYTES, error=ModelFileError)
        return _scaling(f"the header of {path.name}", _of_component(_object(values, where)))
    beside = path.with_name(CONFIG_FILE)
    if beside.is_file() and (is_peft or path.name == MODEL_FILE or len(list(path.parent.glob("*.safetensors"))) == 1):
        values = read_json(beside, max_bytes=_MAX_BYTES, error=ModelFileError)
        return _scaling(f"{CONFIG_FILE} beside {path.name}", _object(values, str(beside)))
    return None


def _object(values: Any, where: str) -> dict[str, Any]:
    if isinstance(values, dict):
        return values
    raise ModelFileError(f"{where} is not a JSON object. Download it again.")


def _of_component(values: dict[str, Any]) -> dict[str, Any]:
    """The transformer's settings: those below `transformer.`, or all of them if there are no components."""
    named = {key.removeprefix(_COMPONENT): value for key, value in values.items() if key.startswith(_COMPONENT)}
    return named or values


def _scaling(place: str, values: dict[str, Any]) -> Scaling:
    rank, alpha = (_number(values, key, place) for key in ("r", "lora_alpha" if "lora_alpha" in values else "alpha"))
    rank_pattern, alpha_pattern = (_pattern(values, key, place) for key in ("rank_pattern", "alpha_pattern"))
    flags = {key: values.get(key) is True for key in ("use_rslora", "use_dora")}
    return Scaling(place, rank, alpha, rank_pattern, alpha_pattern, **flags)


def _number(values: Mapping[str, Any], key: str, place: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # false for NaN
    if not is_number or (key == "r" and value <= 0):
        raise ModelFileError(f"{key} is {brief(value)} in {place}, which is not a usable number. Correct it there.")
    return float(value)


def _pattern(values: Mapping[str, Any], key: str, place: str) -> dict[str, float]:
    """`rank_pattern` or `alpha_pattern` by plain names. peft allows regular expressions; files contain names."""
    patterns = _object(values.get(key) or {}, f"{key} in {place}")
    found: dict[str, float] = {}
    for pattern in patterns:
        name = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix(_COMPONENT)
        if not name.replace(".", "").replace("_", "").isalnum():
            raise ModelFileError(
                f"{key} in {place} has the pattern {brief(pattern)}. Only names of layers are supported there, so "
                "the scale is not known. Choose a file with alpha tensors."
            )
        if (value := _number(patterns, pattern, place)) is not None:
            found[name] = value
    return found


def _matching(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    """The value for a layer by peft's rule: of the first pattern that is the layer's name or the end of it."""
    return next((value for name, value in patterns.items() if f".{layer}".endswith(f".{name}")), default)
