"""Nodes that use a finished run in the same graph: apply its LoRA, plot its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..trainer_core.errors import ConfigError
from ..trainer_core.settings import check, is_plain
from . import host_lora, sockets
from .schema import Node, new_input, new_output, node_schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class ApplyLora(Node):
    """Apply the LoRA of a run to a ComfyUI model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "ApplyLora",
            "Apply Trained LoRA",
            description="Applies the LoRA of a run to a MODEL in the same graph. Fails if any of its keys do not match "
            "the model.",
            search_aliases=["lora loader", "load trained lora"],
            inputs=[
                new_input(io.Model, "model", tooltip="A Qwen-Image-Edit model, from Load Diffusion Model."),
                new_input(sockets.Run, "run", tooltip="The run, from Train Qwen Edit LoRA."),
                new_input(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the LoRA. 1 is as trained, 0 is off; 0.7 to 1.2 is common.",
                ),
            ],
            outputs=[new_output(io.Model, "patched_model", "The model with the LoRA, for a sampler.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, run: sockets.FinishedRun, strength: float) -> io.NodeOutput:
        """Outputs the patched MODEL."""
        return io.NodeOutput(host_lora.apply_lora(model, run.lora_file, strength))


class PlotLoss(Node):
    """Plot the loss of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PlotLoss",
            "Plot Loss",
            description="Plots the loss of a run by step: raw, smoothed, and of validation pairs.",
            search_aliases=["loss graph", "loss curve", "chart"],
            is_output_node=True,
            inputs=[
                new_input(
                    sockets.Run,
                    "run",
                    optional=True,
                    tooltip="The run, from Train Qwen Edit LoRA. Shows more than loss_map does.",
                ),
                new_input(
                    io.LossMap,
                    "loss_map",
                    optional=True,
                    tooltip="Losses from any training node. Used if no run is connected.",
                ),
            ],
            outputs=[new_output(io.Image, "chart", "Loss by step.")],
        )

    @classmethod
    def execute(cls, run: sockets.FinishedRun | None = None, loss_map: dict[str, Any] | None = None) -> io.NodeOutput:
        """Outputs the chart as IMAGE."""
        from ..trainer_core.pictures.chart import loss_chart
        from ..trainer_core.runs.folder import RunFolder
        from .pictures import picture_to_image

        if run is None and loss_map is None:
            raise ConfigError("Plot Loss has no run and no loss_map. Connect one of them.")
        rows = RunFolder(run.run_dir).metrics() if run else _rows(loss_map or {})
        chart = picture_to_image(loss_chart(rows))
        return io.NodeOutput(chart, ui=ui.PreviewImage(chart, cls=cls))


def _rows(loss_map: dict[str, Any]) -> list[dict[str, Any]]:
    losses: Any = loss_map.get("loss")
    fits = isinstance(losses, list | tuple) and all(is_plain(float, loss) for loss in losses)
    check(fits, "loss_map", loss_map, "{'loss': [numbers]}")
    return [{"step": number + 1, "loss": float(loss)} for number, loss in enumerate(losses)]
