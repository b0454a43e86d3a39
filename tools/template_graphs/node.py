"""What the graphs of the templates are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template as Text
from typing import Any

from trainer_core.qwen_image.recognise import download, template_files

TITLE = "Qwen edit LoRA - "
PREVIEW = "QwenEdit_PreviewPairs"
_NOTES = Path(__file__).parent.parent / "template_notes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node. `values`: widgets that differ from their defaults. `links`: input -> (key of a node, name of its output).

    `size` is in pixels. `room`: the height that its column keeps for it, if pictures, reports or a frontend
    make it taller.
    `models`: the downloads that ComfyUI offers if the file is missing.
    """

    key: str
    kind: str
    size: tuple[int, int] = (340, 200)
    room: int = 0
    title: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    models: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A graph in columns. `name`: the file of its API prompt. `models`: downloads that ComfyUI offers.

    App mode shows the widgets `app_inputs` (key of a node, widget) and the results of the nodes `app_outputs`.
    """

    title: str
    name: str
    columns: Sequence[Sequence[Node]]
    scale: float = 0.7
    models: Sequence[Mapping[str, str]] = ()
    app_inputs: Sequence[tuple[str, str]] = ()
    app_outputs: Sequence[str] = ()

    def nodes(self) -> Iterator[Node]:
        """All nodes, by columns."""
        for column in self.columns:
            yield from column

    def kind_of(self, key: str) -> str:
        """The class of a node."""
        return next(node.kind for node in self.nodes() if node.key == key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint(Template):
    """A graph that becomes one node, which ComfyUI's node library offers. Found by its title and by `words`.

    The node has the widgets `app_inputs`, whose names must differ, and all outputs of the nodes `app_outputs`.
    """

    description: str
    words: Sequence[str] = ()


def note(title: str, file: str, height: int, **values: str) -> Node:
    """A note with the text of a file in tools/template_notes, in which `values` replace their $names."""
    text = Text((_NOTES / f"{file}.md").read_text(encoding="utf-8"))
    filled = text.substitute(values, title=TITLE, to_stop=TO_STOP)
    return Node(key="note", kind="MarkdownNote", title=title, size=(360, height), values={"text": filled})


def model(name: str) -> dict[str, str]:
    """A file of ComfyUI's own templates, as ComfyUI's page offers it for download."""
    file = download(name)
    return {"name": name, "url": file.url, "directory": file.folder}


HUB = "https://huggingface.co"
LIGHTNING = {  # of ComfyUI's template for 2509
    "name": "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    "url": f"{HUB}/lightx2v/Qwen-Image-Lightning/resolve/main/Qwen-Image-Edit-2509/"
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    "directory": "loras",
}
TEXT_ENCODER = model(template_files("text_encoders")[0])
VAE = model(template_files("vae")[0])
TO_STOP = (
    "**To stop**, press ComfyUI's *Cancel current run* button. The work is kept; press Run to continue. To end early "
    "and keep the LoRA, press *Stop and keep* in the side panel *Training runs*."
)
