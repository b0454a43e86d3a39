"""The node that makes pairs from images in the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import host_call, host_folders, sockets
from .schema import Node, new_input, new_output, node_schema

if TYPE_CHECKING:
    import torch
    from PIL import Image


class PairImages(Node):
    """Turn IMAGE batches or lists into a dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        more = "reference, for 2509 (edit-v2) and 2511 (edit-v3). One per target, in the same order."
        return node_schema(
            "PairImages",
            "Pair Edit Images",
            description="Makes a dataset from images that other nodes loaded, generated or augmented. Saves them as "
            "PNG files in ComfyUI's output folder.",
            search_aliases=["image text dataset", "pairs from images"],
            is_input_list=True,
            inputs=[
                new_input(io.Image, "target", tooltip="Pictures that the model should produce: a batch or a list."),
                new_input(io.Image, "reference_1", tooltip="Pictures to edit: one per target, in the same order."),
                new_input(
                    io.String,
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="Edit instruction: one for all pairs, or a list with one per pair.",
                ),
                new_input(io.Image, "reference_2", optional=True, tooltip=f"Second {more}"),
                new_input(io.Image, "reference_3", optional=True, tooltip=f"Third {more}"),
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
        """Outputs an EditDataset."""
        from ..trainer_core.data.graph_pairs import pair_pictures

        references = [_pictures(images) for images in (reference_1, reference_2, reference_3) if images]
        with host_call.interruptible() as observer:
            root = host_folders.cache_dir().parent / "graph_pairs"
            return io.NodeOutput(pair_pictures(_pictures(target), references, captions, root, observer=observer))


def _pictures(images: list[torch.Tensor]) -> list[Image.Image]:
    """All pictures of all batches."""
    from .pictures import image_to_picture

    return [image_to_picture(batch[number : number + 1]) for batch in images for number in range(len(batch))]
