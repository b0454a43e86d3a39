"""Several encoded datasets in one training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from . import host_folders, sockets
from .cache_watch import CACHE_WATCH
from .schema import new_input, new_output, node_schema

if TYPE_CHECKING:
    from ..trainer_core.conditioning.mix import MixPart

MOST_PARTS = 4


class MixPairs(io.ComfyNode):
    """One dataset of several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        return node_schema(
            "MixPairs",
            "Mix Encoded Pairs",
            description="Makes one dataset of up to four encoded ones, or of the same pairs encoded at several "
            "resolutions. Says how often each is seen.",
            search_aliases=["multi dataset", "repeats", "probability", "multi resolution"],
            inputs=[each for number in range(1, MOST_PARTS + 1) for each in _part_inputs(number)],
            outputs=[
                new_output(sockets.Encoded, "encoded", "All pairs, for Train Qwen Edit LoRA or another mix."),
                new_output(io.String, "report", "Numbers of pairs and their sizes, and the length of an epoch."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_widgets: Any) -> str:
        """Changes when the mix's own file has vanished, too."""
        return CACHE_WATCH.losses()

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """An EncodedDataset."""
        from ..trainer_core.conditioning.mix import mix_encoded
        from ..trainer_core.conditioning.report import encoding_report

        encoded = mix_encoded(_parts(widgets), host_folders.cache_dir())
        return io.NodeOutput(CACHE_WATCH.watch(encoded), encoding_report(encoded))


def _part_inputs(number: int) -> list[io.Input]:
    optional = number > 1
    return [
        new_input(
            sockets.Encoded,
            f"encoded_{number}",
            optional=optional,
            tooltip="Encoded pairs, from Encode Edit Pairs or another mix.",
        ),
        new_input(
            io.Int,
            f"repeats_{number}",
            optional=optional,
            default=0,
            min=0,
            max=10_000,
            tooltip="Extra turns of each of these pairs in an epoch; 0 is one turn, 2 are three.",
        ),
        new_input(
            io.Float,
            f"probability_{number}",
            optional=optional,
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of these pairs that an epoch draws, anew each time. 1 for all, 0 for none.",
        ),
    ]


def _parts(widgets: dict[str, Any]) -> list[MixPart]:
    from ..trainer_core.conditioning.mix import MixPart

    return [
        MixPart(
            encoded=encoded,
            repeats=widgets.get(f"repeats_{number}", 0),
            probability=widgets.get(f"probability_{number}", 1.0),
        )
        for number in range(1, MOST_PARTS + 1)
        if (encoded := widgets.get(f"encoded_{number}")) is not None
    ]
