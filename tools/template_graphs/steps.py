"""Templates in which each step has its own node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .node import HUB, PREVIEW, TITLE, Node, Template, note

_CARD = {  # the preset 24gb, in single nodes
    "encode": {"resolution": 1024, "match_target_res": True, "num_eval_images": 2},
    "lora": {"lora_rank": 16, "lora_targets": "attention-mlp"},
    "training": {"gradient_accumulation_steps": 1},
    "validation": {"num_validation_images": 2},
}


def _loader(folder: str, flavour: str) -> Node:
    """The model node. `folder`: the model in models/diffusers."""
    values = {"base_model": folder, "flavour": flavour, "base_model_precision": "int8-quanto"}
    return Node(key="model", kind="QwenEdit_LoadModel", size=(340, 226), room=290, values=values)


def pair_folders(key: str, values: Mapping[str, Any], title: str = "") -> Node:
    """The node that names the folders of a data set. `values`: its widgets by input id, such as `target_folder`."""
    return Node(key=key, kind="QwenEdit_PairFolders", size=(340, 300), room=420, title=title, values=values)


def _preview(key: str, pairs: str, title: str = "") -> Node:
    """A preview of the pairs of the node with the key `pairs`."""
    return Node(key=key, kind=PREVIEW, size=(340, 400), room=640, title=title, links={"dataset": (pairs, "dataset")})


def _encode(key: str, pairs: str, title: str = "", **values: Any) -> Node:
    """Encodes the pairs of the node with the key `pairs`. `values`: widgets that differ from the preset."""
    links = {"model": ("model", "model"), "dataset": (pairs, "dataset")}
    return Node(
        key=key, kind="QwenEdit_EncodePairs", size=(340, 434), room=530, title=title,
        values={**_CARD["encode"], **values}, links=links,
    )  # fmt: skip


def _settings() -> tuple[Node, ...]:
    return (
        Node(key="lora", kind="QwenEdit_LoraSettings", size=(340, 446), values=_CARD["lora"]),
        Node(key="optimizer", kind="QwenEdit_OptimizerSettings", size=(340, 424)),
        Node(key="training", kind="QwenEdit_TrainingSettings", size=(340, 502), values=_CARD["training"]),
        Node(
            key="validation", kind="QwenEdit_ValidationSettings", size=(340, 216), room=270, values=_CARD["validation"]
        ),
    )


def _train(run_name: str, encoded: str) -> Node:
    """The training node, on the encoded pairs of the node with the key `encoded`."""
    settings = {f"{name}_settings": (name, f"{name} settings") for name in ("lora", "optimizer", "training")}
    return Node(
        key="train",
        kind="QwenEdit_TrainLora",
        size=(440, 880),
        values={"run_name": run_name, "max_train_steps": 2000},
        links={
            "model": ("model", "model"),
            "encoded": (encoded, "encoded"),
            **settings,
            "validation_settings": ("validation", "validation settings"),
        },
    )


def _results() -> tuple[Node, ...]:
    return (
        Node(key="plot", kind="QwenEdit_PlotLoss", size=(440, 340), room=760, links={"run": ("train", "run")}),
        Node(
            key="grid",
            kind="SaveImage",
            title="Save Validation Grid",
            size=(440, 420),
            values={"filename_prefix": "qwen_edit_trainer/grid"},
            links={"images": ("train", "grid")},
        ),
    )


def _download(repository: str) -> str:
    folder = repository.split("/")[-1]
    return (
        f"Download the whole folder [{repository}]({HUB}/{repository}) into ComfyUI's *models/diffusers/{folder}*, so "
        f"that the file *models/diffusers/{folder}/transformer/config.json* exists. Then press R and choose it in "
        "**Load Qwen Edit Model**. Or connect **Qwen Edit Model** to train from the files that you generate with. "
        "Train on the same release that you will use the LoRA with."
    )


def steps(title: str, name: str, repository: str, pairs: Node, run_name: str, **encode: Any) -> Template:
    """Each step in its own node, for 2509.

    `name`: of the API prompt and, without "train_", of the note. `repository`: the model on huggingface.co. `pairs`:
    the node with the key "pairs". `encode`: widgets of the encoding node that differ from the preset 24gb.
    """
    loader = _loader(repository.split("/")[-1], "edit-v2")
    return Template(
        title=TITLE + title,
        name=name,
        columns=(
            (note(title, name.removeprefix("train_"), 900, download=_download(repository)),),
            (loader, pairs, _preview("preview", "pairs")),
            (_encode("encode", "pairs", **encode), *_settings()),
            (_train(run_name, "encode"),),
            _results(),
        ),
    )


def two_datasets() -> Template:
    """Two data sets with masks, mixed, for Qwen-Image-Edit."""

    def parts(number: int, folder: str, name: str) -> tuple[Node, ...]:
        folders = {"target_folder": f"{folder}/target", "reference_folder_1": f"{folder}/reference"}
        return (
            pair_folders(f"pairs{number}", {**folders, "mask_folder": f"{folder}/mask"}, f"Pairs {number}: {name}"),
            _preview(f"preview{number}", f"pairs{number}", f"Preview {number}"),
        )

    mix = Node(
        key="mix",
        kind="QwenEdit_MixPairs",
        size=(340, 360),
        values={"repeats_2": 2},
        links={f"encoded_{number}": (f"encode{number}", "encoded") for number in (1, 2)},
    )
    encoded = tuple(_encode(f"encode{number}", f"pairs{number}", f"Encode {number}") for number in (1, 2))
    title = "Train two data sets with masks"
    return Template(
        title=TITLE + title,
        name="train_two_datasets_with_masks",
        columns=(
            (note(title, "two_datasets", 1000, download=_download("Qwen/Qwen-Image-Edit")),),
            (_loader("Qwen-Image-Edit", "edit-v1"), *parts(1, "my_faces", "Faces")),
            (*parts(2, "my_people", "Whole People"), mix),
            encoded,
            _settings(),
            (_train("my_masked_edit", "mix"),),
            _results(),
        ),
        scale=0.6,
    )


def imported() -> Template:
    """A training with the settings of a SimpleTuner configuration."""
    imported = ("import", "imported")
    return Template(
        title=f"{TITLE}Import SimpleTuner",
        name="import_simpletuner",
        columns=(
            (note("How To Use Your Configuration", "import_simpletuner", 760),),
            (
                Node(
                    key="import",
                    kind="QwenEdit_ImportSimpleTuner",
                    size=(380, 320),
                    values={
                        "config_file": "my_edit/config.json",
                        "data_file": "my_edit/multidatabackend.json",
                        "base_model": "Qwen-Image-Edit",
                    },
                ),
                Node(
                    key="report",
                    kind="PreviewAny",
                    title="Import Report",
                    size=(380, 360),
                    links={"source": ("import", "report")},
                ),
            ),
            (
                Node(key="encode", kind="QwenEdit_EncodeImported", size=(340, 160), links={"imported": imported}),
                Node(key="preview", kind=PREVIEW, size=(340, 500), links={"dataset": ("import", "dataset")}),
            ),
            (
                Node(
                    key="train",
                    kind="QwenEdit_TrainLora",
                    size=(440, 880),
                    values={"run_name": "my_edit"},
                    links={
                        "model": ("import", "model"),
                        "encoded": ("encode", "encoded"),
                        "validation_encoded": ("encode", "validation encoded"),
                        "imported": imported,
                        "max_train_steps": ("import", "max train steps"),
                        "seed": ("import", "seed"),
                    },
                ),
            ),
            _results(),
        ),
    )


FOLDERS = {"target_folder": "my_edit/target", "reference_folder_1": "my_edit/reference"}
SCENES = {
    "target_folder": "my_scenes/target",
    "reference_folder_1": "my_scenes/person",
    "reference_folder_2": "my_scenes/clothes",
    "reference_folder_3": "my_scenes/place",
}
