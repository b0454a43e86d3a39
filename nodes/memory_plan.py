"""What a training would need, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from . import sockets
from .schema import new_input, new_output, node_schema
from .train_config import imported_input, preset_input, settings_input, train_config, validation_input

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset
    from ..trainer_core.config import ModelConfig

_SETTINGS = ("lora", "optimizer", "training", "validation", "memory")


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
                *(settings_input(f"{name}_settings") for name in _SETTINGS),
                preset_input(),
                imported_input(),
                validation_input(),
                settings_input("ema_settings"),
                settings_input("rollout_settings"),
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
        from ..trainer_core.planning.choose import budget_of
        from ..trainer_core.planning.network import network_size
        from ..trainer_core.planning.report import planned_in_words
        from ..trainer_core.planning.workload import workload_of_encoded

        config = train_config(model, encoded, {"run_dir": "plan"}, lora_name="plan", **settings)
        network = network_size(config.model, config.lora)
        work = workload_of_encoded(
            encoded, config.batching, config.validation, settings.get("validation_encoded") or encoded
        )
        budget = budget_of(pick_device(model.device), card_gib or config.memory.vram_gib, held_leaves=True)
        text, _ = planned_in_words(config, network, work, budget)
        return io.NodeOutput(text, ui={"text": [text]})
