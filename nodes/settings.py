"""Nodes for the optional settings of a training run: adapter, optimizer, loop, validation, memory and EMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..trainer_core.config import (
    USUAL_PROMPTS,
    BatchingConfig,
    CheckpointConfig,
    EmaConfig,
    LoraConfig,
    MemoryConfig,
    NoiseConfig,
    OptimizerConfig,
    PreservationConfig,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from . import host_folders, sockets
from .schema import Node, fields_of, help_of, lines, new_input, new_output, node_schema, setting_input, setting_inputs

_FOR = "For Qwen Edit More Settings and Train Qwen Edit LoRA (advanced)."


class LoraSettings(Node):
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
                *setting_inputs(LoraConfig, "lora_rank lora_alpha lora_targets"),
                setting_input(LoraConfig, "lora_target_pattern", placeholder=r".*\.attn\.to_[qkv]"),
                setting_input(LoraConfig, "lora_dropout"),
                *setting_inputs(LoraConfig, "lora_type use_rslora lokr_factor", optional=True),
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
            outputs=[new_output(sockets.LoraSettings, "lora_settings", _FOR)],
        )

    @classmethod
    def validate_inputs(cls, init_lora: str | None = None) -> bool | str:
        """Check that the LoRA is listed."""
        return init_lora in (None, host_folders.NO_LORA) or bool(host_folders.lora_path(init_lora))

    @classmethod
    def execute(
        cls, *, init_lora: str = host_folders.NO_LORA, rank_pattern: str = "", alpha_pattern: str = "", **widgets: Any
    ) -> io.NodeOutput:
        """Outputs a LoraConfig."""
        start = "" if init_lora == host_folders.NO_LORA else str(host_folders.lora_path(init_lora))
        ranks, alphas = lines(rank_pattern), lines(alpha_pattern)
        return io.NodeOutput(LoraConfig(**widgets, rank_pattern=ranks, alpha_pattern=alphas, init_lora=start))


class OptimizerSettings(Node):
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
                *setting_inputs(
                    OptimizerConfig,
                    "optimizer learning_rate lr_scheduler lr_warmup_steps weight_decay adam_beta1 adam_beta2 "
                    "adam_epsilon max_grad_norm",
                ),
                *setting_inputs(
                    OptimizerConfig,
                    "lr_num_cycles lr_power lr_end lion_beta2 prodigy_d_coef lr_wave_steps",
                    optional=True,
                ),
            ],
            outputs=[new_output(sockets.OptimizerSettings, "optimizer_settings", _FOR)],
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
        OptimizerConfig(**values, lr_end=0.0)
        return True

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an OptimizerConfig."""
        return io.NodeOutput(OptimizerConfig(**widgets))


class TrainingSettings(Node):
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
                *setting_inputs(BatchingConfig, "train_batch_size gradient_accumulation_steps"),
                setting_input(TrainConfig, "gradient_checkpointing"),
                *setting_inputs(
                    NoiseConfig, "sigma_distribution logit_mean logit_std flow_schedule_shift flow_schedule_auto_shift"
                ),
                *setting_inputs(CheckpointConfig, "checkpoint_step_interval checkpoints_total_limit"),
                setting_input(BatchingConfig, "caption_dropout_probability", optional=True),
                *setting_inputs(
                    NoiseConfig,
                    "edit_weight mode_scale stratified_sigmas loss_type huber_c huber_schedule edit_weight_kind "
                    "edit_weight_from",
                    optional=True,
                ),
            ],
            outputs=[new_output(sockets.TrainingSettings, "training_settings", _FOR)],
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


class RolloutSettings(Node):
    """Choose settings of scheduled sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = (
            "max_step_offset probability strategy start_step ramp_steps ramp_shape prob_start prob_end sampler order "
            "reflexflow reflexflow_alpha reflexflow_beta1 reflexflow_beta2"
        )
        return node_schema(
            "RolloutSettings",
            "Qwen Edit Rollout Settings",
            description="Scheduled sampling: also trains on the model's own samples, so that it learns to correct its "
            "own errors. Needs extra forward passes. Without this node: off.",
            search_aliases=["scheduled sampling", "rollout", "reflexflow", "exposure bias"],
            inputs=[setting_input(RolloutConfig, f"scheduled_sampling_{name}") for name in names.split()],
            outputs=[new_output(sockets.RolloutSettings, "rollout_settings", _FOR)],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a RolloutConfig."""
        return io.NodeOutput(RolloutConfig(**widgets))


