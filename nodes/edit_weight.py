"""Where the edit-aware loss looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..trainer_core.config import NoiseConfig
from . import sockets
from .schema import new_input, new_output, node_schema, setting_input

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset


class PreviewEditWeight(io.ComfyNode):
    """Weights of the loss as pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        return node_schema(
            "PreviewEditWeight",
            "Preview Edit Weight",
            description="Shows where the loss would count more under edit_weight, with masks if there are any.",
            search_aliases=["loss mask", "edit aware loss"],
            is_output_node=True,
            inputs=[
                new_input(sockets.Encoded, "encoded", tooltip="The encoded pairs, from Encode Edit Pairs."),
                setting_input(NoiseConfig, "edit_weight", min=0.0, max=1.0, step=0.05, default=0.5),
                new_input(io.Int, "max_pairs", default=12, min=1, max=100, tooltip="Pairs on the picture."),
            ],
            outputs=[new_output(io.Image, "weights", "Grey counts once, white three times or more, black not at all.")],
        )

    @classmethod
    def execute(cls, encoded: EncodedDataset, edit_weight: float = 0.5, max_pairs: int = 12) -> io.NodeOutput:
        """A picture."""
        from ..trainer_core.training.edit_weight import edit_weight_preview
        from .pictures import picture_to_image

        NoiseConfig(edit_weight=edit_weight)
        sheet = picture_to_image(edit_weight_preview(encoded, edit_weight, max_pairs=max_pairs))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))
