"""What a training would need, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import LoraConfig, MemoryConfig, ModelConfig, OptimizerConfig, TrainConfig, ValidationConfig
from . import sockets
from .schema import new_input, new_output, node_schema

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset


class PlanMemory(io.ComfyNode):
    """A plan as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        return node_schema(
            "PlanMemory",
            "Plan Qwen Edit Memory",
            description="Says what a training with these settings would need in device and host memory, part by part, "
            "and whether it fits. Loads nothing and changes nothing.",
            search_aliases=["vram", "out of memory", "memory estimate"],
            is_output_node=True,
            inputs=[
                new_input(sockets.Model, "model", tooltip="The base model, from Load Qwen Edit Model."),
                new_input(sockets.Encoded, "encoded", tooltip="The pairs to learn, from Encode Edit Pairs."),
                new_input(
                    io.Float,
                    "card_gib",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Plan for a card with so much memory in GiB, also one that is not here. 0 for this one.",
                ),
                *(new_input(socket, name, optional=True, tooltip=text) for socket, name, text in _SETTINGS),
            ],
            outputs=[
                new_output(io.String, "plan", "The plan as text: phases side by side, settings, and the verdict.")
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelConfig, encoded: EncodedDataset, card_gib: float = 0.0, **settings: Any
    ) -> io.NodeOutput:
        """A text."""
        from ..trainer_core.device import pick_device
        from ..trainer_core.training.planning.choose import budget_of
        from ..trainer_core.training.planning.network import network_size
        from ..trainer_core.training.planning.report import planned_in_words
        from ..trainer_core.training.planning.workload import workload_of_encoded

        config = _train_config(model, encoded, **settings)
        network = network_size(config.model, config.lora)
        work = workload_of_encoded(encoded, config.batching, config.validation, encoded)
        budget = budget_of(pick_device(model.device), card_gib or config.memory.vram_gib, held_leaves=True)
        text, _ = planned_in_words(config, network, work, budget)
        return io.NodeOutput(text, ui={"text": [text]})


_SETTINGS = (
    (sockets.LoraSettings, "lora_settings", "Adapter. Default: rank 16."),
    (sockets.OptimizerSettings, "optimizer_settings", "Optimizer. Default: AdamW."),
    (sockets.TrainingSettings, "training_settings", "Batches and gradient checkpointing. Default: one pair at a time."),
    (sockets.ValidationSettings, "validation_settings", "Pictures on the way. Default: some are drawn."),
    (sockets.MemorySettings, "memory_settings", "What stays on the device. With memory auto the settings are chosen."),
)


def _train_config(
    model: ModelConfig,
    encoded: EncodedDataset,
    *,
    lora_settings: LoraConfig | None = None,
    optimizer_settings: OptimizerConfig | None = None,
    training_settings: sockets.LoopSettings | None = None,
    validation_settings: ValidationConfig | None = None,
    memory_settings: MemoryConfig | None = None,
) -> TrainConfig:
    loop = training_settings or sockets.LoopSettings()
    return TrainConfig(
        run_dir="plan",
        encoded=str(encoded.manifest),
        model=model,
        gradient_checkpointing=loop.gradient_checkpointing,
        batching=loop.batching,
        lora=lora_settings or LoraConfig(),
        optimizer=optimizer_settings or OptimizerConfig(),
        validation=validation_settings or ValidationConfig(),
        memory=memory_settings or MemoryConfig(),
    )
