"""Nodes that pair pictures from folders, set up captions and preview pairs."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..trainer_core.config import CaptionConfig, DatasetConfig
from ..trainer_core.config.dataset import CAPTION_TABLES
from . import host_call, host_folders, sockets
from .refused import with_other_problems
from .schema import Node, lines, new_input, new_output, node_schema, setting_input, setting_inputs
from .untrusted import file_below, folders_below

if TYPE_CHECKING:
    from ..trainer_core.data.pairing import EditDataset
    from ..trainer_core.events import Observer

_BELOW = "A path below ComfyUI's input or output folder, such as my_edit/{}, or below another folder the server allows."


def folder_inputs() -> list[io.Input]:
    """The folders of the targets and of the first references."""
    return [
        new_input(
            io.String,
            "target_folder",
            default="my_edit/target",
            tooltip=f"Folder of the pictures that the model should produce. {_BELOW.format('target')}",
        ),
        new_input(
            io.String,
            "reference_folder_1",
            default="my_edit/reference",
            tooltip=f"Folder of the pictures to edit, named like the targets. {_BELOW.format('reference')} "
            "Empty: the targets are trained as text-to-image.",
        ),
    ]


def more_references(number: int, ordinal: str) -> io.Input:
    """The folder of further references."""
    return new_input(
        io.String,
        f"reference_folder_{number}",
        optional=True,
        default="",
        tooltip=f"Folder of the {ordinal} reference of each pair, for 2509 (edit-v2) and 2511 (edit-v3). "
        "Empty for none.",
    )


class PairFolders(Node):
    """Pair the pictures of a target folder and one to three reference folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PairFolders",
            "Pair Edit Folders",
            description="Pairs the pictures of a target and one to three reference folders by name without extension.",
            search_aliases=["dataset", "training pairs", "before after"],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            inputs=[
                *folder_inputs(),
                setting_input(DatasetConfig, "caption_strategy"),
                setting_input(DatasetConfig, "instance_prompt", multiline=True),
                more_references(2, "second"),
                more_references(3, "third"),
                new_input(
                    sockets.CaptionSettings,
                    "caption_settings",
                    optional=True,
                    tooltip="Caption tables, prefix and suffix. Default: captions are used as written.",
                ),
                new_input(
                    io.String,
                    "mask_folder",
                    optional=True,
                    advanced=True,
                    default="",
                    tooltip="Folder of masks with the same file names as their targets; extensions may differ. White "
                    "counts in the loss, black does not. Empty for none.",
                ),
                setting_input(DatasetConfig, "references_optional", optional=True, advanced=True),
                new_input(
                    sockets.ReferenceSettings,
                    "reference_settings",
                    optional=True,
                    tooltip="How references are cropped. Default: like their targets if the aspect ratio is the same.",
                ),
                setting_input(DatasetConfig, "color_profiles", optional=True, advanced=True),
            ],
            outputs=[new_output(sockets.Dataset, "dataset", "The pairs, for the check, preview and encode nodes.")],
        )

    @classmethod
    def validate_inputs(cls, target_folder: str | None = None, reference_folder_1: str | None = None) -> bool | str:
        """Check that the two required folders are allowed and exist. Linked inputs arrive as None.

        ComfyUI shows the message once for each argument of this method, so `execute` checks the other inputs.
        """
        return check_folders(target_folder, reference_folder_1)

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> str | float:
        """A value that changes when a file in one of the folders changes."""
        return state_of_folders(**widgets)

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an EditDataset."""
        with host_call.short_call() as observer, with_other_problems(cls.hidden, observer):
            return io.NodeOutput(*cls.foresee(observer, **widgets))

    @classmethod
    def foresee(cls, observer: Observer, **widgets: Any) -> tuple[EditDataset]:
        """The outputs, without a running graph."""
        from ..trainer_core.data.pairing import pair_folders

        return (pair_folders(dataset_config(**widgets), observer, checked_dir=host_folders.checked_dir()),)


def check_folders(target_folder: str | None, reference_folder_1: str | None) -> bool:
    """Check that these folders are allowed and exist. None, and no references, are not checked.

    Raises:
        ConfigError: they don't; names both.
    """
    named = {"target_folder": target_folder, "reference_folder_1": reference_folder_1 or None}
    folders_below({label: name for label, name in named.items() if name is not None}, host_folders.dataset_roots())
    return True


def state_of_folders(**widgets: Any) -> str | float:
    """A value that changes when a file in one of the folders of `dataset_config` changes."""
    from ..trainer_core.data.pairing import folder_state

    if any("folder" in name and value is None for name, value in widgets.items()):
        return math.nan  # equals nothing: a linked folder is not known yet
    return folder_state(dataset_config(**widgets))


def dataset_config(
    target_folder: str = "",
    caption_strategy: str = "textfile",
    instance_prompt: str = "",
    caption_settings: CaptionConfig | None = None,
    mask_folder: str = "",
    references_optional: bool = False,  # noqa: FBT002 - a widget
    reference_settings: sockets.ReferencesSeen | None = None,
    color_profiles: str = "convert",
    **references: str,
) -> DatasetConfig:
    """The dataset for the widgets of **Pair Edit Folders**.

    Raises:
        ConfigError: a folder is not allowed or does not exist, or settings don't work together.
    """
    roots = host_folders.dataset_roots()
    given = {label: name for label, name in sorted(references.items()) if name}
    if given:  # a further folder without the first is a mistake, which the error says
        given = {"reference_folder_1": references["reference_folder_1"], **given}
    types = (reference_settings or sockets.ReferencesSeen()).conditioning_types
    masks = {"mask_folder": mask_folder} if mask_folder else {}
    folders = folders_below({"target_folder": target_folder, **given, **masks}, roots)
    captions = caption_settings or CaptionConfig()
    if caption_strategy in CAPTION_TABLES and captions.caption_file:
        table = file_below(captions.caption_file, folders["target_folder"], roots, "caption_file")
        captions = dataclasses.replace(captions, caption_file=str(table))
    return DatasetConfig(
        target_dir=str(folders["target_folder"]),
        reference_dirs=tuple(str(folders[label]) for label in given),
        caption_strategy=caption_strategy,  # type: ignore[arg-type] - DatasetConfig checks it
        instance_prompt=instance_prompt,
        captions=captions,
        mask_dir=str(folders["mask_folder"]) if masks else "",
        references_optional=references_optional,
        conditioning_type=tuple(types[int(label[-1]) - 1] for label in given),
        color_profiles=color_profiles,  # type: ignore[arg-type] - DatasetConfig checks it
    )


class CaptionSettings(Node):
    """Choose where captions come from and what is added to them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "CaptionSettings",
            "Qwen Edit Caption Settings",
            description="Reads captions from a table, makes variants, and adds a prefix and suffix. Without this node, "
            "each line of a .txt file is one caption, used as written.",
            search_aliases=["trigger word", "csv captions", "parquet", "jsonl"],
            inputs=[
                *setting_inputs(
                    CaptionConfig,
                    "disable_multiline_split prepend_instance_prompt caption_prefix caption_suffix caption_file "
                    "caption_column filename_column",
                ),
                *setting_inputs(
                    CaptionConfig,
                    "caption_shuffle_count caption_shuffle_seed caption_shuffle_split_on "
                    "caption_shuffle_position_start caption_shuffle_include_original more_instance_prompts "
                    "fallback_caption_column caption_filter_list",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[new_output(sockets.CaptionSettings, "caption_settings", "For Pair Edit Folders.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a CaptionConfig."""
        lists: dict[str, Any] = {
            name: lines(widgets.get(name, "")) for name in ("more_instance_prompts", "caption_filter_list")
        }
        return io.NodeOutput(CaptionConfig(**{**widgets, **lists}))


class PreviewPairs(Node):
    """Show the pairs and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PreviewPairs",
            "Preview Edit Pairs",
            description="Shows pairs side by side with their captions, and a report on the whole dataset.",
            search_aliases=["contact sheet", "dataset preview"],
            is_output_node=True,
            inputs=[
                new_input(sockets.Dataset, "dataset", tooltip="Pairs from Pair Edit Folders."),
                new_input(
                    io.Int,
                    "max_pairs",
                    default=12,
                    min=1,
                    max=100,
                    tooltip="Number of pairs on the contact sheet, spread over the dataset. 12 fit on a screen.",
                ),
            ],
            outputs=[
                new_output(io.Image, "contact_sheet", "One row per pair: references, target, mask and caption."),
                new_output(io.String, "report", "Number of pairs, sizes, captions and anything unusual."),
            ],
        )

    @classmethod
    def execute(cls, dataset: EditDataset, max_pairs: int = 12) -> io.NodeOutput:
        """Outputs the contact sheet and the report."""
        from ..trainer_core.pictures.contact_sheet import contact_sheet, report
        from .pictures import picture_to_image

        with host_call.interruptible() as observer:
            sheet = picture_to_image(contact_sheet(dataset, max_pairs=max_pairs, observer=observer))
        text = report(dataset)
        return io.NodeOutput(sheet, text, ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": [text]})
