"""Nodes for the optional settings of a training: adapter, optimizer, loop, validation, memory and EMA."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    EmaConfig,
    LoraConfig,
    MemoryConfig,
    NoiseConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from ..trainer_core.errors import TrainerError
from . import host_folders, sockets
from .schema import fields_of, lines, new_input, new_output, node_schema, setting_input


class LoraSettings(io.ComfyNode):
    """Choose type, size and target layers of the adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LoraSettings",
            "Qwen Edit LoRA Settings",
            description="Type, size and target layers of the adapter. Without this node: rank 16 on the image "
            "attention.",
            search_aliases=["rank", "alpha", "network dim"],
            inputs=[
                setting_input(LoraConfig, "lora_rank"),
                setting_input(LoraConfig, "lora_alpha"),
                setting_input(LoraConfig, "lora_targets"),
                setting_input(LoraConfig, "lora_target_pattern", placeholder=r".*\.attn\.to_[qkv]"),
                setting_input(LoraConfig, "lora_dropout"),
                setting_input(LoraConfig, "lora_type", optional=True),
                setting_input(LoraConfig, "use_rslora", optional=True),
                setting_input(LoraConfig, "lokr_factor", optional=True),
                setting_input(LoraConfig, "rank_pattern", optional=True, placeholder="0-9 = 8"),
                setting_input(LoraConfig, "alpha_pattern", optional=True, placeholder="0-9 = 8"),
                new_input(
                    io.Combo,
                    "init_lora",
                    optional=True,
                    options=host_folders.lora_names(),
                    default=host_folders.NO_LORA,
                    tooltip="A LoRA to start from. Its layers keep their ranks; all other layers start fresh.",
                ),
            ],
            outputs=[new_output(sockets.LoraSettings, "lora_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, init_lora: str | None = None) -> bool | str:
        """Check that the LoRA is listed."""
        try:
            return init_lora in (None, host_folders.NO_LORA) or bool(host_folders.lora_path(init_lora))
        except TrainerError as error:
            return str(error)

    @classmethod
    def execute(
        cls, *, init_lora: str = host_folders.NO_LORA, rank_pattern: str = "", alpha_pattern: str = "", **widgets: Any
    ) -> io.NodeOutput:
        """Outputs a LoraConfig."""
        start = "" if init_lora == host_folders.NO_LORA else str(host_folders.lora_path(init_lora))
        ranks, alphas = lines(rank_pattern), lines(alpha_pattern)
        return io.NodeOutput(LoraConfig(**widgets, rank_pattern=ranks, alpha_pattern=alphas, init_lora=start))


class OptimizerSettings(io.ComfyNode):
    """Choose the optimizer and the learning rate schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "OptimizerSettings",
            "Qwen Edit Optimizer Settings",
            description="Optimizer and learning rate schedule. Without this node: AdamW at 1e-4, constant after a "
            "short warm-up.",
            search_aliases=["learning rate", "scheduler", "adamw", "lion", "prodigy", "adafactor", "schedule-free"],
            inputs=[
                setting_input(OptimizerConfig, "optimizer"),
                setting_input(OptimizerConfig, "learning_rate", round=1e-8),
                setting_input(OptimizerConfig, "lr_scheduler"),
                setting_input(OptimizerConfig, "lr_warmup_steps"),
                setting_input(OptimizerConfig, "weight_decay", round=1e-6),
                setting_input(OptimizerConfig, "adam_beta1", round=1e-4),
                setting_input(OptimizerConfig, "adam_beta2", round=1e-5),
                setting_input(OptimizerConfig, "adam_epsilon", round=1e-16),
                setting_input(OptimizerConfig, "max_grad_norm"),
                setting_input(OptimizerConfig, "lr_num_cycles", optional=True),
                setting_input(OptimizerConfig, "lr_power", optional=True),
                setting_input(OptimizerConfig, "lr_end", optional=True, round=1e-10),
                setting_input(OptimizerConfig, "lion_beta2", optional=True, round=1e-5),
                setting_input(OptimizerConfig, "prodigy_d_coef", optional=True),
            ],
            outputs=[new_output(sockets.OptimizerSettings, "optimizer_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        optimizer: str | None = None,
        learning_rate: float | None = None,
        lr_scheduler: str | None = None,
        lr_warmup_steps: int | None = None,
    ) -> bool | str:
        """Reject invalid combinations before the graph runs. Linked inputs arrive as None."""
        values: dict[str, Any] = {
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "lr_scheduler": lr_scheduler,
            "lr_warmup_steps": lr_warmup_steps,
        }
        if None in values.values():
            return True
        try:
            OptimizerConfig(**values, lr_end=0.0)
        except TrainerError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an OptimizerConfig."""
        return io.NodeOutput(OptimizerConfig(**widgets))


class TrainingSettings(io.ComfyNode):
    """Choose batches, noise levels, loss and checkpoints."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "TrainingSettings",
            "Qwen Edit Training Settings",
            description="Batches, noise levels, loss and checkpoints. Without this node: 4 pairs per step, one at a "
            "time, with gradient checkpointing.",
            search_aliases=["batch size", "gradient accumulation", "gradient checkpointing", "timestep", "huber"],
            inputs=[
                setting_input(BatchingConfig, "train_batch_size"),
                setting_input(BatchingConfig, "gradient_accumulation_steps"),
                setting_input(TrainConfig, "gradient_checkpointing"),
                setting_input(NoiseConfig, "sigma_distribution"),
                setting_input(NoiseConfig, "logit_mean"),
                setting_input(NoiseConfig, "logit_std"),
                setting_input(NoiseConfig, "flow_schedule_shift"),
                setting_input(NoiseConfig, "flow_schedule_auto_shift"),
                setting_input(CheckpointConfig, "checkpoint_step_interval"),
                setting_input(CheckpointConfig, "checkpoints_total_limit"),
                setting_input(BatchingConfig, "caption_dropout_probability", optional=True),
                setting_input(NoiseConfig, "edit_weight", optional=True),
                setting_input(NoiseConfig, "mode_scale", optional=True),
                setting_input(NoiseConfig, "stratified_sigmas", optional=True),
                setting_input(NoiseConfig, "loss_type", optional=True),
                setting_input(NoiseConfig, "huber_c", optional=True, round=0.001),
                setting_input(NoiseConfig, "huber_schedule", optional=True),
            ],
            outputs=[new_output(sockets.TrainingSettings, "training_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def execute(cls, gradient_checkpointing: bool = True, **widgets: Any) -> io.NodeOutput:  # noqa: FBT002
        """Outputs LoopSettings."""
        return io.NodeOutput(
            sockets.LoopSettings(
                noise=NoiseConfig(**fields_of(NoiseConfig, widgets)),
                batching=BatchingConfig(**fields_of(BatchingConfig, widgets)),
                checkpoints=CheckpointConfig(**fields_of(CheckpointConfig, widgets)),
                gradient_checkpointing=gradient_checkpointing,
            )
        )


class RolloutSettings(io.ComfyNode):
    """Choose settings of scheduled sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def widget(name: str) -> io.Input:
            return setting_input(RolloutConfig, f"scheduled_sampling_{name}")

        return node_schema(
            "RolloutSettings",
            "Qwen Edit Rollout Settings",
            description="Scheduled sampling: also trains on the model's own samples, so that it learns to correct its "
            "own errors. Needs extra forward passes. Without this node: off.",
            search_aliases=["scheduled sampling", "rollout", "reflexflow", "exposure bias"],
            inputs=[
                widget("max_step_offset"),
                widget("probability"),
                widget("strategy"),
                widget("start_step"),
                widget("ramp_steps"),
                widget("ramp_shape"),
                widget("prob_start"),
                widget("prob_end"),
                widget("sampler"),
                widget("order"),
                widget("reflexflow"),
                widget("reflexflow_alpha"),
                widget("reflexflow_beta1"),
                widget("reflexflow_beta2"),
            ],
            outputs=[new_output(sockets.RolloutSettings, "rollout_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a RolloutConfig."""
        return io.NodeOutput(RolloutConfig(**widgets))


class ValidationSettings(io.ComfyNode):
    """Choose when and how sample pictures are made during training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "ValidationSettings",
            "Qwen Edit Validation Settings",
            description="When and how held-out pairs are sampled during training. Without this node: every 250 steps "
            "and at the end.",
            search_aliases=["samples", "validation images"],
            inputs=[
                setting_input(ValidationConfig, "validation_step_interval"),
                setting_input(ValidationConfig, "validation_num_inference_steps"),
                setting_input(ValidationConfig, "validation_guidance"),
                setting_input(ValidationConfig, "validation_seed", control_after_generate=False),
                setting_input(ValidationConfig, "num_validation_images"),
                setting_input(
                    ValidationConfig, "validation_resolution", optional=True, placeholder="1024x1024, 768x768"
                ),
            ],
            outputs=[new_output(sockets.ValidationSettings, "validation_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a ValidationConfig."""
        return io.NodeOutput(ValidationConfig(**widgets))


class MemorySettings(io.ComfyNode):
    """Choose what stays on the device during training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "MemorySettings",
            "Qwen Edit Memory Settings",
            description="What stays on the device, what is recomputed and what is moved to host memory. Does not "
            "change the training result. Without this node, all blocks are recomputed and nothing is moved.",
            search_aliases=["block swap", "offload", "low vram", "gradient checkpointing"],
            inputs=[
                setting_input(MemoryConfig, "memory"),
                setting_input(MemoryConfig, "gradient_checkpointing_blocks"),
                setting_input(MemoryConfig, "activation_offload"),
                setting_input(MemoryConfig, "blocks_to_stream"),
                setting_input(MemoryConfig, "stream_buffers"),
                setting_input(MemoryConfig, "compile_blocks"),
                setting_input(MemoryConfig, "vram_gib"),
            ],
            outputs=[new_output(sockets.MemorySettings, "memory_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a MemoryConfig."""
        return io.NodeOutput(MemoryConfig(**widgets))


class EmaSettings(io.ComfyNode):
    """Choose settings of the EMA weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "EmaSettings",
            "Qwen Edit EMA Settings",
            description="An exponential moving average (EMA) of the adapter's weights, exported as a second LoRA and "
            "validated next to the first. Without this node: none.",
            search_aliases=["exponential moving average", "weight averaging"],
            inputs=[
                setting_input(EmaConfig, "use_ema", default=True),
                setting_input(EmaConfig, "ema_device"),
                setting_input(EmaConfig, "ema_decay", round=1e-5),
                setting_input(EmaConfig, "ema_update_interval"),
                setting_input(EmaConfig, "ema_validation"),
            ],
            outputs=[new_output(sockets.EmaSettings, "ema_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an EmaConfig."""
        return io.NodeOutput(EmaConfig(**widgets))
