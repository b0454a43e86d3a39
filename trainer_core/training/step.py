"""One optimizer step: forward and backward passes, gradient clipping, a check for NaN, and the update."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..adapters.frozen_loras import load_with_frozen_loras
from ..adapters.inject import ADAPTER, inject_lora, is_dora, put_start
from ..adapters.master_weights import MasterWeights, master_weights
from ..adapters.plan import AdapterPlan, LayerPlan
from ..adapters.reader import AdapterPart
from ..conditioning.batches import Batch, BatchLoader, Draw
from ..config import Preprocessing, TrainConfig
from ..device import peak_bytes, pick_device
from ..errors import Interrupted, NonFiniteLossError
from ..events import Observer, StepReport, Stop, raise_if_stopped
from ..memory.capture import CapturePool
from ..memory.compilation import Compilation
from ..memory.placement import apply_memory, blocks_on_host, stream_blocks, take_apart
from ..memory.step_graphs import StepGraphs
from ..qwen_image.base_model import BaseModel, compute_dtype
from ..qwen_image.positions import follow_comfyui
from .ema import Weights, average_in_place, start_ema, update_ema
from .objective import loss_by_sigma
from .optimizer import optimizer_builder, set_learning_rate, skip_update_if
from .optimizer_state import restored_after, weights_to_use
from .pair_losses import pair_losses
from .reduce import add_up_step
from .rollout import rollout_probability
from .schedule import learning_rate_at

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Networks:
    """The frozen transformer, the trainable adapter weights, and their optimizer."""

    transformer: QwenImageTransformer2DModel
    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    device: torch.device
    compilation: Compilation
    graphs: StepGraphs
    ema: dict[str, Tensor]  # moving average of the masters by name; empty without use_ema

    @property
    def lora(self) -> dict[str, nn.Parameter]:
        """The adapter's float32 master weights by name. After changing them, call `weights.publish`."""
        return self.weights.masters

    def close(self) -> None:
        """Free the memory of the transformer and of CUDA graphs. The trained weights stay."""
        try:
            self.graphs.clear()
        finally:
            take_apart(self.transformer)

    def weights_to_use(self) -> AbstractContextManager[None]:
        """Puts the trained weights, in the form to validate and export, into the network while the context lasts."""
        return self._published(weights_to_use(self.optimizer, self.lora))

    def average_to_use(self) -> AbstractContextManager[None]:
        """Puts the moving average into the network while the context lasts."""
        return self._published(average_in_place(self.lora, self.ema))

    @contextmanager
    def at_strength(self, weights: Weights, strength: float) -> Iterator[None]:
        """Puts these weights, with their weight changes times `strength`, into the network while the context lasts."""
        doras = [module.lora_magnitude_vector[ADAPTER] for module in self.transformer.modules() if is_dora(module)]
        scaled = (
            {}
            if doras
            else {name: copy for name, copy in self.weights.copies.items() if name.endswith((".lora_B", ".lokr_w1"))}
        )
        with weights(), restored_after(scaled), torch.no_grad():
            for copy in scaled.values():
                copy.mul_(strength)
            for magnitude in doras:
                magnitude.strength = strength
            try:
                yield
            finally:
                for magnitude in doras:
                    magnitude.strength = 1.0

    def file_to_use(
        self, changes: Mapping[str, AdapterPart], layers: Mapping[str, LayerPlan]
    ) -> AbstractContextManager[None]:
        """Puts the weight changes of one of this run's LoRA files into the network while the context lasts."""
        return self._published(self._of_file(changes, layers))

    @contextmanager
    def _of_file(self, changes: Mapping[str, AdapterPart], layers: Mapping[str, LayerPlan]) -> Iterator[None]:
        with restored_after(self.lora), torch.no_grad():
            for _ in range(2):  # the norms of a DoRA are computed from the other weights, which the network must have
                for name, part in changes.items():
                    put_start(self.transformer, self.lora, name, dataclasses.replace(layers[name], start=part))
                self.weights.publish()
            yield

    @contextmanager
    def _published(self, masters_replaced: AbstractContextManager[None]) -> Iterator[None]:
        try:
            with masters_replaced:
                self.weights.publish()
                yield
        finally:
            self.weights.publish()


