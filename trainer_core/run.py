"""Train one LoRA: the whole story. The only module that sees every stage."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from .conditioning.batches import Batch, BatchLoader, BatchPlan
from .conditioning.encoded import EncodedDataset, load_encoded
from .config import TrainConfig, resume_key, to_json
from .device import pick_device
from .errors import ConfigError, DatasetError, Interrupted, NonFiniteLossError
from .events import SILENT, Observer, SampleReport, StepReport, Stop, raise_if_stopped
from .export.lora_file import ExtraCheck, LoraMetadata, export_lora
from .qwen_image.transformer import load_transformer, predict_velocity
from .rng import seeded_globally
from .training.lora import inject_lora
from .training.metrics import Metrics
from .training.objective import add_noise, loss_by_sigma, velocity_loss
from .training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from .training.run_folder import Checkpoint, RunFolder
from .training.schedule import learning_rate_at
from .training.validation import Validator

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. `lora_file` is None when it was paused; ratios (dB) are None without held-out pairs."""

    run_dir: Path
    steps_done: int
    stopped: Stop
    lora_file: Path | None = None
    samples: SampleReport | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Networks:
    """The frozen transformer with its adapter's parameters by name, the only trainable weights."""

    transformer: QwenImageTransformer2DModel
    lora: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    device: torch.device


def train_lora(
    config: TrainConfig,
    observer: Observer = SILENT,
    *,
    extra_check: ExtraCheck | None = None,
    continue_kept: bool = False,
) -> TrainResult:
    """Train one LoRA, from the start or from where this run folder stopped.

    A finished run, or one that was ended early and kept, is answered from its folder; `continue_kept` goes on with
    the latter. `extra_check` reads the exported file before it gets its name and raises if it won't load.

    Raises:
        TrainerError: something the user can mend; see errors.py.
        Interrupted: stopped before the first step could begin. A stop later returns a result.
    """
    finished = find_result(config, continue_kept=continue_kept)
    if finished is not None:
        return finished
    encoded = load_encoded(Path(config.encoded))
    validator = Validator(_validation_set(config, encoded), config.model, config.validation)
    run = RunFolder.open(Path(config.run_dir), resume_key(config))  # refuses a folder of another run
    run.write_config(to_json(config))

    networks = _build_networks(config, observer)
    done, stop = _restore(run, networks), Stop.NO  # 0 in a fresh folder
    plan = BatchPlan(encoded, config.batching, config.seed)  # micro-batch i of the run, a pure function of i
    with Metrics(run, done) as metrics, BatchLoader(encoded, plan) as loader:
        while done < config.max_train_steps and not stop:
            try:
                report = _train_step(networks, loader, done, config, observer)
            except BaseException:  # the weights are still those of the last whole step
                _save(run, done, networks, config)
                raise
            if isinstance(report, Stop):
                stop = report
                break
            done = report.step
            if done % config.checkpoints.checkpoint_step_interval == 0:
                _save(run, done, networks, config)
            if _validation_is_due(done, config):
                report = _validate(validator, networks, run, report, observer)
            metrics.write(report)
            observer.on_step(report)
            stop = observer.should_stop()  # asked once here: two answers may differ
    _save(run, done, networks, config)
    return _finish(config, run, networks, validator, done, stop, observer, extra_check)


def find_result(config: TrainConfig, *, continue_kept: bool = False) -> TrainResult | None:
    """The result of a run that needs no more training under these settings, from its folder in a moment."""
    run = RunFolder(Path(config.run_dir))
    state = run.state()
    result = state.get("result")
    if not result or state["key"] != resume_key(config) or result["export"] != to_json(config.export):
        return None
    complete = result["steps"] == config.max_train_steps or (result["kept"] and not continue_kept)
    lora_file = run.path / result["lora_file"]
    if not complete or not lora_file.is_file():
        return None
    return TrainResult(
        run_dir=run.path,
        steps_done=result["steps"],
        stopped=Stop.KEEP if result["kept"] else Stop.NO,
        lora_file=lora_file,
        samples=_recorded_samples(run),
    )


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
    if not encoded.pairs:
        raise DatasetError("The dataset has no pair to train on: all are held out. Lower num_eval_images.")
    if not second.validation_pairs and config.validation_encoded:
        raise DatasetError("The validation dataset holds no pair out. Encode it with num_eval_images -1.")
    return second


