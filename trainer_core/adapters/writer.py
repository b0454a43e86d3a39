"""Writes the LoRA file. It gets its final name only after it was read back and checked.

Tensors are named `diffusion_model.<module>.` (or `transformer.<module>.`, see `layer_prefix`) plus the part. LoRA:
`lora_A.weight` and `lora_B.weight`, which diffusers reads. DoRA: also `dora_scale` [out, 1], which diffusers ignores
with a warning. LoKr: `lokr_w1` and `lokr_w2`, or `lokr_w2_a` and `lokr_w2_b`, which diffusers refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..config import LayerPrefix, LoraConfig, LoraType, TrainConfig, digest, resume_key
from ..errors import ExportError
from ..files import read_metadata, read_tensors, write_tensors, written_beside
from ..packages import explained_imports
from ..qwen_image.flavours import FLAVOURS
from ..text import shown
from .frozen_loras import in_words
from .reader import LORA_TYPE, AdapterPart, Kronecker, LowRank, adapter_parts

ExtraCheck = Callable[[Path], None]
# Allowed relative error of a weight change after its two factors were rounded. For bfloat16 (8 bits of precision) the
# error is up to 2 * 2^-9; the limit leaves some room.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True)
class LoraMetadata:
    """The metadata in a LoRA file's header. `more`: entries that only some files have."""

    config: TrainConfig
    steps: int
    more: Mapping[str, str] = field(default_factory=dict)

    def as_header(self) -> dict[str, str]:
        """The header's entries: keys that LoRA managers read (modelspec.*, ss_*), and our own."""
        config, flavour = self.config, FLAVOURS[self.config.model.flavour]
        mixed = config.lora.rank_pattern or config.lora.init_lora
        rank = "Dynamic" if mixed else str(config.lora.lora_rank)  # as LoRA managers write it
        name = config.export.lora_name or Path(config.run_dir).name
        header = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"qwen_image-{flavour.name}/lora",
            "modelspec.implementation": "diffusers",
            **titled(name),
            "ss_base_model_version": "qwen_image",
            "ss_sd_model_name": flavour.released_as,
            "ss_network_module": "peft",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,  # alpha = rank: the true scale is folded into the tensors
            "ss_steps": str(self.steps),
            "ss_learning_rate": str(config.optimizer.learning_rate),
            "ss_seed": str(config.seed),
            LORA_TYPE: config.lora.lora_type,
            "qwen_edit_trainer.flavour": flavour.name,
            "qwen_edit_trainer.config_digest": digest(resume_key(config)),
        }
        if config.model.frozen_loras:
            header["qwen_edit_trainer.frozen_loras"] = in_words(config.model.frozen_loras)
        if config.export.trigger_words:
            header["modelspec.trigger_phrase"] = config.export.trigger_words
            header["trainedWords"] = config.export.trigger_words
        return {**header, **self.more}


def export_lora(
    tensors: Mapping[str, Tensor], path: Path, metadata: LoraMetadata, extra_check: ExtraCheck | None = None
) -> Path:
    """Write an adapter's tensors, as returned by `adapters.inject.for_file`, to a LoRA file.

    `extra_check` gets the temporary file's path and raises to refuse it.

    Raises:
        ExportError: a reader would not load the whole adapter, or would apply it differently than it was trained. An
            existing file at `path` is then left as it was.
    """
    config = metadata.config
    dtype = torch.bfloat16 if config.model.mixed_precision == "bf16" else torch.float32
    with written_beside(path) as temporary:
        stored = to_file_tensors(tensors, config.lora, dtype)
        named = {f"{config.export.layer_prefix}.{name}": tensor for name, tensor in stored.items()}
        write_tensors(temporary, named, metadata.as_header())
        check_file(temporary, tensors, config.lora, _TOLERANCE[dtype])
        if extra_check is not None:
            extra_check(temporary)
    return path


def titled(name: str) -> dict[str, str]:
    """The header's entries for the name of a file."""
    return {"modelspec.title": name, "ss_output_name": name}


def copy_lora(source: Path, path: Path, header: Mapping[str, str], extra_check: ExtraCheck | None = None) -> None:
    """Copy a LoRA file that `export_lora` wrote. `header` replaces entries of its header; `extra_check` is as there.

    Raises:
        ExportError: `extra_check` refuses the file.
        DamagedFileError, OSError: `source` can't be read.
    """
    with written_beside(path) as temporary:
        write_tensors(temporary, read_tensors(source), {**read_metadata(source), **header})
        if extra_check is not None:
            extra_check(temporary)