def build_networks(
    config: TrainConfig, base: BaseModel, adapter: AdapterPlan, preprocessing: Preprocessing, observer: Observer
) -> Networks:
    """Load and quantise the transformer, add the adapter and create the optimizer.

    With `preprocessing` "comfyui" the transformer computes as in ComfyUI, otherwise as in diffusers' pipelines.

    Raises:
        ConfigError: the optimizer can't run on this device.
        ModelFileError: the base model can't be loaded.
        Interrupted: the observer wants to stop.
    """
    device = pick_device(config.model.device)
    build_optimizer = optimizer_builder(config.optimizer, device)  # before loading, so that errors come at once
    on_host = blocks_on_host(config.memory, base.num_blocks, checkpointing=config.gradient_checkpointing)
    transformer = load_with_frozen_loras(base, device, observer, on_host=on_host)
    stream = stream_blocks(transformer, on_host, device, config.memory)  # first: the adapter must stay on the device
    raise_if_stopped(observer)
    if preprocessing == "comfyui":
        follow_comfyui(transformer)
    parameters = inject_lora(transformer, adapter, config.seed)
    weights = master_weights(parameters, compute_dtype(config.model))
    transformer.train(config.lora.lora_dropout > 0)  # the network has no other dropout
    copies = apply_memory(transformer, stream, device, config)
    optimizer = build_optimizer(list(weights.masters.values()))
    compilation = Compilation(list(transformer.transformer_blocks), dropout=config.lora.lora_dropout > 0)
    graphs = StepGraphs(weights.masters.values(), CapturePool(device, copies))
    compilation.on_stop = graphs.forget  # those of compiled blocks, and what was seen with them
    average = start_ema(weights.masters, config.ema)
    return Networks(transformer, weights, optimizer, device, compilation, graphs, average)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Results of a step's forward and backward passes. The clipped gradients are in the parameters.

    `numbers` [3 * pairs + 1] are the losses of all pairs, their noise levels, their extra forward passes, and the
    gradients' norm. They are on the device, which may still compute them, or in host memory.
    """

    done: int  # number of steps before this one
    learning_rate: float
    numbers: Tensor
    preserves: list[bool]  # for each of the pairs
    began: float  # time.perf_counter() at the start of the step, in seconds


def step_gradients(
    networks: Networks, loader: BatchLoader, done: int, config: TrainConfig, observer: Observer
) -> Gradients:
    """First part of a step: compute and clip the gradients. Leaves weights, EMA and optimizer state unchanged.

    Raises:
        Interrupted: the observer of any process wants to stop.
        NonFiniteLossError: the loss or a gradient is NaN or infinite, and the optimizer can't skip the update itself.
        LostRankError: another process has ended or hangs.
    """
    began = time.perf_counter()
    rate = learning_rate_at(done, config.max_train_steps, config.optimizer)
    learning_rate = set_learning_rate(networks.optimizer, rate)
    try:
        accumulated = _accumulate(networks, loader, done, config, observer)
    except Interrupted:
        networks.optimizer.zero_grad(set_to_none=True)
        raise
    grad_norm = clip_grad_norm_(networks.lora.values(), config.optimizer.max_grad_norm or math.inf)
    numbers = torch.cat([accumulated.flatten(), grad_norm.float().view(1)])
    if not skip_update_if(networks.optimizer, 1 - numbers.isfinite().all().float()):
        numbers = numbers.cpu()
        _raise_if_not_finite(numbers, done, config)
    preserves = [draw.preserves for draw in loader.plan.draws_of_step(done)]
    return Gradients(done=done, learning_rate=learning_rate, numbers=numbers, preserves=preserves, began=began)


def update_weights(networks: Networks, gradients: Gradients, config: TrainConfig) -> StepReport:
    """Second part of a step. After an error in here the weights may be half updated: don't save them.

    Raises:
        NonFiniteLossError: the loss or a gradient is NaN or infinite. After this error only, weights, EMA and optimizer
            state are unchanged.
    """
    step = gradients.done + 1
    networks.optimizer.step()
    networks.weights.publish()
    networks.optimizer.zero_grad(set_to_none=True)
    # Waits for the device, which goes on with the update meanwhile. Numbers in host memory were waited for before it.
    numbers = gradients.numbers.cpu()
    _raise_if_not_finite(numbers, gradients.done, config)
    update_ema(networks.ema, networks.lora, step, config.ema)
    losses, sigmas, forwards = numbers[:-1].view(3, -1).tolist()
    edits = [number for number, preserves in enumerate(gradients.preserves) if not preserves]
    kept = [loss for loss, preserves in zip(losses, gradients.preserves, strict=True) if preserves]
    may_preserve = config.preservation.preservation_probability > 0 or bool(kept)
    counts = may_preserve or rollout_probability(gradients.done, config.rollout) > 0
    return StepReport(
        step=step,
        num_steps=config.max_train_steps,
        loss=fmean(losses[number] for number in edits) if edits else fmean(kept),
        preservation_loss=fmean(kept) if kept else None,
        grad_norm=numbers[-1].item(),
        learning_rate=gradients.learning_rate,
        loss_by_sigma=loss_by_sigma([losses[number] for number in edits], [sigmas[number] for number in edits]),
        seconds=time.perf_counter() - gradients.began,
        peak_bytes=peak_bytes(networks.device) + networks.graphs.held_bytes,
        extra_forwards=round(sum(forwards)) if counts else None,
    )


def _accumulate(networks: Networks, loader: BatchLoader, done: int, config: TrainConfig, observer: Observer) -> Tensor:
    """Forward and backward passes of a step's micro-batches.

    Returns [3, pairs] on the device: loss, sigma and extra forward passes (rollouts) of each pair in all processes.
    All pairs have equal weight, so only their number matters, not their split into micro-batches and processes.
    """
    plan = loader.plan
    draws = plan.draws_of_step(done)
    # Without what the processes exchange, which one of them can't repeat alone.
    rows, stop = attempt(networks, lambda: _own_passes(networks, loader, done, draws, config, observer))
    if stop := plan.ranks.agree(stop):  # all processes must stop in the same step, or one would wait for the others
        raise Interrupted(keep=stop is Stop.KEEP)
    before, own = draws.index(plan[done * plan.per_step][0]), torch.cat(rows, dim=1)
    return add_up_step(plan.ranks, networks.lora.values(), own, before=before, total=len(draws))


def _own_passes(
    networks: Networks,
    loader: BatchLoader,
    done: int,
    draws: Sequence[Draw],
    config: TrainConfig,
    observer: Observer,
) -> tuple[list[Tensor], Stop]:
    """The passes of this process's micro-batches. `draws`: the step's pairs in all processes.

    Returns [3, pairs] of each micro-batch, and whether the user wants to stop; the rest is then left out.
    """
    count, turns = loader.plan.per_step, range(draws[0].index, draws[0].index + len(draws))
    rows: list[Tensor] = []
    for number in range(done * count, (done + 1) * count):
        if stop := observer.should_stop():
            return rows, stop
        rows.append(_passes(networks, loader[number], turns, done, config))
    return rows, Stop.NO


def _passes(networks: Networks, batch: Batch, step_turns: range, done: int, config: TrainConfig) -> Tensor:
    """The passes of a micro-batch: [3, pairs] as in `_accumulate`.

    Nothing of autograd's graph outlives the call. The next micro-batch may be captured on another stream, and must not
    find nodes of the weights that autograd made on this one.
    """
    found = pair_losses(networks, batch, step_turns, done, config)
    (found.weighted.sum() / len(step_turns)).backward()
    return torch.cat([found.losses.detach().unsqueeze(0), found.numbers])


def attempt(networks: Networks, compute: Callable[[], T]) -> T:
    """Call `compute`, which runs passes, and return its result. If memory runs out, or compiled code fails, clear the
    gradients and call it again without what needs that memory or fails."""
    clean_up = networks.optimizer.zero_grad
    return networks.compilation.attempt(lambda: networks.graphs.attempt(compute, clean_up), clean_up)


def rehearse(networks: Networks, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """Forward and backward passes of a micro-batch. Returns the adapter's gradients by name, and clears them."""
    turns = range(batch.draws[0].index, batch.draws[-1].index + 1)
    pair_losses(networks, batch, turns, 0, config).weighted.sum().backward()
    gradients = {name: each.grad for name, each in networks.lora.items() if each.grad is not None}
    networks.optimizer.zero_grad(set_to_none=True)
    return gradients


def _raise_if_not_finite(numbers: Tensor, done: int, config: TrainConfig) -> None:
    """`numbers` are those of Gradients, in host memory."""
    if numbers.isfinite().all():
        return
    loss, grad_norm = numbers[:-1].view(3, -1)[0].mean().item(), numbers[-1].item()
    raise NonFiniteLossError(
        f"The loss or its gradient became NaN or infinite in step {done + 1} (loss {loss}, gradient norm {grad_norm}). "
        f"The run keeps the weights of step {done}. Lower learning_rate (now {config.optimizer.learning_rate}) and "
        "start a new run. If that does not help, look for a damaged picture or model file."
    )
