"""Measures the time and memory that the training loop needs beyond the network's own work."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.events import SilentObserver, StepReport
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.run import train_lora
from trainer_core.training.optimizer import optimizer_builder

WARM_UP = 5  # the first steps are not measured


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Seconds per loop step and per bare step, measured alternately; wall time, then CPU time.

    With one torch thread, CPU time hardly depends on the machine's other load (waiting threads would spin).
    """

    loop: list[float]
    bare: list[float]
    loop_cpu: list[float]
    bare_cpu: list[float]

    @property
    def ratio(self) -> float:
        """Median loop time over median bare time."""
        return statistics.median(self.loop) / statistics.median(self.bare)

    @property
    def cpu_ratio(self) -> float:
        """The same ratio in CPU time."""
        return statistics.median(self.loop_cpu) / statistics.median(self.bare_cpu)

    @property
    def ratio_of_fastest(self) -> float:
        """The ratio of the means of the fastest tenths, which other programs disturb least."""
        tenth = max(1, len(self.loop) // 10)
        return statistics.mean(sorted(self.loop)[:tenth]) / statistics.mean(sorted(self.bare)[:tenth])


@dataclasses.dataclass(frozen=True)
class Memory:
    """The process's memory and live Python objects after a step."""

    step: int
    resident_bytes: int
    objects: int
    tensors: int


def train_config(folder: Path, encoded: EncodedDataset, model: ModelConfig, steps: int) -> TrainConfig:
    """Settings without validation or periodic checkpoints, because these are not costs of the loop itself."""
    return TrainConfig(
        run_dir=str(folder),
        encoded=str(encoded.manifest),
        max_train_steps=steps,
        model=model,
        lora=LoraConfig(lora_rank=16, lora_targets="attention-mlp"),
        batching=BatchingConfig(train_batch_size=1, gradient_accumulation_steps=1),
        validation=ValidationConfig(num_validation_images=0),
        checkpoints=CheckpointConfig(checkpoint_step_interval=1_000_000),
    )


def bare_step(config: TrainConfig) -> Callable[[], None]:
    """Forward, backward and optimizer step on prepared tensors, with the loop's adapter and gradient checkpointing."""
    device = torch.device("cpu")
    transformer = load_transformer(BaseModel(config.model), device)
    lora = inject_lora(transformer, plan_adapter(transformer, config.lora), config.seed)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    optimizer = optimizer_builder(config.optimizer, device)(list(lora.values()))
    encoded = load_encoded(Path(config.encoded))
    pair = encoded.load(encoded.pairs[0])
    latents, references = pair.target_latents[None], tuple(each[None] for each in pair.reference_latents)
    noisy, wanted = torch.randn_like(latents), torch.randn_like(latents)
    condition, sigma = Condition(references, pair.prompt_embeds[None]), torch.tensor([0.5])

    def step() -> None:
        mse_loss(predict_velocity(transformer, noisy, sigma, condition), wanted).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_overhead(config: TrainConfig) -> Overhead:
    """Train, and run one bare step after each step of the loop."""
    bare = bare_step(config)
    overhead = Overhead([], [], [], [])

    class Between(SilentObserver):
        ended, ended_cpu = 0.0, 0.0

        def on_step(self, report: StepReport) -> None:
            began, began_cpu = time.perf_counter(), time.process_time()
            loop, loop_cpu = began - self.ended, began_cpu - self.ended_cpu
            bare()
            self.ended, self.ended_cpu = time.perf_counter(), time.process_time()
            if report.step > WARM_UP:
                overhead.loop.append(loop)
                overhead.loop_cpu.append(loop_cpu)
                overhead.bare.append(self.ended - began)
                overhead.bare_cpu.append(self.ended_cpu - began_cpu)

    train_lora(config, Between())
    return overhead


class _Operators(TorchDispatchMode):
    """Counts torch's operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operators(config: TrainConfig) -> tuple[list[int], int]:
    """Torch's operators in each step of a training, without the first steps, and in a bare step."""
    bare = bare_step(config)
    with _Operators() as operators:
        bare()  # the first step of an optimizer makes its state
        before = operators.count
        bare()
        in_bare = operators.count - before
    seen: list[int] = []

    class Look(SilentObserver):
        def on_step(self, report: StepReport) -> None:
            seen.append(operators.count)

    with _Operators() as operators:
        train_lora(config, Look())
    steps = [after - before for before, after in itertools.pairwise(seen)]
    return steps[WARM_UP:], in_bare


def measure_memory(config: TrainConfig, every: int) -> list[Memory]:
    """Train and record the process's memory after every `every` steps."""
    import psutil

    process, seen = psutil.Process(), []

    class Look(SilentObserver):
        def on_step(self, report: StepReport) -> None:
            if report.step % every == 0:
                gc.collect()
                objects = gc.get_objects()
                tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
                seen.append(Memory(report.step, process.memory_info().rss, len(objects), tensors))

    train_lora(config, Look())
    return seen


def encode(folder: Path, model: ModelConfig, *, resolution: int, pairs: int) -> tuple[EncodedDataset, float]:
    """Encode generated square pairs; returns the dataset and the seconds taken."""
    dataset = pair_folders(make_pairs(folder / "pairs", pairs, ((resolution, resolution),)))
    began = time.perf_counter()
    encoding = small_encoding(resolution=resolution, num_eval_images=0)
    return encode_dataset(dataset, BaseModel(model), encoding, folder / "cache"), time.perf_counter() - began
