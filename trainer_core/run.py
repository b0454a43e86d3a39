"""Train one LoRA: the whole story. The only module that sees every stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from .adapters.inject import for_file
from .adapters.writer import ExtraCheck, LoraMetadata, export_lora
from .conditioning.batches import BatchLoader, BatchPlan, RankPlan
from .conditioning.encoded import EncodedDataset, check_alike, load_encoded
from .conditioning.on_the_fly import reference_encoder
from .config import TrainConfig, resume_key, to_json
from .errors import ConfigError, DatasetError, Interrupted
from .events import SILENT, VALIDATION_LOSSES, Observer, StepReport, Stop
from .planning.advice import STEP, VALIDATION
from .planning.settle import RunMemory, dry_step
from .ranks import ALONE, Ranks
from .runs.folder import Checkpoint, RunFolder
from .runs.metrics import Metrics
from .runs.result import TrainResult, find_result, how_to_start, recorded_samples
from .training.ema import AVERAGE, TRAINED, restore_ema, weights_to_validate
from .training.optimizer_state import optimizer_tensors, restore_optimizer
from .training.reduce import check_same_start
from .training.step import Gradients, Networks, build_networks, step_gradients, update_weights
from .training.validation import Validator

_VALIDATION_KEPT = (
    "The training is kept up to this step. Lower validation_resolution (768x768, 512x512), or set "
    "num_validation_images to 0, which leaves the validation loss; then the same run goes on."
)


def train_lora(
    config: TrainConfig,
    observer: Observer = SILENT,
    *,
    extra_check: ExtraCheck | None = None,
    continue_kept: bool = False,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train one LoRA, from the start or from where this run folder stopped.

    A finished run, or one that was ended early and kept, is answered from its folder; `continue_kept` goes on with
    the latter. `extra_check` reads the exported file before it gets its name and raises if it won't load. Every one of
    `ranks` makes this call with the same config and gets the same result; the leader alone validates and writes.

    Raises:
        TrainerError: something the user can mend; see errors.py.
        Interrupted: stopped before the first step could begin. A stop later returns a result.
    """
    if finished := find_result(config, continue_kept=continue_kept, num_ranks=ranks.size):
        return finished
    encoded = load_encoded(Path(config.encoded))
    memory = RunMemory(config, encoded, _validation_set(config, encoded), ranks.on_machine).settled()
    config = memory.config  # under memory auto with the settings that fit, found before a weight is read
    validator = Validator(memory.held_out, config.model, config.validation)
    with _open_run(config, ranks) as run:  # refuses a folder of another run, or one that is in use
        stop = how_to_start(run, config.max_train_steps, continue_kept=continue_kept)  # KEEP: only the file is wanted
        run.write_config(to_json(config))
        with memory.explained(STEP, "while the model was loaded", "Nothing is lost."):
            networks = build_networks(config, encoded.preprocessing, observer)
        done = _restore(run, networks)  # 0 steps in a fresh folder
        check_same_start(ranks, done, networks.lora)
        if not stop:
            _make_up_for_validation(validator, networks, run, done, memory, observer)
            done, stop = _train(run, networks, validator, memory, done, observer, ranks)
        result = _finish(config, run, networks, done, stop, extra_check)
        ranks.wait()  # for the file
        return result


def _train(
    run: RunFolder,
    networks: Networks,
    validator: Validator,
    memory: RunMemory,
    done: int,
    observer: Observer,
    ranks: Ranks,
) -> tuple[int, Stop]:
    """Steps from `done` on, until there are enough or a stop is wished; how many are done then, and the wish."""
    config, encoded = memory.config, memory.encoded
    whole = BatchPlan(encoded, config.batching, config.seed)  # micro-batch i of the run, a pure function of i
    plan = RankPlan(whole, ranks, config.batching.gradient_accumulation_steps)  # those of this process
    report, stop = None, Stop.NO
    with (
        Metrics(run, done) as metrics,
        reference_encoder(encoded, config.model, observer) as encode_reference,
        BatchLoader(encoded, plan, encode_reference=encode_reference) as loader,
    ):
        dry_step(networks, loader, memory)
        while done < config.max_train_steps and not stop:
            try:
                gradients = _gradients(networks, loader, done, memory, observer)
                if isinstance(gradients, Stop):
                    stop = gradients
                    break
                report = None  # while the weights change they are of no step, and there is nothing to save
                report = _update(networks, gradients, memory)
                done = report.step
                if done % config.checkpoints.checkpoint_step_interval == 0:
                    _save(run, report, networks, config)
                if _validation_is_due(done, config):
                    report = _validate(validator, networks, run, report, memory, observer)
                metrics.write(report)
                observer.on_step(report)
                stop = ranks.agree(observer.should_stop())  # asked once here: two answers may differ
            except BaseException:  # the last whole step; of an update cut short nothing, and the last checkpoint holds
                _save(run, report, networks, config)
                raise
    _save(run, report, networks, config)
    return done, stop


def _gradients(
    networks: Networks, loader: BatchLoader, done: int, memory: RunMemory, observer: Observer
) -> Gradients | Stop:
    with memory.explained(STEP, f"in step {done + 1}", f"The {done} steps before it are kept."):
        return step_gradients(networks, loader, done, memory.config, observer)


def _update(networks: Networks, gradients: Gradients, memory: RunMemory) -> StepReport:
    kept = "The run goes on from its last checkpoint."
    with memory.explained(STEP, f"in step {gradients.done + 1}, while the weights changed", kept):
        return update_weights(networks, gradients, memory.config)


