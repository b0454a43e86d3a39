"""Tells from a file's header or a folder's configuration whether it is an edit model, which one, and how it is stored.

It is quick, because menus list many files: it looks for a few names in the header and parses nothing. What it says is
a guess that `BaseModel` checks before anything is trained.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .. import json_text
from ..config import BaseModelPrecision, FlavourName
from ..errors import ModelFileError, TrainerError
from .flavours import FLAVOURS
from .recognise import LAYERED_MARKS

Stored = Literal["plain", "fp8", "int8", "nf4", "gguf"]
"""How a transformer's weights are stored. plain: in bf16, fp16 or fp32."""

_CLASS = "QwenImageTransformer2DModel"
_MAX_HEADER = 2**24  # bytes; a large model's has a few hundred KiB
_GGUF_BYTES = 2**21  # the names of all weights lie within them
_IN_ALL = (b"transformer_blocks.0.attn.add_k_proj.", b"txt_norm.weight", b"img_in.weight", b"proj_out.weight")
_IN_OTHERS = (b"controlnet_blocks.", *(mark.encode() for mark in LAYERED_MARKS))
_IN_TEXT_ENCODER = (b"visual.blocks.0.attn.qkv.bias", b"layers.27.self_attn.k_proj.bias")
_IN_3B = (b"layers.28.self_attn.",)
_ZERO_COND_T = b"__index_timestep_zero__"


@dataclass(frozen=True, slots=True)
class Installed:
    """A transformer that can be trained on. `flavour` is None if only its user knows which release it is."""

    flavour: FlavourName | None
    stored: Stored


def installed_at(place: Path | str) -> Installed | None:
    """What the file or the diffusers folder of a transformer is; None if it is no Qwen-Image edit model.

    What a file's header says is kept until the file's size or modification time changes.
    """
    try:
        header = _header_of(str(place))
        if header is None:
            return _folder(Path(place))
    except (OSError, TrainerError):
        return None
    if not header.is_transformer:
        return None
    return Installed(_zero_cond_t() if header.is_2511 else flavour_by_name(Path(place).stem), header.stored)


def fitting_precision(stored: Stored, wanted: BaseModelPrecision) -> BaseModelPrecision:
    """The `base_model_precision` for weights that are stored so, if `wanted` is that for bf16 weights.

    fp8 and int8 weights stay as they are, because another 8-bit format would round them a second time. Only NF4 still
    makes them smaller.
    """
    if stored == "nf4":
        return "nf4-bnb"
    return "file" if stored in ("fp8", "int8") and wanted != "nf4-bnb" else wanted


def flavour_by_name(name: str) -> FlavourName | None:
    """The flavour that the name of a model says; None if it doesn't say one."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    for row in FLAVOURS.values():
        if row.release.isdigit() and re.search(rf"(?<!\d){row.release}(?!\d)", plain):  # not in a date
            return row.name
    is_first = "qwen_image_edit" in plain and not re.search(r"plus|\d{4}|_v[2-9]|lightning|rapid", plain)
    return "edit-v1" if is_first else None


def is_text_encoder(path: Path) -> bool:
    """Whether a file is Qwen2.5-VL-7B by its header. The smaller Qwen2.5-VL-3B has more layers."""
    try:
        header = _header_of(str(path))
    except OSError:
        return False
    return header is not None and header.is_text_encoder


class _Header(NamedTuple):
    """What the header of a weight file says. `is_2511`: it has ComfyUI's mark of that release."""

    is_transformer: bool = False
    is_2511: bool = False
    stored: Stored = "plain"
    is_text_encoder: bool = False


def _header_of(path: str) -> _Header | None:
    """The header of a file; None for a folder."""
    found = os.stat(path)  # noqa: PTH116 - menus ask for hundreds of files, and pathlib is slow
    if stat.S_ISDIR(found.st_mode):
        return None
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would never end
        return _Header()
    return _read_header(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8192)
def _read_header(path: str, _changed: int, size: int) -> _Header:
    is_gguf = path.endswith(".gguf")
    with Path(path).open("rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if is_gguf:
            header = file.read(_GGUF_BYTES) if begin.startswith(b"GGUF") else b""
        else:
            header = file.read(length) if length < min(size, _MAX_HEADER) else b""
    return _Header(
        is_transformer=_has(header, _IN_ALL, _IN_OTHERS),
        is_2511=_ZERO_COND_T in header,
        stored="gguf" if is_gguf else _stored(header),
        is_text_encoder=_has(header, _IN_TEXT_ENCODER, _IN_3B),
    )


def _has(header: bytes, these: Sequence[bytes], not_these: Sequence[bytes]) -> bool:
    return all(mark in header for mark in these) and not any(mark in header for mark in not_these)


def _stored(header: bytes) -> Stored:
    if b"bitsandbytes__nf4" in header:
        return "nf4"
    if b'"F8_E4M3"' in header or b'"F8_E5M2"' in header:
        return "fp8"
    return "int8" if b'"I8"' in header else "plain"


def _zero_cond_t() -> FlavourName:
    (found,) = (row for row in FLAVOURS.values() if row.zero_cond_t)
    return found.name


def _folder(place: Path) -> Installed | None:
    config, index = _object(place / "config.json"), place.parent / "model_index.json"
    pipeline = str(_object(index).get("_class_name", "")) if index.is_file() else ""
    is_other = config.get("use_additional_t_cond") or config.get("use_layer3d_rope")
    is_other = is_other or (pipeline.startswith("QwenImage") and "Edit" not in pipeline)
    files = sorted(place.glob("*.safetensors"))
    if config.get("_class_name") != _CLASS or is_other or not files:
        return None
    rows: list[FlavourName] = [
        row.name for row in FLAVOURS.values() if row.pipeline == pipeline and not row.zero_cond_t
    ]
    name = place.parent.name if place.name == "transformer" else place.name
    flavour = rows[0] if len(rows) == 1 else flavour_by_name(name)
    if config.get("zero_cond_t"):
        flavour = _zero_cond_t()
    header = _header_of(str(files[0]))
    return Installed(flavour, header.stored) if header else None


def _object(path: Path) -> dict[str, object]:
    values = json_text.read_json(path, finite=False, error=ModelFileError)
    return values if isinstance(values, dict) else {}
