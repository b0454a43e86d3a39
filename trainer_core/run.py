"""Train one LoRA from start to file: prepare, build, restore, step, validate, save, export."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from .adapters.inject import for_file
from .adapters.writer import LoraMetadata, export_lora
from .conditioning.batches import BatchLoader, BatchPlan, RankPlan, largest_batch
from .conditioning.on_the_fly import reference_encoder
from .config import TrainConfig, resume_key, to_json
from .device import peak_bytes
from .errors import Interrupted
from .events import SILENT, VALIDATION_LOSSES, Observer, StepReport, Stop
from .planning.advice import STEP, VALIDATION
from .planning.plan import GIB
from .planning.preparation import Preparation, PreparedModel, prepare_training
from .ranks import SINGLE_PROCESS, Ranks
from .runs.folder import Checkpoint, RunFolder
from .runs.metrics import Metrics
from .runs.result import TrainResult, find_result, how_to_start, recorded_samples
from .training.ema import AVERAGE, TRAINED, restore_ema, weights_to_validate
from .training.optimizer_state import optimizer_tensors, restore_optimizer
from .training.reduce import check_same_start
from .training.step import Gradients, Networks, build_networks, rehearse, step_gradients, update_weights
from .training.validation import Validator

ExtraCheck = Callable[[Path, int], None]  # reads a LoRA file for a model of so many blocks; raises if it won't load
_LOG = logging.getLogger(__name__)
_VALIDATION_KEPT = (
    "The training is kept up to this step. Lower validation_resolution (768x768, 512x512), or set "
    "num_validation_images to 0, which leaves the validation loss; then the same run goes on."
)


def train_lora(
    config: TrainConfig,
    observer: Observer = SILENT,
    *,
    model: PreparedModel | None = None,
    extra_check: ExtraCheck | None = None,
    continue_kept: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainResult:
    """Train one LoRA, from the start or from where this run folder stopped.

    A finished run, or one that was ended early and kept, is answered from its folder; `continue_kept` goes on with
    the latter. `model` spares reading the base model's headers again. `extra_check` gets the exported file and the
    number of transformer blocks before the file gets its name, and raises if it won't load. Every one of `ranks` makes
    this call with the same config and gets the same result; the leader alone validates and writes.

    Raises:
        TrainerError: something the user can fix; see errors.py.
        Interrupted: stopped before the first step could begin. A later stop returns a result.
    """
    if finished := find_result(config, continue_kept=continue_kept, num_ranks=ranks.size):
        return finished
    prepared = prepare_training(config, model, processes=ranks.on_machine)
    config, base = prepared.config, prepared.model.base
    validator = Validator(prepared.held_out, base, config.validation)
    with _open_run(config, ranks) as run:  # refuses a folder of another run, or one that is in use
        stop = how_to_start(run, config.max_train_steps, continue_kept=continue_kept)  # KEEP: only export is left to do
        run.write_config(to_json(config))
        with prepared.explain_memory_errors(STEP, "while the model was loaded", "Nothing is lost."):
            networks = build_networks(config, base, prepared.model.adapter, prepared.encoded.preprocessing, observer)
        done = _restore(run, networks)  # 0 steps in a fresh folder
        check_same_start(ranks, done, networks.lora)
        if not stop:
            _make_up_for_validation(validator, networks, run, done, prepared, observer)
            done, stop = _train(run, networks, validator, prepared, done, observer, ranks)
        result = _finish(prepared, run, networks, done, stop, extra_check)
        ranks.wait()  # until the leader has written the file
        return result


def _train(
    run: RunFolder,
    networks: Networks,
    validator: Validator,
    prepared: Preparation,
    done: int,
    observer: Observer,
    ranks: Ranks,
) -> tuple[int, Stop]:
    """Steps from `done` on, until there are enough or the user stops: how many are done then, and what was asked."""
    config, encoded = prepared.config, prepared.encoded
    whole = BatchPlan(encoded, config.batching, config.seed)  # micro-batch i of the run, a pure function of i
    plan = RankPlan(whole, ranks, config.batching.gradient_accumulation_steps)  # those of this process
    report = None
    with (
        Metrics(run, done) as metrics,
        reference_encoder(encoded, prepared.model.base, observer) as encode_reference,
        BatchLoader(encoded, plan, encode_reference=encode_reference) as loader,
    ):
        dry_step(networks, loader, prepared)
        try:
            while done < config.max_train_steps:
                gradients = _gradients(networks, loader, done, prepared, observer)
                report = None  # half-updated weights must not be saved
                report = _update(networks, gradients, prepared)
                done = report.step
                if done % config.checkpoints.checkpoint_step_interval == 0:
                    _save(run, report, networks, config)
                if _validation_is_due(done, config):
                    report = _validate(validator, networks, run, report, prepared, observer)
                metrics.write(report)
                observer.on_step(report)
                _raise_if_stopped(observer, ranks)
        except Interrupted as stopped:
            return done, Stop.KEEP if stopped.keep else Stop.PAUSE
        finally:
            _save(run, report, networks, config)
    return done, Stop.NO


def _raise_if_stopped(observer: Observer, ranks: Ranks) -> None:
    """Ask once per step: the answers of two processes may differ, and all must leave together."""
    if stop := ranks.agree(observer.should_stop()):
        raise Interrupted(keep=stop is Stop.KEEP)


def dry_step(networks: Networks, loader: BatchLoader, prepared: Preparation) -> tuple[int, int] | None:
    """On CUDA devices, forward and backward of the largest micro-batch, so that memory runs out now or never.

    Changes nothing of the run. Returns the bytes planned and measured, which are logged too; optimizer state that does
    not exist yet is added to what was measured. Returns None on other devices.
    """
    if networks.device.type != "cuda":
        return None
    planned = prepared.memory_plan().phase("training")
    assert planned is not None
    torch.cuda.reset_peak_memory_stats(networks.device)
    with prepared.explain_memory_errors(STEP, "in a dry step of the largest pairs", "Nothing is lost."):
        rehearse(networks, loader, largest_batch(loader.plan, prepared.encoded), prepared.config)
    coming = 0 if networks.optimizer.state else planned.parts["optimizer state"]
    measured = peak_bytes(networks.device) + coming
    _LOG.info("Device memory of a step: %.1f GiB, planned %.1f.", measured / GIB, planned.total_bytes / GIB)
    return planned.total_bytes, measured


def _gradients(
    networks: Networks, loader: BatchLoader, done: int, prepared: Preparation, observer: Observer
) -> Gradients:
    with prepared.explain_memory_errors(STEP, f"in step {done + 1}", f"The {done} steps before it are kept."):
        return step_gradients(networks, loader, done, prepared.config, observer)


def _update(networks: Networks, gradients: Gradients, prepared: Preparation) -> StepReport:
    during = f"in step {gradients.done + 1}, while the weights changed"
    with prepared.explain_memory_errors(STEP, during, "The run goes on from its last checkpoint."):
        return update_weights(networks, gradients, prepared.config)


@contextmanager
def _open_run(config: TrainConfig, ranks: Ranks) -> Iterator[RunFolder]:
    """Create the folder, or open one of the same settings. Following processes wait until the leader has done so."""
    path, key = Path(config.run_dir), resume_key(config, ranks.size)
    with RunFolder.open(path, key) if ranks.leads else nullcontext(RunFolder(path, writes=False)) as run:
        ranks.wait()
        yield run


def _validation_is_due(done: int, config: TrainConfig) -> bool:
    interval = config.validation.validation_step_interval
    return done == config.max_train_steps or (interval > 0 and done % interval == 0)


def _validate(
    validator: Validator,
    networks: Networks,
    run: RunFolder,
    report: StepReport,
    prepared: Preparation,
    observer: Observer,
) -> StepReport:
    """The step's report with the validation's results; pictures go to the run folder and the observer."""
    try:
        found = _validate_at(validator, networks, run, report.step, prepared, observer)
    except Interrupted:
        return report  # the loop asks the observer next, together with the other processes
    return dataclasses.replace(report, **found)


def _make_up_for_validation(
    validator: Validator, networks: Networks, run: RunFolder, done: int, prepared: Preparation, observer: Observer
) -> None:
    """Validate the restored step if a stop or a kill cut its validation off."""
    if done == 0 or not _validation_is_due(done, prepared.config) or run.state().get("validated") == done:
        return
    try:
        found = _validate_at(validator, networks, run, done, prepared, observer)
    except Interrupted:
        return
    if found:
        *rows, last = run.metrics()
        run.write_metrics([*rows, {**last, **found}])


def _validate_at(
    validator: Validator, networks: Networks, run: RunFolder, step: int, prepared: Preparation, observer: Observer
) -> dict[str, float]:
    """Values for the step's report; empty without held-out pairs, or where another process validates."""
    if not validator or not run.writes:
        return {}
    transformer, device, grid_file = networks.transformer, networks.device, run.grid_file(step)
    variants = weights_to_validate(networks.weights_to_use, networks.average_to_use, prepared.config.ema)
    found: dict[str, float] = {}
    with prepared.explain_memory_errors(VALIDATION, f"during the validation of step {step}", _VALIDATION_KEPT):
        for name, weights in variants.items():
            with weights():
                found[_LOSS_OF[name]] = validator.loss(transformer, device, observer)
        samples = validator.sample(transformer, device, variants, step=step, grid_file=grid_file, observer=observer)
    if samples is not None:
        run.write_state(samples={**dataclasses.asdict(samples), "grid_file": samples.grid_file.name})
        observer.on_samples(samples)
    run.write_state(validated=step)
    return {**found, **(samples.drift() if samples else {})}


