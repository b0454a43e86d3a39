"""Pictures of the graph as pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import host_call, host_folders, sockets
from .schema import new_input, new_output, node_schema

if TYPE_CHECKING:
    import torch
    from PIL import Image


class PairImages(io.ComfyNode):
    """IMAGE batches or lists to a dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        more = "of models that take several (edit-v2, edit-v3), one for each target."
        return node_schema(
            "PairImages",
            "Pair Edit Images",
            description="Makes a dataset of pictures that other nodes loaded, made or augmented. They are kept as PNG "
            "files in ComfyUI's output folder.",
            search_aliases=["image text dataset", "pairs from images"],
            is_input_list=True,
            inputs=[
                new_input(io.Image, "target", tooltip="What the model should produce: a batch, or a list of pictures."),
                new_input(io.Image, "reference_1", tooltip="What it starts from, one for each target, in order."),
                new_input(
                    io.String,
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="The edit instruction: one for all pairs, or a list with one for each.",
                ),
                new_input(io.Image, "reference_2", optional=True, tooltip=f"Second reference {more}"),
                new_input(io.Image, "reference_3", optional=True, tooltip=f"Third reference {more}"),
            ],
            outputs=[new_output(sockets.Dataset, "dataset", "The pairs, for the check, preview and encode nodes.")],
        )

    @classmethod
    def execute(
        cls,
        target: list[torch.Tensor],
        reference_1: list[torch.Tensor],
        captions: list[str],
        reference_2: list[torch.Tensor] | None = None,
        reference_3: list[torch.Tensor] | None = None,
    ) -> io.NodeOutput:
        """An EditDataset."""
        from ..trainer_core.data.graph_pairs import pair_pictures

        references = [_pictures(images) for images in (reference_1, reference_2, reference_3) if images]
        with host_call.interruptible() as observer:
            root = host_folders.cache_dir().parent / "graph_pairs"
            return io.NodeOutput(pair_pictures(_pictures(target), references, captions, root, observer=observer))


def _pictures(images: list[torch.Tensor]) -> list[Image.Image]:
    """Every picture of every batch."""
    from .pictures import image_to_picture

    return [image_to_picture(batch[number : number + 1]) for batch in images for number in range(len(batch))]
