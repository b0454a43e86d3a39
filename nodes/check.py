"""The node that checks pairs before encoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..trainer_core.config import PairCheckConfig
from . import host_call, host_folders, sockets
from .schema import Node, new_input, new_output, node_schema, setting_inputs

if TYPE_CHECKING:
    from ..trainer_core.data.pairing import EditDataset
    from ..trainer_core.events import Observer


class CheckPairs(Node):
    """Check shift, scale, colour, duplicates and captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "CheckPairs",
            "Check Edit Pairs",
            description="Measures how well references match their targets outside the edit (shift, scale, colour), and "
            "finds near-duplicates, pairs that hardly differ and uninformative captions. Changes no files.",
            search_aliases=["dataset check", "misaligned pairs", "duplicates"],
            is_output_node=True,
            inputs=[
                new_input(sockets.Dataset, "dataset", tooltip="Pairs from Pair Edit Folders."),
                *setting_inputs(
                    PairCheckConfig,
                    "max_shift max_zoom_percent max_colour_offset min_difference duplicate_bits check_side",
                ),
                new_input(
                    io.Int,
                    "max_pairs",
                    default=12,
                    min=1,
                    max=100,
                    tooltip="Number of pairs on the contact sheet. Pairs with findings come first.",
                ),
            ],
            outputs=[
                new_output(sockets.Dataset, "checked", "The same pairs, for Encode Edit Pairs."),
                new_output(
                    io.String, "report", "All findings, each with a suggested fix, and the notes on the dataset."
                ),
                new_output(
                    io.Image,
                    "contact_sheet",
                    "Reference, target and difference of each pair. Pairs with findings come first.",
                ),
            ],
        )

    @classmethod
    def foresee(cls, _observer: Observer, dataset: EditDataset, **_widgets: Any) -> tuple[EditDataset]:
        """The first output, without a running graph."""
        return (dataset,)

    @classmethod
    def execute(cls, dataset: EditDataset, max_pairs: int = 12, **widgets: Any) -> io.NodeOutput:
        """Outputs the unchanged dataset, the report and the contact sheet."""
        from ..trainer_core.data.pair_check import check_pairs
        from ..trainer_core.pictures.check_report import check_report, check_sheet
        from ..trainer_core.pictures.contact_sheet import note_lines
        from .pictures import picture_to_image

        config = PairCheckConfig(**widgets)
        with host_call.interruptible() as observer:
            check = check_pairs(dataset, config, observer, checked_dir=host_folders.checked_dir())
            sheet = picture_to_image(check_sheet(dataset, check, config, max_pairs=max_pairs, observer=observer))
        text = "\n".join([check_report(dataset, check), *note_lines(dataset)])
        return io.NodeOutput(dataset, text, sheet, ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": [text]})