def _build_networks(config: TrainConfig, observer: Observer) -> _Networks:
    device = pick_device(config.model.device)
    transformer = load_transformer(config.model, device, observer)
    raise_if_stopped(observer)
    lora = inject_lora(transformer, config.lora, config.seed)
    transformer.train(config.lora.lora_dropout > 0)  # the only dropout there is
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, preserve_rng_state=config.lora.lora_dropout > 0)
        )
    return _Networks(transformer, lora, build_optimizer(lora, config.optimizer), device)


def _train_step(
    networks: _Networks, loader: BatchLoader, done: int, config: TrainConfig, observer: Observer
) -> StepReport | Stop:
    """One optimizer step, or the wish to stop, which leaves weights and optimizer as they were.

    Raises:
        NonFiniteLossError: before the weights are touched.
    """
    began = time.perf_counter()
    learning_rate = learning_rate_at(done, config.max_train_steps, config.optimizer)
    for group in networks.optimizer.param_groups:
        group["lr"] = learning_rate
    accumulated = _accumulate(networks, loader, done, config, observer)
    if isinstance(accumulated, Stop):
        networks.optimizer.zero_grad(set_to_none=True)
        return accumulated
    losses, sigmas = accumulated
    grad_norm = clip_grad_norm_(networks.lora.values(), config.optimizer.max_grad_norm or math.inf)
    numbers = torch.cat([losses, sigmas, grad_norm.float().view(1)]).tolist()  # the step's one wait for the device
    loss = sum(numbers[: len(losses)]) / len(losses)
    _raise_if_not_finite(loss, numbers[-1], done, config)
    networks.optimizer.step()
    networks.optimizer.zero_grad(set_to_none=True)
    return StepReport(
        step=done + 1,
        num_steps=config.max_train_steps,
        loss=loss,
        grad_norm=numbers[-1],
        learning_rate=learning_rate,
        loss_by_sigma=loss_by_sigma(numbers[: len(losses)], numbers[len(losses) : -1]),
        seconds=time.perf_counter() - began,
        peak_bytes=torch.cuda.max_memory_allocated() if networks.device.type == "cuda" else 0,
    )


def _accumulate(
    networks: _Networks, loader: BatchLoader, done: int, config: TrainConfig, observer: Observer
) -> tuple[Tensor, Tensor] | Stop:
    """Forward and backward of each micro-batch of a step: losses and sigmas of its pairs, on the device.

    Every pair weighs the same, so 1 x 4 and 4 x 1 give equal gradients.
    """
    count = config.batching.gradient_accumulation_steps
    batches = range(done * count, (done + 1) * count)
    num_pairs = sum(len(loader.plan[number]) for number in batches)
    losses, sigmas = [], []
    for number in batches:
        if stop := observer.should_stop():
            return stop
        loss, sigma = _pair_losses(networks, loader[number], config)
        (loss.sum() / num_pairs).backward()
        losses.append(loss.detach())
        sigmas.append(sigma)
    return torch.cat(losses), torch.cat(sigmas)


def _pair_losses(networks: _Networks, batch: Batch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Loss and sigma [B] of a micro-batch's pairs."""
    latents = batch.target_latents.to(networks.device, non_blocking=True)
    indices = [draw.index for draw in batch.draws]
    noisy = add_noise(latents, config.noise, config.seed, indices)
    condition = batch.condition.to(networks.device)
    with autocast(networks.device, config), _dropout(config, indices[0], networks.device):
        velocity = predict_velocity(networks.transformer, noisy.latents, noisy.sigma, condition)
    return velocity_loss(velocity, noisy.target_velocity), noisy.sigma


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bfloat16 matrix products over float32 adapter weights, or nothing under mixed_precision `no`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.model.mixed_precision == "bf16")


