"""The node that takes a data set of the input folder by its name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..trainer_core.data_sets.folders import DataSet, find_data_sets, open_data_set
from ..trainer_core.errors import ConfigError
from ..trainer_core.text import brief, some_of, text_problem
from . import host_call, host_folders, sockets
from .refused import with_other_problems
from .schema import CATEGORY, Node, new_input, new_output, node_schema

if TYPE_CHECKING:
    from ..trainer_core.data.pairing import EditDataset
    from ..trainer_core.events import Observer


class EditPairs(Node):
    """Choose a data set: pairs of pictures before and after the edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "EditPairs",
            "Edit Pairs",
            category=CATEGORY,
            description="Pairs of pictures before and after the edit, from a folder in ComfyUI's input folder. Make "
            "one in the side panel Edit pairs.",
            search_aliases=["dataset", "training pairs", "before after", "training pictures"],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            inputs=[
                new_input(
                    io.Combo,
                    "data_set",
                    options=choices(),
                    tooltip="A folder in ComfyUI's input folder with the folders reference (before the edit) and "
                    "target (after it). demo (embedded): pairs that ship with this extension, for the demo model.",
                ),
                new_input(
                    io.String,
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="What the edit does, as you will write it when you use the LoRA, for all pairs. Empty: "
                    "each pair's own caption, a .txt beside its target.",
                ),
            ],
            outputs=[new_output(sockets.Dataset, "dataset", "The pairs, for Train Qwen Edit LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, data_set: str | None = None) -> bool | str:
        """Check that the data set is there. A linked name arrives as None."""
        return data_set is None or bool(chosen(data_set))

    @classmethod
    def fingerprint_inputs(cls, data_set: str | None = None, instruction: str | None = None) -> str | float:
        """A value that changes when a picture, a caption or a mark of the data set does."""
        from ..trainer_core.data_sets.use import state_of

        if data_set is None or instruction is None:
            return math.nan  # equals nothing: a linked value is not known yet
        return state_of(chosen(data_set), instruction)

    @classmethod
    def execute(cls, data_set: str, instruction: str = "") -> io.NodeOutput:
        """Outputs an EditDataset."""
        with host_call.short_call() as observer, with_other_problems(cls.hidden, observer):
            return io.NodeOutput(*cls.foresee(observer, data_set, instruction))

    @classmethod
    def foresee(cls, observer: Observer, data_set: str, instruction: str = "") -> tuple[EditDataset]:
        """The output for these widgets, without running the graph."""
        from ..trainer_core.data_sets.use import pairs_of

        if problem := text_problem(instruction):
            raise ConfigError(f"The instruction {problem}. Shorten or correct it.")
        pairs = pairs_of(chosen(data_set), instruction.strip(), observer, checked_dir=host_folders.checked_dir())
        return (pairs,)


def choices() -> list[str]:
    """The data sets of the input folder, and the demo's pairs."""
    return [*find_data_sets(host_folders.input_dir()), host_folders.DEMO_CHOICE]


def chosen(name: str) -> DataSet:
    """The data set of this name.

    Raises:
        ConfigError: there is none. Says which there are.
        NotFoundError: it can't be used.
    """
    from ..trainer_core.data_sets.use import demo_data_set

    if name == host_folders.DEMO_CHOICE:
        return demo_data_set()
    there = find_data_sets(host_folders.input_dir())
    if name not in there:
        named = some_of([brief(each) for each in there])
        choose = f"On the node Edit Pairs, choose {named}, or press" if there else "On the node Edit Pairs, press"
        raise ConfigError(
            f"There is no data set {brief(name)} in ComfyUI's input folder. {choose} Edit pairs… and drop your "
            "pictures. To use a folder of your own, put the pictures before the edit into its subfolder reference, "
            "those after it into target, and press R."
        )
    return open_data_set(host_folders.input_dir(), name)
