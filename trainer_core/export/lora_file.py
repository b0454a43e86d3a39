"""Writes the LoRA file, and gives it its name only after others' readers have read it back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig, digest, resume_key
from ..errors import ExportError
from ..files import read_tensors, write_tensors
from ..qwen_image.flavours import FLAVOURS
from .keys import PREFIX, to_file_tensors, weight_changes

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
            "ss_network_dim": str(config.lora.lora_rank),
            "ss_network_alpha": str(config.lora.lora_rank),  # folded: the file applies at scale 1
            "ss_steps": str(self.steps),
            "ss_learning_rate": str(config.optimizer.learning_rate),
            "ss_seed": str(config.seed),
            "qwen_edit_trainer.flavour": flavour.name,
            "qwen_edit_trainer.config_digest": digest(resume_key(config)),
        }
        if config.export.trigger_words:
            header["modelspec.trigger_phrase"] = config.export.trigger_words
            header["trainedWords"] = config.export.trigger_words
        return header


def export_lora(
    lora: Mapping[str, Tensor], path: Path, metadata: LoraMetadata, extra_check: ExtraCheck | None = None
) -> Path:
    """Write adapter tensors (named `<module>.lora_A` / `.lora_B`) as a LoRA file.

    Raises:
        ExportError: a reader would not apply the whole adapter with the trained effect. Nothing has the file's name
            then; a file of that name from before is untouched.
    """
    config = metadata.config
    dtype = torch.bfloat16 if config.model.mixed_precision == "bf16" else torch.float32
    scale = config.lora.alpha / config.lora.lora_rank
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.safetensors")
    try:
        write_tensors(temporary, to_file_tensors(lora, scale, dtype), metadata.as_header())
        check_with_diffusers(temporary, lora, scale, _TOLERANCE[dtype])
        if extra_check is not None:
            extra_check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_with_diffusers(path: Path, lora: Mapping[str, Tensor], scale: float, tolerance: float) -> None:
    """Read a file as diffusers' pipelines do, and compare every weight change with the trained one.

    Raises:
        ExportError: a key is lost or unknown, or a change differs by more than `tolerance` (relative).
    """
    converted = read_with_diffusers(path)
    wanted = to_file_tensors(lora, scale, torch.float32)
    lost, unknown = sorted(wanted.keys() - converted.keys()), sorted(converted.keys() - wanted.keys())
    if lost or unknown:
        raise ExportError(
            f"The LoRA file would not load completely in diffusers: {len(lost)} tensors lost {lost[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}. The file was not saved; the checkpoint is kept."
        )
    read = weight_changes(converted)
    for module, (down, up) in weight_changes(wanted).items():
        change, trained = read[module][1].float() @ read[module][0].float(), up @ down
        error = float((change - trained).norm() / trained.norm().clamp_min(1e-12))
        if not error <= tolerance:
            raise ExportError(
                f"The LoRA file changes {module} by another amount than was trained (relative error {error:.1e}, "
                f"allowed {tolerance:.0e}). The file was not saved; the checkpoint is kept."
            )


def read_with_diffusers(path: Path) -> dict[str, Tensor]:
    """Tensors of a LoRA file in any layout that diffusers' Qwen-Image pipelines read, in diffusers' names."""
    from diffusers.loaders import QwenImageLoraLoaderMixin

    state: Any = QwenImageLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True
    )
    return dict(state)


def read_lora(path: Path) -> dict[str, Tensor]:
    """Tensors of a LoRA file by name."""
    return read_tensors(path)


def load_into(transformer: torch.nn.Module, path: Path, strength: float = 1.0) -> None:
    """Apply a LoRA file to a diffusers transformer for sampling.

    Raises:
        ExportError: keys of the file do not belong to this transformer.
    """
    state = read_with_diffusers(path)
    names = {name for name, _ in transformer.named_modules()}
    unknown = [key for key in state if key.removeprefix(PREFIX).split(".lora_")[0] not in names]
    if unknown:
        raise ExportError(
            f"{path.name} has {len(unknown)} of {len(state)} tensors that this model does not know, such as "
            f"{unknown[0]}. It was trained for another model."
        )
    transformer.load_lora_adapter(state, prefix="transformer", adapter_name="sampled")  # type: ignore[operator]
    transformer.set_adapters("sampled", strength)  # type: ignore[operator]