def check_file(path: Path, tensors: Mapping[str, Tensor], lora: LoraConfig, tolerance: float) -> None:
    """Read a file back (a LoRA with diffusers' loader) and compare every weight change with the trained one.

    Raises:
        ExportError: a tensor is missing or unknown, or a change differs by more than `tolerance` (relative).
    """
    stored = read_with_diffusers(path) if lora.lora_type == "lora" else read_tensors(path)
    found = {re.sub(_PREFIX, "", name): tensor for name, tensor in stored.items()}
    reader = "diffusers" if lora.lora_type == "lora" else "ComfyUI"
    wanted = to_file_tensors(tensors, lora, torch.float32)
    lost, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if lost or unknown:
        raise ExportError(
            f"{reader} would not load the whole LoRA file: {len(lost)} tensors are lost and {len(unknown)} are unknown "
            f"(first: {(lost + unknown)[0]}). The file was not saved; the checkpoint is kept. Report this as a bug."
        )
    layers = {name.rpartition(".")[0] for name in tensors}
    read, trained = (adapter_parts(each, layers, path.name) for each in (found, wanted))
    for layer, part in trained.items():
        error = _difference(read[layer], part)
        if not error <= tolerance:  # also true for NaN
            raise ExportError(
                f"The LoRA file changes {layer} differently than trained (relative error {error:.1e}, at most "
                f"{tolerance:.0e} is allowed). The file was not saved; the checkpoint is kept. Report this as a bug."
            )


def _difference(found: AdapterPart, wanted: AdapterPart) -> float:
    """The larger relative difference: of the weight changes, or of the rows' DoRA scales."""
    differences = [_relative_change(found, wanted)]
    if isinstance(found, LowRank) and isinstance(wanted, LowRank) and wanted.dora_scale is not None:
        scale = found.dora_scale if found.dora_scale is not None else torch.zeros(1)
        differences.append((scale - wanted.dora_scale).norm().double() / wanted.dora_scale.norm().clamp_min(1e-12))
    return float(torch.stack(differences).max())  # NaN if one is


def _relative_change(found: AdapterPart, wanted: AdapterPart) -> Tensor:
    """Norm of the difference of two weight changes, relative to `wanted`. NaN if a factor holds NaN.

    Computed from the factors: the products of all layers have as many elements as the model.
    """
    if isinstance(found, LowRank) and isinstance(wanted, LowRank):
        (up, down), (wanted_up, wanted_down) = found.factors(), wanted.factors()
        # up down - wanted_up wanted_down, as one product whose factors are small where the two are nearly equal
        change = _norm_of_product(torch.cat([up - wanted_up, wanted_up], 1), torch.cat([down, down - wanted_down]))
        return change / _norm_of_product(wanted_up, wanted_down).clamp_min(1e-12)
    assert isinstance(found, Kronecker)
    assert isinstance(wanted, Kronecker)
    (first, second), (wanted_first, wanted_second) = found.factors(), wanted.factors()
    by_first, by_second = first - wanted_first, second - wanted_second
    squares = (by_first.norm() * second.norm()) ** 2 + (wanted_first.norm() * by_second.norm()) ** 2
    both = 2 * (by_first * wanted_first).sum() * (second * by_second).sum()
    return (squares + both).clamp_min(0).sqrt() / (wanted_first.norm() * wanted_second.norm()).clamp_min(1e-12)


def _norm_of_product(up: Tensor, down: Tensor) -> Tensor:
    """The norm of up [o, r] @ down [r, i], without computing the product."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


def read_with_diffusers(path: Path) -> dict[str, Tensor]:
    """A LoRA file's tensors as diffusers' Qwen-Image pipelines read them, by diffusers' names.

    Raises:
        ExportError: diffusers refuses the file.
    """
    with explained_imports("diffusers"):
        from diffusers.loaders import QwenImageLoraLoaderMixin

    load: Any = QwenImageLoraLoaderMixin.lora_state_dict
    try:
        return dict(load(str(path.parent), weight_name=path.name, local_files_only=True))
    except (ValueError, KeyError) as error:  # diffusers found a name without its partner
        raise ExportError(
            f"diffusers would not load the LoRA file ({shown(str(error))}). The file was not saved; the checkpoint is "
            "kept. Report this as a bug."
        ) from error


# Where a file of each type can be used, as a note for the user.
READERS: dict[LoraType, str] = {
    "lora": "",
    "dora": "Use this DoRA in ComfyUI. diffusers would ignore its dora_scale and draw something else.",
    "lokr": "Use this LoKr in ComfyUI. diffusers can't load it.",
}
_PREFIX = rf"^({'|'.join(get_args(LayerPrefix))})\."
_SCALED = ("lora_B", "lokr_w1")


def to_file_tensors(tensors: Mapping[str, Tensor], lora: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert adapter tensors, keyed by their names in training, to the tensors of the file, without the prefix.

    The scale alpha / rank is folded into B or LoKr's w1, and no alpha tensor is written: readers interpret alpha
    differently, but without it all use scale 1. `dora_scale` stays in float32 because it multiplies
    the whole base weight, not only the change.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        value = tensor.detach().float().cpu()
        if part == "dora_scale":
            found[name] = value.unsqueeze(1)
            continue
        if part in _SCALED:
            value = value * _scale(tensors, module, lora)
        found[f"{name}.weight" if part.startswith("lora_") else name] = value.to(dtype)
    return found


def _scale(tensors: Mapping[str, Tensor], module: str, lora: LoraConfig) -> float:
    down = tensors.get(f"{module}.lora_A")
    return lora.scale_of(module, lora.rank_of(module) if down is None else down.shape[0])
