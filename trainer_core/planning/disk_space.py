"""Disk space that encoding and training write, computed before they start."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

from ..conditioning.encoding_plan import PlannedDataset, latents_shape
from ..config import TrainConfig
from ..disk import disk_errors, existing_folder, free_disk_bytes, name_exists, size_in_words
from ..errors import DiskError
from ..files import is_unused, is_whole
from ..qwen_image.base_model import compute_dtype
from ..qwen_image.latents import LATENT_CHANNELS, VAE_FACTOR
from ..text import counted
from ..training.ema import weights_to_validate
from ..training.optimizer import optimizer_bytes
from .network import NetworkSize
from .workload import Workload, estimated_prompt, vision_tokens

_FLOAT32 = 4
_PER_FILE = 4096  # bytes that a file's header and the rounding to whole blocks take
_SURE = 0.9  # prompts' lengths are estimated: refuse only if even this share does not fit
_TIGHT = 1.25


class DiskUse(NamedTuple):
    """What is still to be written to a folder, in bytes. `what` names it in messages."""

    folder: Path
    what: str
    size: int


def cache_use(parts: Sequence[PlannedDataset]) -> list[DiskUse]:
    """What encoding writes to the cache: the entries that it lacks; empty if it lacks none.

    The lengths of prompts are estimated.
    """
    sizes: dict[tuple[str, str], int] = {}
    for part in parts:
        width, network_bytes = part.base.prompt_width, compute_dtype(part.base.config).itemsize
        for key, planned in part.missing.masks.items():
            sizes["mask", key] = _FLOAT32 * prod(planned.entry.shape[1:])
        for key, planned in part.missing.differences.items():
            sizes["difference", key] = _FLOAT32 * prod(planned.entry.shape[1:])
        for key, task in part.missing.latents.items():
            sizes["latents", key] = _FLOAT32 * prod(latents_shape(task.view))
            if task.picture:
                sizes["picture", task.picture] = 3 * prod(task.view.size)
        for planned, texts in part.missing.prompts:
            for key, text in texts.items():
                sizes["prompt", key] = _FLOAT32 * width * estimated_prompt(planned.plan, len(text))
            for content, view in zip(planned.pair.digests[1:], planned.plan.vision, strict=True):
                key = part.image_embeds.key(content, view)
                if key and not part.image_embeds.has(key):
                    sizes["tokens", key] = network_bytes * width * vision_tokens(view.size)
    size = sum(sizes.values()) + _PER_FILE * len(sizes)
    return [DiskUse(parts[0].cache_dir, "the cache of encoded pairs", size)] if sizes else []


def run_use(config: TrainConfig, network: NetworkSize, work: Workload) -> DiskUse:
    """What training writes to the run folder besides small files: checkpoints, LoRA files, base pictures."""
    folder, weights, averages = Path(config.run_dir), network.adapter_weights, 1 + config.ema.use_ema
    checkpoint = _FLOAT32 * weights * averages + optimizer_bytes(config.optimizer.optimizer, network.adapter_shapes)
    saved = -(-config.max_train_steps // config.checkpoints.checkpoint_step_interval)
    kept = min(saved, config.checkpoints.checkpoints_total_limit + 1)  # an old one goes after the new one is complete
    best = config.validation.keep_best and bool(work.held_out) and _validations(config) > 1
    kept += best
    shown = sum(each.count for each in work.pictures)
    latents = LATENT_CHANNELS * prod(work.validation.target) // VAE_FACTOR**2 if work.validation else 0
    lora = compute_dtype(config.model).itemsize * weights
    loras = averages + _step_loras(config, work) + best
    total = kept * checkpoint + loras * lora + _FLOAT32 * shown * latents - _bytes_in(folder)
    files = "the LoRA file" if loras == 1 else f"{counted(loras, 'LoRA file')} of {size_in_words(lora)}"
    what = f"{counted(kept, 'checkpoint')} of {size_in_words(checkpoint)} and {files}"
    return DiskUse(folder, what, max(0, total))


def _validations(config: TrainConfig) -> int:
    """How often the run validates."""
    return -(-config.max_train_steps // (config.validation.validation_step_interval or config.max_train_steps))


def _step_loras(config: TrainConfig, work: Workload) -> int:
    """The largest number of LoRA files of validated steps that a run has at a time."""
    validation = config.validation
    if not work.held_out or not (validation.validation_loras_total_limit or validation.keep_best):
        return 0
    times = _validations(config)
    variants = len(weights_to_validate(nullcontext, nullcontext, config.ema))
    return variants * min(times, validation.validation_loras_total_limit + 2)  # the best, and the new one


def _bytes_in(folder: Path) -> int:
    """Bytes of the run's checkpoints, LoRA files and base pictures that are there already.

    Without those of damaged and unfinished checkpoints, which no new one replaces.
    """
    try:
        found = [path for path in folder.rglob("*.safetensors") if is_whole(path) and not path.is_symlink()]
        used = [path for path in found if not any(map(is_unused, path.relative_to(folder).parts))]
        return sum(path.stat().st_size for path in used)
    except OSError:
        return 0


def check_disk(uses: Iterable[DiskUse]) -> list[str]:
    """Check the folders' disks. Returns a sentence for each disk that has little more space than is needed.

    Raises:
        DiskError: a folder can't be written to, or its disk has too little free space.
    """
    notes = []
    for folder, shared in _by_disk(uses).items():
        for use in shared:
            _check_writable(use.folder)
        free, total = free_disk_bytes(folder), sum(use.size for use in shared)
        parts = " and ".join(f"{size_in_words(use.size)} for {use.what} in {use.folder}" for use in shared if use.size)
        text = f"{size_in_words(free)} of disk space are free, and about {size_in_words(total)} are needed: {parts}"
        if total * _SURE > free:
            raise DiskError(
                f"The disk is too full. {text}. Free disk space or choose a folder on another disk (cache_dir, "
                "run_dir). Fewer checkpoints (checkpoints_total_limit), fewer LoRAs of validated steps "
                "(validation_loras_total_limit) and a lower rank need less.",
                errno.ENOSPC,
            )
        if total * _TIGHT > free:
            notes.append(f"Disk space is tight. {text}.")
    return notes


def disk_in_words(uses: Iterable[DiskUse]) -> str:
    """A line for each folder: what it needs and what is free."""
    return "\n".join(
        f"Disk space: {size_in_words(use.size)} for {use.what}, {size_in_words(_free(use.folder))} free in {use.folder}"
        for use in uses
    )


def _free(folder: Path) -> int:
    return free_disk_bytes(existing_folder(folder))


def _by_disk(uses: Iterable[DiskUse]) -> dict[Path, list[DiskUse]]:
    """The uses by an existing folder on their disk."""
    disks: dict[int, tuple[Path, list[DiskUse]]] = {}
    for use in uses:
        there = existing_folder(use.folder)
        disks.setdefault(there.stat().st_dev, (there, []))[1].append(use)
    return dict(disks.values())


def _check_writable(folder: Path) -> None:
    there = existing_folder(folder)
    for name in folder.absolute().relative_to(there.absolute()).parts[:1]:
        if name_exists(there / name):
            raise DiskError(
                f"{there / name} is a file, but {folder} needs a folder of that name. Choose another folder, or move "
                "the file away.",
                errno.ENOTDIR,
            )
    with disk_errors(), suppress(FileNotFoundError):  # it is created when it is written to
        folder.lstat()  # refuses a name that is too long
    if not os.access(there, os.W_OK):
        raise DiskError(
            f"The folder {folder} can't be written to: {there} is read-only for this user. Choose another folder, or "
            "change its permissions.",
            errno.EACCES,
        )