_LOSS_OF = {TRAINED: VALIDATION_LOSSES[0], AVERAGE: VALIDATION_LOSSES[1]}


def _restore(run: RunFolder, networks: Networks) -> int:
    """Load the newest checkpoint into adapter and optimizer. Returns its number of steps."""
    checkpoint = run.latest_checkpoint()
    run.metrics_until(checkpoint)
    if checkpoint is None:
        return 0
    with torch.no_grad():
        for name, parameter in networks.lora.items():
            parameter.copy_(checkpoint.lora[name])
    networks.weights.publish()
    restore_optimizer(networks.optimizer, networks.lora, checkpoint.optimizer)
    restore_ema(networks.ema, checkpoint.ema)
    return checkpoint.step


def _save(run: RunFolder, report: StepReport | None, networks: Networks, config: TrainConfig) -> None:
    """Save a checkpoint of the last step. Does nothing without a report: before the first step, or amid an update."""
    if report is not None:
        optimizer = optimizer_tensors(networks.optimizer, networks.lora)
        state = Checkpoint(report.as_dict(), dict(networks.lora), optimizer, networks.ema)
        run.save_checkpoint(state, config.checkpoints.checkpoints_total_limit)


def _finish(
    prepared: Preparation,
    run: RunFolder,
    networks: Networks,
    done: int,
    stop: Stop,
    extra_check: ExtraCheck | None,
) -> TrainResult:
    """Export unless the run was paused, and note in the folder how it ended."""
    config = prepared.config
    if stop is Stop.PAUSE or done == 0:
        run.write_state(state="paused", steps=done)
        return TrainResult(run_dir=run.path, steps_done=done, stopped=stop or Stop.PAUSE)
    name = config.export.lora_name or run.path.name
    path = run.path / f"{name}.safetensors"
    ema_path = run.path / f"{name}-ema.safetensors" if networks.ema else None
    if run.writes:
        with networks.weights_to_use():
            _export(prepared, networks, path, done, extra_check)
    if run.writes and ema_path is not None:
        with networks.average_to_use():
            _export(prepared, networks, ema_path, done, extra_check)
    kept = stop is Stop.KEEP
    result = {"lora_file": path.name, "steps": done, "kept": kept, "export": to_json(config.export)}
    if ema_path is not None:
        result["ema_file"] = ema_path.name
    run.write_state(state="kept" if kept else "finished", steps=done, result=result)
    samples = recorded_samples(run)
    return TrainResult(
        run_dir=run.path, steps_done=done, stopped=stop, lora_file=path, ema_file=ema_path, samples=samples
    )


def _export(prepared: Preparation, networks: Networks, path: Path, done: int, extra_check: ExtraCheck | None) -> None:
    """Write the weights that are in the transformer now, under the name of `path`."""
    export = dataclasses.replace(prepared.config.export, lora_name=path.stem)
    metadata = LoraMetadata(dataclasses.replace(prepared.config, export=export), done)
    tensors, num_blocks = for_file(networks.transformer, networks.lora), prepared.model.base.num_blocks
    export_lora(tensors, path, metadata, extra_check and (lambda file: extra_check(file, num_blocks)))
