"""The node that previews the weights of the edit-aware loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..trainer_core.config import NoiseConfig
from . import host_call, sockets
from .schema import Node, new_input, new_output, node_schema, setting_input, setting_inputs

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset


class PreviewEditWeight(Node):
    """Show the loss weights as pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PreviewEditWeight",
            "Preview Edit Weight",
            description="Shows where edit_weight increases the loss. Includes masks if the dataset has them.",
            search_aliases=["loss mask", "edit aware loss"],
            is_output_node=True,
            inputs=[
                new_input(sockets.Encoded, "encoded", tooltip="The encoded pairs, from Encode Edit Pairs."),
                setting_input(NoiseConfig, "edit_weight", default=0.5),
                new_input(io.Int, "max_pairs", default=12, min=1, max=100, tooltip="Number of pairs in the picture."),
                *setting_inputs(NoiseConfig, "edit_weight_kind edit_weight_from", optional=True),
            ],
            outputs=[new_output(io.Image, "weights", "Loss weights: grey is 1, white is 3 or more, black is 0.")],
        )

    @classmethod
    def execute(
        cls, encoded: EncodedDataset, edit_weight: float = 0.5, max_pairs: int = 12, **widgets: Any
    ) -> io.NodeOutput:
        """Outputs the preview picture."""
        from ..trainer_core.training.edit_weight import edit_weight_preview
        from .pictures import picture_to_image

        with host_call.interruptible() as observer:
            noise = NoiseConfig(edit_weight=edit_weight, **widgets)
            preview = edit_weight_preview(encoded, noise, max_pairs=max_pairs, observer=observer)
        sheet = picture_to_image(preview)
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))
