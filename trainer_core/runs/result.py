"""The result of a run, read from its folder without loading a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..conditioning.encoded import EncodedDataset
from ..config import ExportConfig, TrainConfig, resume_key, to_json
from ..errors import RunFolderError
from ..events import SampleReport, Stop
from ..files import is_whole
from .folder import RULES, RunFolder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended.

    `lora_file` and `ema_file` are None if it was paused, `ema_file` also without use_ema. `best_file`: the LoRA of the
    best step; None if that is the last one, or not known. `strength`: the one to use `best_file` at, or else
    `lora_file`; None if none was compared. `samples` is None without validation pictures.
    """

    run_dir: Path
    steps_done: int
    stopped: Stop
    lora_file: Path | None = None
    ema_file: Path | None = None
    best_file: Path | None = None
    strength: float | None = None
    samples: SampleReport | None = None


def find_result(config: TrainConfig, *, continue_kept: bool = False, num_ranks: int = 1) -> TrainResult | None:
    """The recorded result, if the run is complete under these settings and its files are whole; else None.

    Raises:
        RunFolderError: run.json is damaged.
    """
    run = RunFolder(Path(config.run_dir))
    result = run.state().get("result")
    if not result or run.changes(resume_key(config, num_ranks)):
        return None
    export = {**to_json(ExportConfig()), **result["export"]}  # older versions recorded fewer settings
    if export != to_json(config.export):
        return None
    stays_kept = 0 < kept_at(run) <= config.max_train_steps and not continue_kept
    lora_file = run.path / result["lora_file"]
    ema_file = run.path / result["ema_file"] if result.get("ema_file") else None
    best_file = run.path / result["best_file"] if result.get("best_file") else None
    is_complete = result["steps"] == config.max_train_steps or stays_kept
    if not is_complete or not all(is_whole(file) for file in (lora_file, ema_file, best_file) if file):
        return None
    return TrainResult(
        run_dir=run.path,
        steps_done=result["steps"],
        stopped=Stop.KEEP if result["kept"] else Stop.NO,
        lora_file=lora_file,
        ema_file=ema_file,
        best_file=best_file,
        strength=result.get("strength"),
        samples=recorded_samples(run),
    )


def check_start(
    config: TrainConfig, encoded: EncodedDataset, *, continue_kept: bool = False, num_ranks: int = 1
) -> bool:
    """Check that a run with these settings can start or go on in its folder. Returns whether it is finished already.

    Changes nothing, and does not look whether another process uses the folder now.

    Raises:
        RunFolderError: the folder isn't a run or is damaged, or belongs to a run with other settings or more steps, or
            the run has lost its checkpoints.
    """
    if find_result(config, continue_kept=continue_kept, num_ranks=num_ranks) is not None:
        return True
    run = RunFolder(Path(config.run_dir))
    run.check_key(resume_key(config, num_ranks), encoded)
    how_to_start(run, config, encoded, continue_kept=continue_kept)
    return False


def can_go_on(config: TrainConfig, encoded: EncodedDataset, *, num_ranks: int = 1) -> bool:
    """Whether a run with these settings can go on in its folder, or is finished. See `check_start`."""
    try:
        check_start(config, encoded, num_ranks=num_ranks)
    except RunFolderError:
        return False
    return True


def how_to_start(run: RunFolder, config: TrainConfig, encoded: EncodedDataset, *, continue_kept: bool) -> Stop:
    """KEEP if the run was ended early and must only be exported again; NO if it must train.

    Raises:
        RunFolderError: the run has more steps than `max_train_steps`, has lost its checkpoints, or the checkpoint to
            export is missing; or an older version started it, which trained otherwise.
    """
    refuse_lost_checkpoints(run)
    max_train_steps = config.max_train_steps
    done, kept = max(run.steps_done(), (run.state().get("result") or {}).get("steps", 0)), kept_at(run)
    if done > max_train_steps:
        raise RunFolderError(
            f"The run {run.path.name!r} has {done} steps already, but max_train_steps is {max_train_steps}. Set "
            f"max_train_steps to {done} or more, or choose another name for a shorter run. Nothing was "
            "overwritten."
        )
    if not kept or continue_kept:
        if 0 < done < max_train_steps:
            refuse_other_rules(run, config, encoded)
        return Stop.NO
    if run.steps_done() != kept:
        raise RunFolderError(
            f"The run {run.path.name!r} was ended early at step {kept}, but the checkpoint of that step is missing or "
            "damaged, so its LoRA can't be exported with these settings. Set the export settings back, continue the "
            "training (if_run_exists 'continue a kept run', or --continue-kept), or choose another name. Nothing "
            "was overwritten."
        )
    return Stop.KEEP


def refuse_other_rules(run: RunFolder, config: TrainConfig, encoded: EncodedDataset) -> None:
    """Refuse to continue a run if its further steps would not fit those that an older version trained.

    Raises:
        RunFolderError: the older version computes something of these settings in another way.
    """
    rules = run.state().get("rules", 1)
    if rules == RULES:
        return
    huber = config.noise.loss_type != "l2" and config.noise.huber_schedule == "snr"
    differing = {  # the rules since when something is computed as today, and whether this run has it
        "the loss by huber_schedule snr": (2, huber),
        "the average of the weights (use_ema)": (2, config.ema.use_ema),
        "the noise levels by preprocessing diffusers": (2, encoded.preprocessing == "diffusers"),
        "the order of the pairs (train_batch_size above 1)": (3, config.batching.train_batch_size > 1),
        "the rounding of 8-bit products": (4, run.state().get("matmul_precision") == "8bit"),
    }
    if found := [name for name, (since, has) in differing.items() if has and rules < since]:
        raise RunFolderError(
            f"The run {run.path.name!r} was started by another version of this program, which computes "
            f"{' and '.join(found)} differently. Its further steps would not fit its {run.steps_done()} steps. "
            f"Continue it with that version, or choose another name to start a new run.{run.way_from_lora()} "
            "Nothing was changed."
        )


def refuse_lost_checkpoints(run: RunFolder) -> None:
    """Refuse to start again at step 1 a run that has saved steps. It would overwrite its LoRA.

    Raises:
        RunFolderError: the run has saved steps, but has no usable checkpoint.
    """
    if lost := run.lost_steps():
        raise RunFolderError(
            f"The run {run.path.name!r} has saved {lost} steps, but {run.checkpoints} holds no usable checkpoint to "
            "continue from. Put its checkpoints back, or choose another name to start a new run."
            f"{run.way_from_lora()} Nothing was overwritten."
        )


def kept_at(run: RunFolder) -> int:
    """The step at which the run was ended early and kept; 0 if it wasn't, or has been continued since."""
    result = run.state().get("result")
    if not result or not result["kept"] or run.steps_done() > result["steps"]:
        return 0
    return int(result["steps"])


def recorded_samples(run: RunFolder) -> SampleReport | None:
    """The newest validation pictures recorded in run.json; None without."""
    record = run.state().get("samples")
    return SampleReport(**{**record, "grid_file": run.samples / record["grid_file"]}) if record else None
