"""A training step of the full-size transformer with random weights, and the memory that the planner expects for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from trainer_core.adapters.inject import inject_lora, without_dropout
from trainer_core.adapters.master_weights import MasterWeights, master_weights
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import (
    BatchingConfig,
    EmaConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer_core.events import SILENT
from trainer_core.geometry import Size
from trainer_core.memory.capture import CapturePool
from trainer_core.memory.compilation import Compilation
from trainer_core.memory.placement import apply_memory, blocks_on_host, stream_blocks
from trainer_core.memory.step_graphs import StepGraphs
from trainer_core.planning.network import NetworkSize, network_size
from trainer_core.planning.plan import MemoryPlan, plan_memory
from trainer_core.planning.workload import Workload, pair_size
from trainer_core.precision.frozen_linear import FrozenLinear, set_products
from trainer_core.precision.quantise import quantise
from trainer_core.qwen_image.base_model import compute_dtype, empty_transformer
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.qwen_image.frozen_forward import optimise_frozen_forward
from trainer_core.qwen_image.transformer import predict_velocities, predict_velocity
from trainer_core.qwen_image.types import Condition, NoisyLatents
from trainer_core.training.ema import start_ema, update_ema
from trainer_core.training.objective import add_noise, velocity_loss
from trainer_core.training.optimizer import optimizer_builder

GIB = 2**30

PROMPT_TOKENS = 230  # edit-v2 with one reference: 196 vision tokens and a sentence

RANK = 16

Step = Callable[[Tensor, Sequence[Condition]], None]


@dataclass(frozen=True)
class Setting:
    """One measured configuration. `memory` is a list such as "blocks=20,offload,attention"; `side` is in pixels. With
    "graph" in the list, the second step is captured and later ones replay CUDA graphs. With "8bit", `matmul_precision`
    is that.

    With `rollout`, a forward pass without gradients of each pair comes first.
    """

    step: str  # "ours" or "plain"
    precision: str
    side: int
    references: int
    memory: str
    adapter: str = "lora"
    targets: str = "image-attention"
    rank: int = RANK
    dropout: float = 0.0
    batch: int = 1
    flavour: str = "edit-v2"
    arithmetic: str = "bf16"  # mixed_precision; "no" is float32
    quantised_inputs: bool = False
    ema: bool = False
    rollout: bool = False
    micro_batches: int = 1  # per step
    optimizer: str = "adamw"
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def name(self) -> str:
        """Weights, side and memory, and the other fields if they differ from the usual: int8-quanto/1024/full."""
        usual = Setting("ours", self.precision, self.side, 1, self.memory)
        values = {each.name: (getattr(self, each.name), getattr(usual, each.name)) for each in fields(self)}
        others = [f"{name}={value}" for name, (value, default) in values.items() if value != default]
        return "/".join([self.precision, str(self.side), self.memory, *others])

    @property
    def config(self) -> TrainConfig:
        """The training settings."""
        words = dict(word.partition("=")[::2] for word in self.memory.split(","))
        memory = MemoryConfig(
            gradient_checkpointing_blocks=int(words.get("blocks", -1)),
            blocks_to_stream=int(words.get("stream", 0)),
            stream_buffers=int(words.get("buffers", 2)),
            activation_offload="offload" in words,
            recompute_attention="attention" in words,
            compile_blocks="on" if "compile" in words else "off",
        )
        model: dict[str, Any] = {"base_model_precision": self.precision, "mixed_precision": self.arithmetic}
        model |= {"flavour": self.flavour, "quantize_activations": self.quantised_inputs}
        model |= {"matmul_precision": "8bit" if "8bit" in words else "bf16"}
        lora: dict[str, Any] = {"lora_type": self.adapter, "lora_targets": self.targets}
        return TrainConfig(
            run_dir="-",
            encoded="-",
            gradient_checkpointing="none" not in words,
            memory=memory,
            model=ModelConfig(**model),
            lora=LoraConfig(lora_rank=self.rank, lora_dropout=self.dropout, **lora),
            batching=BatchingConfig(train_batch_size=self.batch, gradient_accumulation_steps=self.micro_batches),
            optimizer=OptimizerConfig(optimizer=self.optimizer),  # type: ignore[arg-type]
            ema=EmaConfig(use_ema=self.ema, ema_device="accelerator"),
        )

    @property
    def is_graphed(self) -> bool:
        """Whether steps run as CUDA graphs."""
        return "graph" in self.memory.split(",")

    @property
    def network(self) -> dict[str, bool]:
        """The transformer's settings that differ from Qwen-Image's."""
        return {"zero_cond_t": FLAVOURS[self.config.model.flavour].zero_cond_t}

    def inputs(self, device: torch.device) -> tuple[Tensor, tuple[Condition, ...]]:
        """Random latents [batch, C, H, W] and conditions of a micro-batch."""
        side = self.side // 8
        latents, *references = (
            torch.randn(self.batch, 16, side, side, device=device) for _ in range(1 + self.references)
        )
        prompt = torch.randn(self.batch, self.prompt_tokens, 3584, device=device)
        of_pairs = zip(*(each.split(1) for each in (prompt, *references)), strict=True)
        return latents, tuple(Condition(tuple(seen), embeds) for embeds, *seen in of_pairs)


def other_fields(text: str) -> dict[str, Any]:
    """Fields of Setting from a list such as "rank=128,ema=1"."""
    values = dict(word.partition("=")[::2] for word in text.split(",") if word)
    return {
        name: type(getattr(Setting, name))(int(value) if value.isdigit() else value) for name, value in values.items()
    }


def build(setting: Setting, layers: int, device: torch.device, on_host: tuple[int, ...]) -> Any:
    """A frozen transformer with random weights in the setting's precision; blocks in `on_host` are in host memory."""
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=layers, **setting.network)
    transformer.to(compute_dtype(setting.config.model)).requires_grad_(False)
    if setting.step == "ours":
        optimise_frozen_forward(transformer)
    blocks = list(transformer.transformer_blocks)
    for index, block in enumerate(blocks):
        draw(block, device)
        holder = nn.ModuleList([block])
        if setting.step == "plain" and setting.precision.endswith("quanto"):
            quantise_plainly(block, setting.precision)
        else:
            quantise(holder, setting.precision, (), device, SILENT)  # type: ignore[arg-type]
        for layer in holder.modules():
            if isinstance(layer, FrozenLinear):
                layer.rounds_input = setting.quantised_inputs
        blocks[index] = holder[0].to("cpu") if index in on_host else holder[0]
    transformer.transformer_blocks = nn.ModuleList()
    draw(transformer, device)
    transformer.transformer_blocks = nn.ModuleList(blocks)
    transformer.pos_embed = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    return transformer.eval()


