"""Nodes that encode pairs to latents and prompt embeddings on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import EncodingConfig, ModelConfig, SizeConfig
from ..trainer_core.qwen_image.base_model import BaseModel
from . import host_call, host_folders, sockets
from .ahead import check_trainings, known_values
from .cache_watch import CACHE_WATCH
from .graph_values import ForeseenPairs
from .queued_runs import runs_fed_by
from .refused import with_other_problems
from .schema import Node, help_of, lines, new_input, new_output, node_schema, setting_input, setting_inputs
from .train_config import settings_input

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoders import Encoders
    from ..trainer_core.conditioning.encoding_plan import PlannedDataset
    from ..trainer_core.data.pairing import EditDataset
    from ..trainer_core.events import Observer

ENCODERS = ("clip", "vae")
"""Inputs for networks of the graph that encode in place of the base model's."""


class EncodePairs(Node):
    """Encode a dataset once for any number of training runs."""

    FORESEEN_WITHOUT = ENCODERS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "EncodePairs",
            "Encode Edit Pairs",
            description="Encodes pictures and captions once and stores the results on disk, so that training does not "
            "need the text encoder or the VAE in VRAM. Resumes where it was stopped.",
            search_aliases=["cache latents", "text embeddings"],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            inputs=[
                new_input(sockets.Model, "model", tooltip="The base model, from Load Qwen Edit Model."),
                new_input(sockets.Dataset, "dataset", tooltip="Pairs from Pair Edit Folders."),
                *setting_inputs(EncodingConfig, "resolution preprocessing match_target_res num_eval_images"),
                setting_input(EncodingConfig, "validation_negative_prompt", multiline=True),
                setting_input(EncodingConfig, "seed", control_after_generate=False),
                setting_input(EncodingConfig, "encode_empty_caption", optional=True, advanced=True),
                new_input(
                    sockets.SizeSettings,
                    "size_settings",
                    optional=True,
                    tooltip="Sizes and crops. Default: keep the aspect ratio, with an area of resolution squared.",
                ),
                new_input(
                    io.Clip,
                    "clip",
                    optional=True,
                    tooltip="Encode prompts with this text encoder, the one you use for inference, instead of the base "
                    "model's. Requires preprocessing comfyui.",
                ),
                new_input(
                    io.Vae,
                    "vae",
                    optional=True,
                    tooltip="Encode pictures with this VAE instead of the base model's. Requires preprocessing "
                    "comfyui.",
                ),
                new_input(
                    io.String,
                    "validation_prompts",
                    optional=True,
                    multiline=True,
                    default="",
                    tooltip=help_of(EncodingConfig, "validation_prompts") + " One per line.",
                ),
                new_input(
                    sockets.ReferenceSettings,
                    "reference_settings",
                    optional=True,
                    tooltip="How references are presented and cached. Default: all of a pair together, encoded once.",
                ),
                setting_input(EncodingConfig, "train_eval_images", optional=True, advanced=True),
                setting_input(EncodingConfig, "tokenizer_max_length", optional=True, advanced=True),
                setting_input(EncodingConfig, "encode_pixel_difference", optional=True, advanced=True),
                settings_input("preservation_settings"),
            ],
            outputs=[
                new_output(sockets.Encoded, "encoded", "The encoded pairs, for Train Qwen Edit LoRA (advanced)."),
                new_output(io.String, "report", "Numbers and sizes of the pairs, and what was skipped."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_widgets: Any) -> str:
        """A value that changes when encoded files are missing from the cache, so that a queued graph encodes again."""
        return CACHE_WATCH.losses()

    @classmethod
    def execute(cls, model: ModelConfig, dataset: EditDataset, **widgets: Any) -> io.NodeOutput:
        """Outputs an EncodedDataset and the report."""
        from ..trainer_core.conditioning.encode import encode_planned
        from ..trainer_core.conditioning.report import encoding_report
        from ..trainer_core.planning.disk_space import cache_use, check_disk
        from .host_encoders import connected_encoders

        connected = {name: widgets.pop(name) for name in ENCODERS if name in widgets}
        with host_call.long_call(encodes_for=runs_fed_by(cls.hidden.prompt, cls.hidden.unique_id)) as observer:
            with with_other_problems(cls.hidden, observer):
                encoders = connected_encoders(connected, model.flavour)
                planned = _planned(model, dataset, encoders, observer, **widgets)
                check_disk(cache_use([planned]))
                check_trainings(cls.hidden, known_values(cls.hidden, {"model": model}), [planned], [planned.encoded()])
            encoded = encode_planned(planned, observer)
        return io.NodeOutput(CACHE_WATCH.watch(encoded), encoding_report(encoded))

    @classmethod
    def foresee(
        cls, observer: Observer, model: ModelConfig, dataset: EditDataset, **widgets: Any
    ) -> tuple[ForeseenPairs]:
        """The first output, without a running graph."""
        from .host_encoders import foreseen_encoders

        connected = [name for name in ENCODERS if widgets.pop(name, None) is not None]
        planned = _planned(model, dataset, foreseen_encoders(connected), observer, **widgets)
        every, encoded = [planned], planned.encoded()
        return (ForeseenPairs(trained=every, every=every, encoded=encoded, is_cache_known=not connected),)


def _planned(
    model: ModelConfig, dataset: EditDataset, encoders: Encoders, observer: Observer, **widgets: Any
) -> PlannedDataset:
    """The dataset with what the cache lacks."""
    from ..trainer_core.conditioning.encode import plan_dataset

    kept = widgets.pop("preservation_settings", None) or sockets.PreservationGiven()
    prompts = {
        "validation_prompts": lines(widgets.pop("validation_prompts", "")),
        "preservation_prompts": kept.prompts if kept.config.preservation_probability else (),
    }
    sizes = widgets.pop("size_settings", None) or SizeConfig()
    seen = widgets.pop("reference_settings", None) or sockets.ReferencesSeen()
    encoding = EncodingConfig(sizes=sizes, **prompts, **widgets, **seen.encoding)
    return plan_dataset(dataset, BaseModel(model), encoding, host_folders.cache_dir(), encoders, observer=observer)
