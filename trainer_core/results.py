"""What a run leaves: checkpoints, LoRAs of validated steps, the best of them, and the final files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .adapters.inject import for_file
from .adapters.plan import read_parts
from .adapters.writer import LoraMetadata, copy_lora, export_lora, titled
from .config import to_json
from .errors import ExportError, Interrupted, TrainerError
from .events import Observer, SampleReport, StepReport, Stop
from .planning.preparation import Preparation
from .precision.frozen_linear import exact_products
from .ranks import Ranks
from .runs.folder import Checkpoint, RunFolder
from .runs.result import TrainResult, recorded_samples
from .runs.step_loras import EMA, LORA, StepLora, best_of, delete_old, results_header, step_folder, step_loras
from .text import reason_of
from .training.ema import AVERAGE, TRAINED, Weights, weights_to_validate
from .training.optimizer_state import optimizer_tensors
from .training.step import Networks
from .training.strengths import advised, compare, in_words
from .training.validation import Validator

ExtraCheck = Callable[[Path, int], None]  # (LoRA file, number of the model's blocks); raises if it can't be loaded
_STRENGTH = "qwen_edit_trainer.strength"
_FILE_OF = {TRAINED: LORA, AVERAGE: EMA}


@dataclasses.dataclass(frozen=True, slots=True)
class RunParts:
    """What every stage of a run needs. In the functions below, `done` is the number of finished steps."""

    prepared: Preparation
    run: RunFolder
    networks: Networks
    validator: Validator
    observer: Observer
    ranks: Ranks
    began: float  # time.monotonic() at this start of the run

    def seconds(self) -> float:
        """How long the run has worked in all its starts that ended by themselves."""
        return round(float(self.run.state().get("seconds", 0.0)) + time.monotonic() - self.began, 1)


def save(parts: RunParts, report: StepReport | None) -> None:
    """Save a checkpoint. None (before the first step or during an update) saves nothing."""
    if report is not None:
        optimizer = optimizer_tensors(parts.networks.optimizer, parts.networks.lora)
        state = Checkpoint(report.as_dict(), dict(parts.networks.lora), optimizer, parts.networks.ema)
        limit = parts.prepared.config.checkpoints.checkpoints_total_limit
        parts.run.save_checkpoint(state, limit, best=best_step(parts))


def best_step(parts: RunParts) -> int:
    """The validated step at which the run was best so far, whose checkpoint is kept; 0 if none is known or kept."""
    best = best_of(step_loras(parts.run.samples)) if parts.prepared.config.validation.keep_best else None
    return best.step if best else 0


def keep_step_loras(
    parts: RunParts,
    done: int,
    variants: Mapping[str, Weights],
    losses: Mapping[str, float],
    samples: SampleReport | None,
) -> None:
    """Keep the LoRA of a validated step beside its pictures. If that fails, the training goes on."""
    config, folder = parts.prepared.config.validation, parts.run.samples
    limit = config.validation_loras_total_limit
    if not limit and not config.keep_best:
        return
    psnr = {TRAINED: samples.psnr_lora, AVERAGE: samples.psnr_ema} if samples else {}
    try:
        for name, weights in variants.items():
            suffix = "-ema" if name == AVERAGE else ""
            drift = samples.drift() if samples else {}
            results = results_header(psnr.get(name), losses[name], drift, parts.validator.measured_as)
            path, title = step_folder(folder, done) / _FILE_OF[name], f"{_lora_name(parts)}{suffix}-step-{done}"
            _export(parts, weights, path, done, title=title, more=results)
        delete_old(folder, done, limit)
    except (OSError, ExportError) as error:  # the disk is full, or the weights are NaN
        parts.observer.on_note(f"The LoRA of step {done} is not kept: {reason_of(error)}")


def finish(parts: RunParts, done: int, stop: Stop, extra_check: ExtraCheck | None) -> TrainResult:
    """Export the LoRA, unless the run was paused, and record the result in the run folder.

    A run that has ended by itself also exports its best step. When all is saved, the leader compares strengths and
    writes the best one into the header of the file to use.
    """
    run, networks, export = parts.run, parts.networks, parts.prepared.config.export
    if stop is Stop.PAUSE or done == 0:
        run.write_state(state="paused", steps=done, seconds=parts.seconds())
        return TrainResult(run_dir=run.path, steps_done=done, stopped=stop or Stop.PAUSE)
    name, kept = _lora_name(parts), stop is Stop.KEEP
    files = {TRAINED: run.path / f"{name}.safetensors"}
    _export(parts, networks.weights_to_use, files[TRAINED], done, extra_check=extra_check)
    result: dict[str, Any] = {
        "lora_file": files[TRAINED].name,
        "steps": done,
        "kept": kept,
        "export": to_json(export),
    }
    if networks.ema:
        files[AVERAGE] = run.path / f"{name}-ema.safetensors"
        _export(parts, networks.average_to_use, files[AVERAGE], done, extra_check=extra_check)
        result["ema_file"] = files[AVERAGE].name
    best, best_file = _earlier_best(parts, done), run.path / f"{name}-best.safetensors"
    _rename_outdated_best(parts, best)
    if best:
        _copy_best(parts, best, best_file, extra_check)
        result |= {"best_file": best_file.name, "best_step": best.step}
    run.write_state(state="kept" if kept else "finished", steps=done, result=result, seconds=parts.seconds())
    parts.ranks.wait()  # what follows takes long, and only the leader does it
    if not kept and (strength := _compare_strengths(parts, best, files, best_file)):
        result["strength"] = strength
        run.write_state(result=result, seconds=parts.seconds())
    return TrainResult(
        run_dir=run.path,
        steps_done=done,
        stopped=stop,
        lora_file=files[TRAINED],
        ema_file=files.get(AVERAGE),
        best_file=best_file if best else None,
        strength=result.get("strength"),
        samples=recorded_samples(run),
    )


def _earlier_best(parts: RunParts, done: int) -> StepLora | None:
    """The step at which the run was best, if that is not the last one. Tells the user."""
    loras = step_loras(parts.run.samples)
    best = best_of(loras) if parts.prepared.config.validation.keep_best else None
    if best is None or best.step >= done or not parts.run.writes:
        return None
    parts.observer.on_note(
        f"The run was best at step {best.step} of {done}{_measured_in_words(best)}. That LoRA is saved too, as "
        f"{_lora_name(parts)}-best.safetensors."
    )
    return best


def _measured_in_words(lora: StepLora) -> str:
    found = [f"validation loss {lora.loss:.4f}"] if lora.loss is not None else []
    found += [f"{lora.psnr:.1f} dB"] if lora.psnr is not None else []
    return f" ({', '.join(found)})" if found else ""


def _rename_outdated_best(parts: RunParts, best: StepLora | None) -> None:
    """Give the file of an earlier end of the run, which had another best step, a name that says its step."""
    before = parts.run.state().get("result") or {}
    step, file = before.get("best_step"), parts.run.path / str(before.get("best_file"))
    if step and parts.run.writes and (best is None or best.step != step) and file.is_file():
        target = file.with_name(f"{_lora_name(parts)}-step-{step}.safetensors")
        if target.exists():
            file.unlink()
        else:
            file.rename(target)


def _copy_best(parts: RunParts, best: StepLora, path: Path, extra_check: ExtraCheck | None) -> None:
    """Copy the LoRA of the best step to the run folder. Its header gets the file's name."""
    num_blocks = parts.prepared.model.base.num_blocks
    copy_lora(best.files[0], path, titled(path.stem), extra_check and (lambda file: extra_check(file, num_blocks)))