@contextmanager
def _open_run(config: TrainConfig, ranks: Ranks) -> Iterator[RunFolder]:
    """Make the folder, or enter one of the same settings. Those who follow wait until the leader has done so."""
    path, key = Path(config.run_dir), resume_key(config, ranks.size)
    with RunFolder.open(path, key) if ranks.leads else nullcontext(RunFolder(path, writes=False)) as run:
        ranks.wait()
        yield run


def _validation_set(config: TrainConfig, encoded: EncodedDataset) -> EncodedDataset:
    """The held-out pairs to validate on, after checking that all datasets suit the model and are whole."""
    second = load_encoded(Path(config.validation_encoded)) if config.validation_encoded else encoded
    for each in (encoded, second):
        if each.flavour != config.model.flavour:
            raise ConfigError(
                f"The dataset was encoded for {each.flavour}, and the model is {config.model.flavour}. "
                "Encode it again with this model."
            )
        if missing := each.missing():
            raise DatasetError(f"{len(missing)} encoded pairs are not in the cache. Encode the dataset again:", missing)
    check_alike(encoded, second, ("The encoded dataset", "the one to validate on"))
    if not encoded.pairs:
        raise DatasetError("The dataset has no pair to train on: all are held out. Lower num_eval_images.")
    if not second.validation_pairs and config.validation_encoded:
        raise DatasetError("The validation dataset holds no pair out. Encode it with num_eval_images -1.")
    return second


def _validation_is_due(done: int, config: TrainConfig) -> bool:
    interval = config.validation.validation_step_interval
    return done == config.max_train_steps or (interval > 0 and done % interval == 0)


def _validate(
    validator: Validator, networks: Networks, run: RunFolder, report: StepReport, memory: RunMemory, observer: Observer
) -> StepReport:
    """The step's report with what validation found; pictures go to the run folder and the observer."""
    try:
        found = _validate_at(validator, networks, run, report.step, memory, observer)
    except Interrupted:
        return report  # the loop asks the observer next
    return dataclasses.replace(report, **found)


def _make_up_for_validation(
    validator: Validator, networks: Networks, run: RunFolder, done: int, memory: RunMemory, observer: Observer
) -> None:
    """Validate a step whose validation was due and came to no end before a stop or a kill."""
    if done == 0 or not _validation_is_due(done, memory.config) or run.state().get("validated") == done:
        return
    try:
        found = _validate_at(validator, networks, run, done, memory, observer)
    except Interrupted:
        return
    if found:
        *rows, last = run.metrics()
        run.write_metrics([*rows, {**last, **found}])


def _validate_at(
    validator: Validator, networks: Networks, run: RunFolder, step: int, memory: RunMemory, observer: Observer
) -> dict[str, float]:
    """What belongs into the step's report; empty where no pair is held out, or another process validates."""
    if not validator or not run.writes:
        return {}
    transformer, device, grid_file = networks.transformer, networks.device, run.grid_file(step)
    variants = weights_to_validate(networks.weights_to_use, networks.average_to_use, memory.config.ema)
    found: dict[str, float] = {}
    with memory.explained(VALIDATION, f"during the validation of step {step}", _VALIDATION_KEPT):
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
    """Put the newest checkpoint into adapter and optimizer; the number of steps it stands for."""
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
    """A checkpoint of the last step; nothing to keep before this process has made one, or while it changes weights."""
    if report is not None:
        optimizer = optimizer_tensors(networks.optimizer, networks.lora)
        state = Checkpoint(report.as_dict(), dict(networks.lora), optimizer, networks.ema)
        run.save_checkpoint(state, config.checkpoints.checkpoints_total_limit)


def _finish(
    config: TrainConfig,
    run: RunFolder,
    networks: Networks,
    done: int,
    stop: Stop,
    extra_check: ExtraCheck | None,
) -> TrainResult:
    """Export unless the run was paused, and note in the folder how it ended."""
    if stop is Stop.PAUSE or done == 0:
        run.write_state(state="paused", steps=done)
        return TrainResult(run_dir=run.path, steps_done=done, stopped=stop or Stop.PAUSE)
    name = config.export.lora_name or run.path.name
    path = run.path / f"{name}.safetensors"
    ema_path = run.path / f"{name}-ema.safetensors" if networks.ema else None
    if run.writes:
        with networks.weights_to_use():
            _export(config, networks, path, done, extra_check)
    if run.writes and ema_path is not None:
        with networks.average_to_use():
            _export(config, networks, ema_path, done, extra_check)
    kept = stop is Stop.KEEP
    result = {"lora_file": path.name, "steps": done, "kept": kept, "export": to_json(config.export)}
    if ema_path is not None:
        result["ema_file"] = ema_path.name
    run.write_state(state="kept" if kept else "finished", steps=done, result=result)
    samples = recorded_samples(run)
    return TrainResult(
        run_dir=run.path, steps_done=done, stopped=stop, lora_file=path, ema_file=ema_path, samples=samples
    )


def _export(config: TrainConfig, networks: Networks, path: Path, done: int, extra_check: ExtraCheck | None) -> None:
    """The weights that are in the transformer now, as a file of its name."""
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, lora_name=path.stem))
    export_lora(for_file(networks.transformer, networks.lora), path, LoraMetadata(config, done), extra_check)
