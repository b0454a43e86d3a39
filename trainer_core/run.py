"""Trains one LoRA: prepare, build, restore, step, validate, save, export."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch

from .conditioning.batches import BatchLoader, BatchPlan, RankPlan
from .conditioning.encoded import EncodedDataset
from .conditioning.on_the_fly import reference_encoder
from .config import TrainConfig, resume_key, to_json
from .device import pick_device
from .disk import disk_errors
from .dry_step import dry_step, start_compiler_early
from .errors import Interrupted, NonFiniteLossError, RunFolderError
from .events import SILENT, VALIDATION_LOSSES, Observer, SampleReport, Stop
from .memory.compilation import compiled_code_kept
from .planning.advice import STEP, VALIDATION
from .planning.disk_space import check_disk, run_use
from .planning.preparation import PreparedModel, prepare_training
from .precision.frozen_linear import exact_products
from .products import check_choice, choose_products
from .qwen_image.attention_choice import kept_choices
from .ranks import SINGLE_PROCESS, Ranks
from .results import ExtraCheck, RunParts, best_step, finish, keep_step_loras, save
from .runs.folder import RunFolder
from .runs.metrics import metrics_writer
from .runs.result import TrainResult, find_result, how_to_start
from .training.ema import AVERAGE, TRAINED, restore_ema, weights_to_validate
from .training.optimizer_state import restore_optimizer
from .training.reduce import check_same_start
from .training.step import build_networks, step_gradients, update_weights
from .training.validation import Validator
from .training.validation_work import validation_is_due

_LOG = logging.getLogger(__name__)
LOSS_OF = {TRAINED: VALIDATION_LOSSES[0], AVERAGE: VALIDATION_LOSSES[1]}


def train_lora(
    config: TrainConfig,
    observer: Observer = SILENT,
    *,
    model: PreparedModel | None = None,
    extra_check: ExtraCheck | None = None,
    continue_kept: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainResult:
    """Train one LoRA from the start, or resume from the newest checkpoint in its run folder.

    Returns the recorded result of a run that is finished, or was ended early; `continue_kept` continues the latter.
    `model`: the result of `check_training`, if it was called before. `extra_check`: called with the LoRA file before it
    gets its final name. Every process of `ranks` makes this call with the same config and gets the same result; only
    the leader validates and writes.

    Raises:
        TrainerError: something the user can fix; see errors.py.
        Interrupted: the user stopped before the first step. A later stop returns a result.
    """
    with disk_errors(Path(config.run_dir)):
        if finished := find_result(config, continue_kept=continue_kept, num_ranks=ranks.size):
            return finished
        return _prepare_and_train(config, observer, model, extra_check, ranks, continue_kept=continue_kept)


def _prepare_and_train(
    config: TrainConfig,
    observer: Observer,
    model: PreparedModel | None,
    extra_check: ExtraCheck | None,
    ranks: Ranks,
    *,
    continue_kept: bool,
) -> TrainResult:
    began = time.monotonic()
    prepared = prepare_training(config, model, processes=ranks.on_machine)
    config, base = prepared.config, prepared.model.base
    if ranks.leads:
        for note in check_disk([run_use(config, prepared.model.size, prepared.work)]):
            _LOG.warning("%s", note)
    validator = Validator(prepared.held_out, base, config.validation, few_step_lora=prepared.model.few_step_lora)
    if ranks.leads and validator.unmeasured:
        observer.on_note(validator.unmeasured)
    device = pick_device(config.model.device)
    with _open_run(config, prepared.encoded, ranks) as run, compiled_code_kept(device), _attention_kept(run):
        stop = how_to_start(run, config, prepared.encoded, continue_kept=continue_kept)
        run.write_config(to_json(config))
        if run.writes:
            observer.on_open(run.path)
        if not stop:
            check_choice(config.model, run, device)
            start_compiler_early(prepared, device, run.steps_done())
        with prepared.explain_memory_errors(STEP, "while the model was loaded", "Nothing is lost."):
            networks = build_networks(config, base, prepared.model.adapter, prepared.encoded.preprocessing, observer)
        with closing(networks):
            result = _run(RunParts(prepared, run, networks, validator, observer, ranks, began), stop, extra_check)
        ranks.wait()  # until the leader has written the file
        return result


def _run(parts: RunParts, stop: Stop, extra_check: ExtraCheck | None) -> TrainResult:
    """Restore, train and export. With `stop`, only the export is missing."""
    done = _restore(parts)
    check_same_start(parts.ranks, done, parts.networks.lora)
    if not stop:
        _validate_if_missed(parts, done)
        done, stop = _train(parts, done)
    return finish(parts, done, stop, extra_check)


@contextmanager
def _open_run(config: TrainConfig, encoded: EncodedDataset, ranks: Ranks) -> Iterator[RunFolder]:
    """Create the run folder, or open that of the same settings. The other processes wait until the leader has."""
    path, key = Path(config.run_dir), resume_key(config, ranks.size)
    with RunFolder.open(path, key, encoded) if ranks.leads else nullcontext(RunFolder(path, writes=False)) as run:
        ranks.wait()
        yield run


def _attention_kept(run: RunFolder) -> AbstractContextManager[None]:
    """A context in which the run goes on with the attention kernels that it began with."""
    return kept_choices(run.state().get("attention_kernels"), lambda names: run.write_state(attention_kernels=names))


def _restore(parts: RunParts) -> int:
    """Load the newest checkpoint, if there is one. Returns its number of steps."""
    checkpoint, networks = parts.run.latest_checkpoint(), parts.networks
    parts.run.metrics_until(checkpoint)
    if checkpoint is None:
        return 0
    if _shapes(checkpoint.lora) != _shapes(networks.lora):
        raise RunFolderError(
            f"The checkpoint of step {checkpoint.step} in {parts.run.checkpoints} does not match the layers of this "
            "run's adapter. Move it out of the folder; the run then continues from the checkpoint before it."
        )
    with torch.no_grad():
        for name, parameter in networks.lora.items():
            parameter.copy_(checkpoint.lora[name])
    networks.weights.publish()
    restore_optimizer(networks.optimizer, networks.lora, checkpoint.optimizer)
    restore_ema(networks.ema, checkpoint.ema)
    return checkpoint.step


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _train(parts: RunParts, done: int) -> tuple[int, Stop]:
    """Train until max_train_steps or until the user stops. Returns the number of steps and the user's wish."""
    prepared, networks, config, encoded = parts.prepared, parts.networks, parts.prepared.config, parts.prepared.encoded
    whole = BatchPlan(encoded, config.batching, config.seed, config.preservation)
    plan = RankPlan(whole, parts.ranks, config.batching.gradient_accumulation_steps)
    report = None
    with (
        metrics_writer(parts.run, done) as write_metrics,
        reference_encoder(encoded, prepared.model.base, parts.observer) as encode_reference,
        BatchLoader(
            encoded, plan, encode_reference=encode_reference, in_background=networks.device.type != "mps"
        ) as loader,
    ):
        products = choose_products(prepared, networks, loader, parts.run, parts.ranks)
        dry_step(prepared, networks, loader, done, parts.observer, products)
        try:
            while done < config.max_train_steps:
                during, kept = f"in step {done + 1}", f"The run is saved up to step {done}."
                with prepared.explain_memory_errors(STEP, during, kept):
                    gradients = step_gradients(networks, loader, done, config, parts.observer)
                before, report = report, None  # half-updated weights must not be saved
                kept = "The run resumes from its last checkpoint."
                try:
                    with prepared.explain_memory_errors(STEP, f"{during}, while the weights were updated", kept):
                        report = update_weights(networks, gradients, config)
                except NonFiniteLossError:  # nothing was updated
                    report = before
                    raise
                done = report.step
                if done % config.checkpoints.checkpoint_step_interval == 0:
                    save(parts, report)
                if _validation_is_due(parts, done):
                    report = dataclasses.replace(report, **_validate(parts, done))
                    if best_step(parts) == done:
                        save(parts, report)
                write_metrics(report)
                parts.observer.on_step(report)
                if stop := parts.ranks.agree(parts.observer.should_stop()):  # all processes leave after the same step
                    return done, stop
        except Interrupted as stopped:
            return done, Stop.KEEP if stopped.keep else Stop.PAUSE
        finally:
            networks.graphs.clear()
            save(parts, report)
    return done, Stop.NO