def _dropout(config: TrainConfig, index: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
    if config.lora.lora_dropout == 0:
        return contextlib.nullcontext()
    return seeded_globally(config.seed, "dropout", index, device)


def _raise_if_not_finite(loss: float, grad_norm: float, done: int, config: TrainConfig) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise NonFiniteLossError(
        f"The loss became {loss} (gradient norm {grad_norm}) at step {done + 1}. The weights are still those of step "
        f"{done} and a checkpoint of them is kept. Usual causes: learning_rate too high (it is "
        f"{config.optimizer.learning_rate}), or a damaged picture or model file."
    )


def _validation_is_due(done: int, config: TrainConfig) -> bool:
    interval = config.validation.validation_step_interval
    return done == config.max_train_steps or (interval > 0 and done % interval == 0)


def _validate(
    validator: Validator, networks: _Networks, run: RunFolder, report: StepReport, observer: Observer
) -> StepReport:
    """The step's report with the validation loss in it; pictures go to the run folder and the observer."""
    try:
        loss = _validate_at(validator, networks, run, report.step, observer)
    except Interrupted:
        return report  # the loop asks the observer next
    return dataclasses.replace(report, validation_loss=loss)


def _validate_at(
    validator: Validator, networks: _Networks, run: RunFolder, step: int, observer: Observer
) -> float | None:
    if not validator:
        return None
    with autocast_like(networks):
        loss = validator.loss(networks.transformer, networks.device, observer)
        samples = validator.sample(
            networks.transformer, networks.device, step=step, grid_file=run.grid_file(step), observer=observer
        )
    if samples is not None:
        record = {**dataclasses.asdict(samples), "grid_file": samples.grid_file.name}
        run.write_state(samples=record)
        observer.on_samples(samples)
    return loss


def autocast_like(networks: _Networks) -> torch.autocast:
    """The training's arithmetic for sampling: bfloat16 where the transformer's unquantised weights are."""
    dtype = networks.transformer.proj_out.weight.dtype
    return torch.autocast(networks.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _recorded_samples(run: RunFolder) -> SampleReport | None:
    record = run.state().get("samples")
    return SampleReport(**{**record, "grid_file": run.samples / record["grid_file"]}) if record else None


def _restore(run: RunFolder, networks: _Networks) -> int:
    """Put the newest checkpoint into adapter and optimizer; the number of steps it stands for."""
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        return 0
    with torch.no_grad():
        for name, parameter in networks.lora.items():
            parameter.copy_(checkpoint.lora[name])
    restore_optimizer(networks.optimizer, networks.lora, checkpoint.optimizer)
    return checkpoint.step


def _save(run: RunFolder, done: int, networks: _Networks, config: TrainConfig) -> None:
    """A checkpoint of `done` steps; nothing to keep before the first."""
    if done > 0:
        state = Checkpoint(done, dict(networks.lora), optimizer_tensors(networks.optimizer, networks.lora))
        run.save_checkpoint(state, config.checkpoints.checkpoints_total_limit)


def _finish(
    config: TrainConfig,
    run: RunFolder,
    networks: _Networks,
    validator: Validator,
    done: int,
    stop: Stop,
    observer: Observer,
    extra_check: ExtraCheck | None,
) -> TrainResult:
    """Export unless the run was paused, and note in the folder how it ended."""
    if stop is Stop.PAUSE or done == 0:
        run.write_state(state="paused", steps=done)
        return TrainResult(run_dir=run.path, steps_done=done, stopped=stop or Stop.PAUSE)
    samples = _recorded_samples(run)
    if stop is Stop.NO and (samples is None or samples.step != done):  # a kill came between checkpoint and pictures
        _validate_at(validator, networks, run, done, observer)
        samples = _recorded_samples(run)
    path = run.path / f"{config.export.lora_name or run.path.name}.safetensors"
    export_lora(networks.lora, path, LoraMetadata(config, done), extra_check)
    kept = stop is Stop.KEEP
    result = {"lora_file": path.name, "steps": done, "kept": kept, "export": to_json(config.export)}
    run.write_state(state="kept" if kept else "finished", steps=done, result=result)
    return TrainResult(run_dir=run.path, steps_done=done, stopped=stop, lora_file=path, samples=samples)
