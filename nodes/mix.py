"""The node that mixes encoded datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import DatasetPartConfig
from . import host_folders, sockets
from .cache_watch import CACHE_WATCH
from .graph_values import ForeseenPairs
from .schema import Node, new_input, new_output, node_schema, setting_input

if TYPE_CHECKING:
    from ..trainer_core.conditioning.mix import MixPart
    from ..trainer_core.events import Observer

MOST_PARTS = 4
_HELP = {
    "is_regularisation_data": {
        "tooltip": "Train the pairs towards the base model's own prediction, not towards their targets, so that it "
        "keeps its abilities. Their held-out pairs are not validated: encode them with num_eval_images 0."
    }
}


class MixPairs(Node):
    """Combine several encoded datasets into one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "MixPairs",
            "Mix Encoded Pairs",
            description="Combines up to four encoded datasets, or the same pairs encoded at several resolutions, into "
            "one. Reports how often each is used.",
            search_aliases=["multi dataset", "repeats", "probability", "multi resolution", "regularization"],
            inputs=[
                *(each for number in range(1, MOST_PARTS + 1) for each in _part_inputs(number)),
                *(each for number in range(1, MOST_PARTS + 1) for each in _training_inputs(number)),
            ],
            outputs=[
                new_output(
                    sockets.Encoded, "encoded", "All pairs, for Train Qwen Edit LoRA (advanced) or another mix."
                ),
                new_output(io.String, "report", "Numbers and sizes of the pairs, and the length of an epoch."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_widgets: Any) -> str:
        """A value that changes when encoded files or the manifest of the mix are missing."""
        return CACHE_WATCH.losses()

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an EncodedDataset and the report."""
        from ..trainer_core.conditioning.mix import mix_encoded
        from ..trainer_core.conditioning.report import encoding_report

        encoded = mix_encoded(_parts(widgets), host_folders.cache_dir())
        return io.NodeOutput(CACHE_WATCH.watch(encoded), encoding_report(encoded))

    @classmethod
    def foresee(cls, _observer: Observer, **widgets: Any) -> tuple[ForeseenPairs]:
        """The first output, without a running graph."""
        from ..trainer_core.conditioning.mix import plan_mix

        parts = {name: value for name, value in widgets.items() if isinstance(value, ForeseenPairs)}
        encoded = {name: part.encoded for name, part in parts.items()}
        mixed = plan_mix(_parts(widgets | encoded), host_folders.cache_dir())
        trained = [
            dataset
            for name, part in parts.items()
            if widgets.get(name.replace("encoded", "probability"), 1) > 0
            for dataset in part.trained
        ]
        every = [dataset for part in parts.values() for dataset in part.every]
        is_known = all(part.is_cache_known for part in parts.values())
        return (ForeseenPairs(trained=trained, every=every, encoded=mixed, is_cache_known=is_known),)


def _part_inputs(number: int) -> list[io.Input]:
    optional = number > 1
    return [
        new_input(
            sockets.Encoded,
            f"encoded_{number}",
            optional=optional,
            tooltip="Encoded pairs, from Encode Edit Pairs or another mix.",
        ),
        setting_input(DatasetPartConfig, "repeats", f"repeats_{number}", optional=optional),
        setting_input(DatasetPartConfig, "probability", f"probability_{number}", optional=optional),
    ]


def _training_inputs(number: int) -> list[io.Input]:
    """How the pairs of a part are trained."""
    names = ("timestep_sampling_offset", "is_regularisation_data")
    return [
        setting_input(DatasetPartConfig, name, f"{name}_{number}", optional=True, advanced=True, **_HELP.get(name, {}))
        for name in names
    ]


def _parts(widgets: dict[str, Any]) -> list[MixPart]:
    from ..trainer_core.conditioning.mix import MixPart

    return [
        MixPart(
            encoded=encoded,
            repeats=widgets.get(f"repeats_{number}", 0),
            probability=widgets.get(f"probability_{number}", 1.0),
            is_regularisation=widgets.get(f"is_regularisation_data_{number}", False),
            timestep_sampling_offset=widgets.get(f"timestep_sampling_offset_{number}", 0.0),
        )
        for number in range(1, MOST_PARTS + 1)
        if (encoded := widgets.get(f"encoded_{number}")) is not None
    ]