class ValidationSettings(Node):
    """Choose when and how sample pictures are made during training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "ValidationSettings",
            "Qwen Edit Validation Settings",
            description="When and how validation pairs are sampled during training. Without this node: every 250 steps "
            "and at the end.",
            search_aliases=["samples", "validation images"],
            inputs=[
                setting_input(ValidationConfig, "validation_step_interval"),
                _used_without("validation_lora", setting_input(ValidationConfig, "validation_num_inference_steps")),
                _used_without("validation_lora", setting_input(ValidationConfig, "validation_guidance")),
                setting_input(ValidationConfig, "validation_seed", control_after_generate=False),
                setting_input(ValidationConfig, "num_validation_images"),
                setting_input(
                    ValidationConfig, "validation_resolution", optional=True, placeholder="1024x1024, 768x768"
                ),
                setting_input(ValidationConfig, "validation_loras_total_limit", optional=True),
                *few_step_inputs(),
                *setting_inputs(ValidationConfig, "keep_best strength_sweep", optional=True),
            ],
            outputs=[new_output(sockets.ValidationSettings, "validation_settings", _FOR)],
        )

    @classmethod
    def validate_inputs(cls, validation_lora: str | None = None) -> bool | str:
        """Check that the LoRA is listed."""
        few_step_file(validation_lora or host_folders.NO_LORA)  # raises
        return True

    @classmethod
    def execute(cls, validation_lora: str = host_folders.NO_LORA, **widgets: Any) -> io.NodeOutput:
        """Outputs a ValidationConfig."""
        return io.NodeOutput(ValidationConfig(**widgets, validation_lora=few_step_file(validation_lora)))


def few_step_inputs(named: Mapping[str, str] | None = None) -> list[io.Input]:
    """Optional widgets for the schedule and few-step LoRA of pictures. `named`: their names, if not the settings'."""
    names = named or {}
    schedule, shift, strength, steps = (
        setting_input(ValidationConfig, name, names.get(name, name), optional=True)
        for name in ("validation_schedule", "validation_shift", "validation_lora_strength", "validation_lora_steps")
    )
    menu = new_input(
        io.Combo,
        names.get("validation_lora", "validation_lora"),
        optional=True,
        options=host_folders.lora_names(),
        default=host_folders.NO_LORA,
        tooltip=help_of(ValidationConfig, "validation_lora"),
    )
    few = [_used_without(menu.id, each, is_used=False) for each in (strength, steps)]
    return [_used_without(menu.id, schedule), shift, menu, *few]


def _used_without(menu: str, each: io.Input, *, is_used: bool = True) -> io.Input:
    """The widget, which is used only if no LoRA is chosen in the menu, or with `is_used` off only if one is.

    The setting's own condition says "" for no LoRA, which the menu doesn't have.
    """
    none = [host_folders.NO_LORA]
    condition = {"setting": menu, "equals": none if is_used else [], "differs": [] if is_used else none}
    each.extra_dict = {"qwen_edit_used": {"if": [condition], "unused": None}}
    return each


def few_step_file(name: str) -> str:
    """`validation_lora` for a name in the menu.

    Raises:
        ConfigError: the LoRA is not listed.
    """
    return "" if name == host_folders.NO_LORA else str(host_folders.lora_path(name))


class PreservationSettings(Node):
    """Choose what keeps the base model's other edits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PreservationSettings",
            "Qwen Edit Preservation Settings",
            description="Keeps what the model does with other instructions: some turns train its own answer to one of "
            "these prompts instead of the edit. Without this node: off.",
            search_aliases=["prior preservation", "regularization", "forgetting", "keep abilities"],
            inputs=[
                setting_input(PreservationConfig, "preservation_probability", default=0.5),
                setting_input(PreservationConfig, "preservation_weight"),
                new_input(
                    io.String,
                    "preservation_prompts",
                    multiline=True,
                    default="\n".join(USUAL_PROMPTS),
                    tooltip="Instructions of other edits, one per line. They are encoded together with the references "
                    "of every trained pair.",
                ),
            ],
            outputs=[
                new_output(
                    sockets.PreservationSettings,
                    "preservation_settings",
                    "For Qwen Edit More Settings; or for Encode Edit Pairs and Train Qwen Edit LoRA (advanced), both.",
                )
            ],
        )

    @classmethod
    def execute(cls, preservation_prompts: str, **widgets: Any) -> io.NodeOutput:
        """Outputs a PreservationGiven."""
        prompts = lines(preservation_prompts) or USUAL_PROMPTS
        return io.NodeOutput(sockets.PreservationGiven(config=PreservationConfig(**widgets), prompts=prompts))


class MemorySettings(Node):
    """Choose what stays on the device during training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "MemorySettings",
            "Qwen Edit Memory Settings",
            description="What stays in VRAM, what is recomputed and what is moved to RAM. Does not "
            "change the training result. Without this node, the trainer chooses the fastest settings that fit.",
            search_aliases=["block swap", "offload", "low vram", "gradient checkpointing"],
            inputs=[
                *setting_inputs(
                    MemoryConfig,
                    "memory gradient_checkpointing_blocks activation_offload blocks_to_stream stream_buffers "
                    "compile_blocks vram_gib",
                ),
                setting_input(MemoryConfig, "recompute_attention", optional=True),
            ],
            outputs=[new_output(sockets.MemorySettings, "memory_settings", _FOR)],
        )

    @classmethod
    def validate_inputs(cls, compile_blocks: str | bool | None = None) -> bool | str:
        """Check `compile_blocks`, because ComfyUI would refuse the true or false of older graphs."""
        return compile_blocks is None or bool(MemoryConfig(compile_blocks=compile_blocks))  # type: ignore[arg-type]

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a MemoryConfig."""
        return io.NodeOutput(MemoryConfig(**widgets))


class EmaSettings(Node):
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
                *setting_inputs(EmaConfig, "ema_device ema_decay ema_update_interval ema_validation"),
            ],
            outputs=[new_output(sockets.EmaSettings, "ema_settings", _FOR)],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an EmaConfig."""
        return io.NodeOutput(EmaConfig(**widgets))


NODES: tuple[type[Node], ...] = (
    LoraSettings,
    OptimizerSettings,
    TrainingSettings,
    RolloutSettings,
    ValidationSettings,
    PreservationSettings,
    MemorySettings,
    EmaSettings,
)