def _validation_is_due(parts: RunParts, done: int) -> bool:
    """Whether to validate after this step."""
    config = parts.prepared.config
    return validation_is_due(config.validation, done, config.max_train_steps)


def _validate_if_missed(parts: RunParts, done: int) -> None:
    """Validate the restored step if a stop or a kill cut its validation short."""
    is_missed = done > 0 and _validation_is_due(parts, done) and parts.run.state().get("validated") != done
    if is_missed and (found := _validate(parts, done)):
        *rows, last = parts.run.metrics()
        parts.run.write_metrics([*rows, {**last, **found}])


def _validate(parts: RunParts, done: int) -> dict[str, float]:
    """Losses and drift of a step for its report; empty without held-out pairs, in a process that doesn't lead, or
    if the user stops. Saves the pictures and shows them to the observer."""
    run, observer = parts.run, parts.observer
    if not parts.validator or not run.writes:
        return {}
    parts.networks.graphs.clear()  # sampling and decoding may need their memory
    kept = (
        "The run is saved up to this step. To continue it, lower validation_resolution, or set "
        "num_validation_images to 0, which still measures the validation loss."
    )
    try:
        with (
            parts.prepared.explain_memory_errors(VALIDATION, f"during the validation of step {done}", kept),
            parts.networks.compilation.forward_only(),
            exact_products(parts.networks.transformer),  # as most graphs compute that the LoRA is made for
        ):
            found, samples = _losses_and_samples(parts, done)
    except Interrupted:
        return {}  # the training loop asks the observer next, together with the other processes
    if samples is not None:
        run.write_state(samples={**dataclasses.asdict(samples), "grid_file": samples.grid_file.name})
        observer.on_samples(samples)
    run.write_state(validated=done)
    return {**found, **(samples.drift() if samples else {})}


def _losses_and_samples(parts: RunParts, done: int) -> tuple[dict[str, float], SampleReport | None]:
    """The validation losses of a step by their names in a report, and its pictures."""
    networks, run, observer, losses = parts.networks, parts.run, parts.observer, dict[str, float]()
    variants = weights_to_validate(networks.weights_to_use, networks.average_to_use, parts.prepared.config.ema)
    for name, weights in variants.items():
        with weights():
            losses[LOSS_OF[name]] = parts.validator.loss(networks.transformer, networks.device, observer)
    with networks.compilation.paused() if parts.prepared.model.few_step_lora else nullcontext():
        samples = parts.validator.sample(
            networks.transformer,
            networks.device,
            variants,
            step=done,
            grid_file=run.grid_file(done),
            base_folder=run.base_pictures,
            observer=observer,
        )
    keep_step_loras(parts, done, variants, {name: losses[LOSS_OF[name]] for name in variants}, samples)
    return losses, samples