def quantise_plainly(block: nn.Module, precision: str) -> None:
    """Quantise with quanto's own layers."""
    from optimum.quanto import freeze, qtypes
    from optimum.quanto import quantize as quanto_quantise

    kinds = {"int8-quanto": "qint8", "fp8-quanto": "qfloat8", "int4-quanto": "qint4", "int2-quanto": "qint2"}
    quanto_quantise(block, weights=qtypes[kinds[precision]])
    freeze(block)


def draw(module: nn.Module, device: torch.device) -> None:
    """Fill with random weights on the scale of a trained network's, drawn on the device."""
    module.to_empty(device=device)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.02)
        else:
            weight.data.fill_(1.0 if "norm" in name else 0.0)


@dataclass(frozen=True)
class OurStep:
    """The product's step. A call runs the passes of all micro-batches and updates the weights."""

    transformer: Any
    setting: Setting
    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    graphs: StepGraphs

    def __call__(self, latents: Tensor, conditions: Sequence[Condition]) -> None:
        self.passes(latents, conditions)
        masters = self.weights.masters
        nn.utils.clip_grad_norm_(masters.values(), 1.0)
        self.optimizer.step()
        self.weights.publish()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.average, masters, 1, self.setting.config.ema)

    def passes(self, latents: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Forward and backward passes of all micro-batches, which have the same noise. Returns a pair's losses [B]."""
        setting, transformer = self.setting, self.transformer
        noisy = add_noise(latents, NoiseConfig(), 0, range(setting.batch))
        if setting.rollout:
            with torch.no_grad(), without_dropout(transformer):
                for row, condition in enumerate(conditions):
                    pair = noisy.latents[row : row + 1], noisy.sigma[row : row + 1]
                    noisy.latents[row] = predict_velocity(transformer, *pair, condition)[0]
        for _ in range(setting.micro_batches):
            losses = self._micro_batch(noisy, conditions)
        return losses

    def _micro_batch(self, noisy: NoisyLatents, conditions: Sequence[Condition]) -> Tensor:
        """As in `training/step.py`, nothing of autograd's graph outlives the call."""
        latents, targets = noisy.latents.split(1), noisy.target_velocity.split(1)
        velocities = predict_velocities(self.transformer, latents, noisy.sigma, conditions, self.graphs)
        losses = torch.cat(list(map(velocity_loss, velocities, targets)))
        losses.sum().backward()
        return losses.detach()


def our_step(setting: Setting, layers: int, device: torch.device) -> tuple[Any, OurStep]:
    """The transformer and the product's step: its placement, adapter, objective, forward, optimizer and average."""
    config = setting.config
    on_host = blocks_on_host(config.memory, layers, checkpointing=config.gradient_checkpointing)
    transformer = build(setting, layers, device, on_host)
    stream = stream_blocks(transformer, on_host, device, config.memory)
    parameters = inject_lora(transformer, plan_adapter(transformer, config.lora), seed=0)
    weights = master_weights(parameters, compute_dtype(config.model))
    transformer.train(setting.dropout > 0)
    set_products(transformer, device, in_8_bits=config.model.matmul_precision == "8bit")
    graphs = StepGraphs(
        weights.masters.values(), CapturePool(device, apply_memory(transformer, stream, device, config))
    )
    if setting.is_graphed:
        graphs.start()
    if config.memory.compile_blocks == "on":
        Compilation(list(transformer.transformer_blocks)).start()
    optimizer = optimizer_builder(config.optimizer, device)(list(weights.masters.values()))
    average = start_ema(weights.masters, config.ema)
    return transformer, OurStep(transformer, setting, weights, optimizer, average, graphs)


def planned_bytes(setting: Setting, layers: int) -> int:
    """Peak device memory in bytes that the planner expects for the step "ours"."""
    phase = memory_plan(setting, layers).phase("training")
    assert phase is not None
    return phase.total_bytes


def memory_plan(setting: Setting, layers: int) -> MemoryPlan:
    """The memory plan of the step "ours"."""
    return plan_memory(*planned_run(setting, layers), graphs=setting.is_graphed)


def planned_run(setting: Setting, layers: int) -> tuple[TrainConfig, NetworkSize, Workload]:
    """The step "ours" as the planner sees it."""
    config = setting.config
    empty = empty_transformer({"num_layers": layers, **setting.network})
    optimise_frozen_forward(empty)
    network = network_size(empty, plan_adapter(empty, config.lora), config.model)
    side = Size(setting.side, setting.side)
    pair = pair_size(side, [side] * setting.references, setting.prompt_tokens)
    return config, network, Workload(train=pair, batch=setting.batch)
