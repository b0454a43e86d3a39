"""Writes the LoRA file, and gives it its name only after others' readers have read it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LoraConfig, LoraType, TrainConfig, digest, resume_key
from ..errors import ExportError
from ..files import read_tensors, write_tensors, written_beside
from ..qwen_image.flavours import FLAVOURS
from .reader import AdapterPart, LowRank, adapter_parts

ExtraCheck = Callable[[Path], None]
# Relative error of a weight change after rounding its two factors: 2 * 2^-9 for bfloat16's 8 bits, with room.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True)
class LoraMetadata:
    """What the header says."""

    config: TrainConfig
    steps: int

    def as_header(self) -> dict[str, str]:
        """Keys that LoRA managers know (modelspec.*, ss_*) and our own."""
        config, flavour = self.config, FLAVOURS[self.config.model.flavour]
        mixed = config.lora.rank_pattern or config.lora.init_lora
        rank = "Dynamic" if mixed else str(config.lora.lora_rank)  # as LoRA managers write it
        name = config.export.lora_name or Path(config.run_dir).name
        header = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"qwen_image-{flavour.name}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": name,
            "ss_output_name": name,
            "ss_base_model_version": "qwen_image",
            "ss_sd_model_name": flavour.released_as,
            "ss_network_module": "peft",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,  # folded: the file applies at scale 1
            "ss_steps": str(self.steps),
            "ss_learning_rate": str(config.optimizer.learning_rate),
            "ss_seed": str(config.seed),
            LORA_TYPE: config.lora.lora_type,
            "qwen_edit_trainer.flavour": flavour.name,
            "qwen_edit_trainer.config_digest": digest(resume_key(config)),
        }
        if config.export.trigger_words:
            header["modelspec.trigger_phrase"] = config.export.trigger_words
            header["trainedWords"] = config.export.trigger_words
        return header


def export_lora(
    tensors: Mapping[str, Tensor], path: Path, metadata: LoraMetadata, extra_check: ExtraCheck | None = None
) -> Path:
    """Write an adapter's tensors, from `adapters.inject.for_file`, as a LoRA file.

    Raises:
        ExportError: a reader would not apply the whole adapter with the trained effect. Nothing has the file's name
            then; a file of that name from before is untouched.
    """
    config = metadata.config
    dtype = torch.bfloat16 if config.model.mixed_precision == "bf16" else torch.float32
    with written_beside(path) as temporary:
        write_tensors(temporary, to_file_tensors(tensors, config.lora, dtype), metadata.as_header())
        check_file(temporary, tensors, config.lora, _TOLERANCE[dtype])
        if extra_check is not None:
            extra_check(temporary)
    return path


def check_file(path: Path, tensors: Mapping[str, Tensor], lora: LoraConfig, tolerance: float) -> None:
    """Read a file back, a LoRA as diffusers' pipelines do, and compare every weight change with the trained one.

    Raises:
        ExportError: a key is lost or unknown, or a change differs by more than `tolerance` (relative).
    """
    found = read_with_diffusers(path) if lora.lora_type == "lora" else read_tensors(path)
    reader = "diffusers" if lora.lora_type == "lora" else "ComfyUI"
    wanted = to_file_tensors(tensors, lora, torch.float32)
    lost, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if lost or unknown:
        raise ExportError(
            f"The LoRA file would not load completely in {reader}: {len(lost)} tensors lost {lost[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}. The file was not saved; the checkpoint is kept."
        )
    layers = {name.rpartition(".")[0] for name in tensors}
    read, trained = (adapter_parts(each, layers, path.name) for each in (found, wanted))
    for layer, part in trained.items():
        error = _difference(read[layer], part)
        if not error <= tolerance:
            raise ExportError(
                f"The LoRA file changes {layer} by another amount than was trained (relative error {error:.1e}, "
                f"allowed {tolerance:.0e}). The file was not saved; the checkpoint is kept."
            )


def _difference(found: AdapterPart, wanted: AdapterPart) -> float:
    """Relative, of the change and of the scales of rows."""
    pairs = [(found.change(), wanted.change())]
    if isinstance(found, LowRank) and isinstance(wanted, LowRank) and wanted.dora_scale is not None:
        pairs.append((found.dora_scale if found.dora_scale is not None else torch.zeros(1), wanted.dora_scale))
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def read_with_diffusers(path: Path) -> dict[str, Tensor]:
    """Tensors of a LoRA file in any layout that diffusers' Qwen-Image pipelines read, in diffusers' names."""
    from diffusers.loaders import QwenImageLoraLoaderMixin

    state: Any = QwenImageLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True
    )
    return dict(state)


# What people have to know about a file of each kind.
READERS: dict[LoraType, str] = {
    "lora": "",
    "dora": "A DoRA for ComfyUI: diffusers would leave its dora_scale out and draw something else.",
    "lokr": "A LoKr for ComfyUI: diffusers does not read it.",
}
LORA_TYPE = "qwen_edit_trainer.lora_type"  # in the file's header
DIFFUSERS_PREFIX = "transformer."
_SCALED = ("lora_B", "lokr_w1")


def to_file_tensors(tensors: Mapping[str, Tensor], lora: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the file for adapter tensors by their names in training.

    The scale alpha / rank is folded into B, or LoKr's w1, and there is no alpha tensor: readers disagree about what a
    missing or present one means, and all agree about this. `dora_scale` stays in float32, since it multiplies the base
    weight itself.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        value = tensor.detach().float().cpu()
        if part == "dora_scale":
            found[f"{DIFFUSERS_PREFIX}{name}"] = value.unsqueeze(1)
            continue
        if part in _SCALED:
            value = value * _scale(tensors, module, lora)
        found[f"{DIFFUSERS_PREFIX}{name}.weight" if part.startswith("lora_") else f"{DIFFUSERS_PREFIX}{name}"] = (
            value.to(dtype)
        )
    return found


def _scale(tensors: Mapping[str, Tensor], module: str, lora: LoraConfig) -> float:
    down = tensors.get(f"{module}.lora_A")
    return lora.scale_of(module, lora.rank_of(module) if down is None else down.shape[0])