def _compare_strengths(
    parts: RunParts, best: StepLora | None, files: Mapping[str, Path], best_file: Path
) -> float | None:
    """The strength to use `best_file` at, or else the file of the weights that validation shows; None if none was
    compared. Writes it into that file's header and tells the user. The run is saved, so an error is only told."""
    config, networks = parts.prepared.config, parts.networks
    if not (config.validation.compares_strengths and parts.validator.draws_targets and parts.run.writes):
        return None
    shown, weights = next(
        iter(weights_to_validate(networks.weights_to_use, networks.average_to_use, config.ema).items())
    )
    file = best_file if best else files[shown]
    arguments = networks.transformer, networks.device, parts.observer
    try:
        if best:
            changes = read_parts(parts.prepared.model.base.network, best.files[0])
            weights = partial(networks.file_to_use, changes, parts.prepared.model.adapter.layers)
        with networks.compilation.paused(), exact_products(networks.transformer):
            measured = compare(
                partial(networks.at_strength, weights),
                partial(parts.validator.psnr, *arguments),
            )
        strength = advised(measured)
        copy_lora(
            file,
            file,
            {
                _STRENGTH: f"{strength:g}",
                "qwen_edit_trainer.strengths": in_words(measured),
                "modelspec.usage_hint": f"Use at strength {strength:g}.",
            },
        )
    except Interrupted:
        parts.observer.on_note("Strengths were not compared, because you stopped. The LoRA is saved.")
        return None
    except (TrainerError, OSError, torch.OutOfMemoryError) as error:
        parts.observer.on_note(f"Strengths were not compared ({reason_of(error)}). The LoRA is saved.")
        return None
    parts.observer.on_note(f"Use {file.name} at strength {strength:g}. On held-out pairs: {in_words(measured)}.")
    return strength


def _lora_name(parts: RunParts) -> str:
    """Name of the run's LoRA file, without extension."""
    return parts.prepared.config.export.lora_name or parts.run.path.name


def _export(
    parts: RunParts,
    weights: Weights,
    path: Path,
    done: int,
    *,
    title: str = "",
    more: Mapping[str, str] | None = None,
    extra_check: ExtraCheck | None = None,
) -> None:
    """Write these weights to a LoRA file. Its header has the title, by default the file's name, and `more`."""
    if not parts.run.writes:
        return
    export = dataclasses.replace(parts.prepared.config.export, lora_name=title or path.stem)
    metadata = LoraMetadata(dataclasses.replace(parts.prepared.config, export=export), done, more or {})
    num_blocks = parts.prepared.model.base.num_blocks
    with weights():
        tensors = for_file(parts.networks.transformer, parts.networks.lora)
        export_lora(tensors, path, metadata, extra_check and (lambda file: extra_check(file, num_blocks)))
