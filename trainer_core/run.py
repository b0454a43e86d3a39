"""Trains one LoRA: prepare, build, restore, step, validate, save, export."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch

from .adapters.inject import for_file
from .adapters.writer import LoraMetadata, export_lora
from .conditioning.batches import BatchLoader, BatchPlan, RankPlan
from .conditioning.encoded import EncodedDataset
from .conditioning.on_the_fly import reference_encoder
from .config import TrainConfig, resume_key, to_json
from .device import pick_device
from .disk import disk_errors
from .dry_step import dry_step, start_compiler_early
from .errors import ExportError, Interrupted, NonFiniteLossError, RunFolderError
from .events import SILENT, VALIDATION_LOSSES, Observer, SampleReport, StepReport, Stop
from .memory.compilation import compiled_code_kept
from .planning.advice import STEP, VALIDATION
from .planning.disk_space import check_disk, run_use
from .planning.preparation import Preparation, PreparedModel, prepare_training
from .precision.frozen_linear import exact_products
from .products import check_choice, choose_products
from .qwen_image.attention_choice import kept_choices
from .ranks import SINGLE_PROCESS, Ranks
from .runs.folder import Checkpoint, RunFolder
from .runs.metrics import metrics_writer
from .runs.result import TrainResult, find_result, how_to_start, recorded_samples
from .runs.step_loras import EMA, LORA, delete_old, results_header, step_folder
from .text import reason_of
from .training.ema import AVERAGE, TRAINED, Weights, restore_ema, weights_to_validate
from .training.optimizer_state import optimizer_tensors, restore_optimizer
from .training.reduce import check_same_start
from .training.step import Networks, build_networks, step_gradients, update_weights
from .training.validation import Validator
from .training.validation_work import validation_is_due

ExtraCheck = Callable[[Path, int], None]  # (LoRA file, number of the model's blocks); raises if it can't be loaded
_LOG = logging.getLogger(__name__)
_LOSS_OF = {TRAINED: VALIDATION_LOSSES[0], AVERAGE: VALIDATION_LOSSES[1]}
_FILE_OF = {TRAINED: LORA, AVERAGE: EMA}


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
            result = _run(_Parts(prepared, run, networks, validator, observer, ranks, began), stop, extra_check)
        ranks.wait()  # until the leader has written the file
        return result


def _run(parts: _Parts, stop: Stop, extra_check: ExtraCheck | None) -> TrainResult:
    """Restore, train and export. With `stop`, only the export is missing."""
    done = _restore(parts)
    check_same_start(parts.ranks, done, parts.networks.lora)
    if not stop:
        _validate_if_missed(parts, done)
        done, stop = _train(parts, done)
    return _finish(parts, done, stop, extra_check)


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
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


def _restore(parts: _Parts) -> int:
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


def _train(parts: _Parts, done: int) -> tuple[int, Stop]:
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
                    _save(parts, report)
                if _validation_is_due(parts, done):
                    report = dataclasses.replace(report, **_validate(parts, done))
                write_metrics(report)
                parts.observer.on_step(report)
                if stop := parts.ranks.agree(parts.observer.should_stop()):  # all processes leave after the same step
                    return done, stop
        except Interrupted as stopped:
            return done, Stop.KEEP if stopped.keep else Stop.PAUSE
        finally:
            networks.graphs.clear()
            _save(parts, report)
    return done, Stop.NO


def _save(parts: _Parts, report: StepReport | None) -> None:
    """Save a checkpoint. None (before the first step or during an update) saves nothing."""
    if report is not None:
        optimizer = optimizer_tensors(parts.networks.optimizer, parts.networks.lora)
        state = Checkpoint(report.as_dict(), dict(parts.networks.lora), optimizer, parts.networks.ema)
        parts.run.save_checkpoint(state, parts.prepared.config.checkpoints.checkpoints_total_limit)


def _validation_is_due(parts: _Parts, done: int) -> bool:
    """Whether to validate after this step."""
    config = parts.prepared.config
    return validation_is_due(config.validation, done, config.max_train_steps)


def _validate_if_missed(parts: _Parts, done: int) -> None:
    """Validate the restored step if a stop or a kill cut its validation short."""
    is_missed = done > 0 and _validation_is_due(parts, done) and parts.run.state().get("validated") != done
    if is_missed and (found := _validate(parts, done)):
        *rows, last = parts.run.metrics()
        parts.run.write_metrics([*rows, {**last, **found}])


def _validate(parts: _Parts, done: int) -> dict[str, float]:
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


def _losses_and_samples(parts: _Parts, done: int) -> tuple[dict[str, float], SampleReport | None]:
    """The validation losses of a step by their names in a report, and its pictures."""
    networks, run, observer, losses = parts.networks, parts.run, parts.observer, dict[str, float]()
    variants = weights_to_validate(networks.weights_to_use, networks.average_to_use, parts.prepared.config.ema)
    for name, weights in variants.items():
        with weights():
            losses[_LOSS_OF[name]] = parts.validator.loss(networks.transformer, networks.device, observer)
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
    _keep_loras(parts, done, variants, losses, samples)
    return losses, samples


def _keep_loras(
    parts: _Parts,
    done: int,
    variants: Mapping[str, Weights],
    losses: Mapping[str, float],
    samples: SampleReport | None,
) -> None:
    """Keep the LoRA of a validated step beside its pictures. If that fails, the training goes on."""
    limit, folder = parts.prepared.config.validation.validation_loras_total_limit, parts.run.samples
    if not limit:
        return
    psnr = {TRAINED: samples.psnr_lora, AVERAGE: samples.psnr_ema} if samples else {}
    try:
        for name, weights in variants.items():
            suffix = "-ema" if name == AVERAGE else ""
            results = results_header(psnr.get(name), losses[_LOSS_OF[name]])
            path, title = step_folder(folder, done) / _FILE_OF[name], f"{_lora_name(parts)}{suffix}-step-{done}"
            _export(parts, weights, path, done, title=title, more=results)
        delete_old(folder, done, limit)
    except (OSError, ExportError) as error:  # the disk is full, or the weights are NaN
        parts.observer.on_note(f"The LoRA of step {done} is not kept: {reason_of(error)}")


def _finish(parts: _Parts, done: int, stop: Stop, extra_check: ExtraCheck | None) -> TrainResult:
    """Export the LoRA, unless the run was paused, and record the result in the run folder."""
    run, networks, export = parts.run, parts.networks, parts.prepared.config.export
    if stop is Stop.PAUSE or done == 0:
        run.write_state(state="paused", steps=done, seconds=parts.seconds())
        return TrainResult(run_dir=run.path, steps_done=done, stopped=stop or Stop.PAUSE)
    name, kept = _lora_name(parts), stop is Stop.KEEP
    lora_file = run.path / f"{name}.safetensors"
    ema_file = run.path / f"{name}-ema.safetensors" if networks.ema else None
    _export(parts, networks.weights_to_use, lora_file, done, extra_check=extra_check)
    result = {"lora_file": lora_file.name, "steps": done, "kept": kept, "export": to_json(export)}
    if ema_file is not None:
        _export(parts, networks.average_to_use, ema_file, done, extra_check=extra_check)
        result["ema_file"] = ema_file.name
    run.write_state(state="kept" if kept else "finished", steps=done, result=result, seconds=parts.seconds())
    samples = recorded_samples(run)
    return TrainResult(
        run_dir=run.path, steps_done=done, stopped=stop, lora_file=lora_file, ema_file=ema_file, samples=samples
    )


def _lora_name(parts: _Parts) -> str:
    """Name of the run's LoRA file, without extension."""
    return parts.prepared.config.export.lora_name or parts.run.path.name


def _export(
    parts: _Parts,
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
