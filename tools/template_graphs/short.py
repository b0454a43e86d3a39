"""Templates with the four nodes that choose all settings: one for each release of the model, and the demo."""

from __future__ import annotations

from collections.abc import Sequence

from trainer_core.qwen_image.flavours import Flavour
from trainer_core.qwen_image.recognise import download

from .node import LIGHTNING, PREVIEW, TEXT_ENCODER, TITLE, VAE, Blueprint, Node, Template, model, note

_DEMO = "demo (embedded)"
_TRAIN_LINKS = {"model": ("model", "edit model"), "dataset": ("pairs", "dataset")}
_DECISIONS = (("model", "model"), ("pairs", "data_set"), ("pairs", "instruction"), ("train", "run_name"))


def _train(run_name: str) -> Node:
    return Node(key="train", kind="QwenEdit_Train", size=(440, 620), values={"run_name": run_name}, links=_TRAIN_LINKS)


def _path(note: Node, model: Node, pairs: tuple[Node, ...], run_name: str) -> Sequence[Sequence[Node]]:
    """The columns: `note`, the model node above `pairs` (the nodes that show them too), training, and the trial."""
    trial = Node(key="try", kind="QwenEdit_TryLora", size=(400, 500), links={"run": ("train", "run")})
    return ((note,), (model, *pairs), (_train(run_name),), (trial,))


def demo() -> Template:
    """The four nodes with the demo model and its pairs, and a preview of the pairs."""
    return Template(
        title=f"{TITLE}Try the demo",
        name="demo",
        columns=_path(
            note("The Demo", "demo", 380),
            Node(key="model", kind="QwenEdit_ChooseModel", values={"model": _DEMO}),
            (
                Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": _DEMO}),
                Node(key="preview", kind=PREVIEW, size=(340, 400), links={"dataset": ("pairs", "dataset")}),
            ),
            "demo",
        ),
        app_outputs=("train", "try"),
        app_inputs=(("train", "run_name"),),
    )


def train(flavour: Flavour, name: str, run_name: str) -> Template:
    """The four nodes, for one release of the model. `name`: of the API prompt. `run_name`: of the example run."""
    release, file = flavour.release, flavour.comfyui_file
    downloads = (model(file), TEXT_ENCODER, VAE)
    listed = "\n".join(
        f"- [{each['name']}]({each['url']}), {download(each['name']).gigabytes:g} GB, into *models/{each['directory']}*"
        for each in downloads
    )
    return Template(
        title=f"{TITLE}Train LoRA {release}",
        name=name,
        columns=_path(
            note("How To Train", "short", 620, release=release, repository=flavour.released_as, downloads=listed),
            Node(key="model", kind="QwenEdit_ChooseModel", values={"model": file}, models=downloads),
            (Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": "my_edit"}),),
            run_name,
        ),
        models=downloads,
        app_inputs=_DECISIONS,
        app_outputs=("train", "try"),
    )


def with_settings(flavour: Flavour, title: str, name: str, run_name: str, settings: Node, text: str) -> Template:
    """The four nodes with one settings node, which Qwen Edit More Settings passes on. `text`: the note's file."""
    downloads = (model(flavour.comfyui_file), TEXT_ENCODER, VAE)
    kind = f"{settings.key}_settings"
    more = Node(
        key="more", kind="QwenEdit_MoreSettings", size=(340, 480), links={kind: (settings.key, kind.replace("_", " "))}
    )
    words = {"release": flavour.release, "url": LIGHTNING["url"], "name": LIGHTNING["name"]}
    train = Node(
        key="train",
        kind="QwenEdit_Train",
        size=(440, 620),
        values={"run_name": run_name},
        links={**_TRAIN_LINKS, "more_settings": ("more", "more settings")},
    )
    return Template(
        title=f"{TITLE}{title}",
        name=name,
        columns=(
            (note(title, text, 560, repository=flavour.released_as, **words),),
            (
                Node(
                    key="model",
                    kind="QwenEdit_ChooseModel",
                    values={"model": flavour.comfyui_file},
                    models=downloads,
                ),
                Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": "my_edit"}),
            ),
            (settings, more),
            (train,),
            (Node(key="try", kind="QwenEdit_TryLora", size=(400, 500), links={"run": ("train", "run")}),),
        ),
        models=(*downloads, *settings.models),
        app_inputs=_DECISIONS,
        app_outputs=("train", "try"),
    )


def few_step_previews(flavour: Flavour) -> Template:
    """The short path with a Lightning LoRA for its previews. `flavour`: 2509, for which the LoRA is."""
    settings = Node(
        key="validation",
        kind="QwenEdit_ValidationSettings",
        size=(340, 520),
        room=760,
        values={"validation_lora": LIGHTNING["name"]},
        models=(LIGHTNING,),
    )
    return with_settings(
        flavour, "Train with few-step previews", "train_few_step_previews", "my_edit_few_steps", settings, "few_steps"
    )


def preservation(flavour: Flavour) -> Template:
    """The short path with turns that keep the model's other edits."""
    settings = Node(key="preservation", kind="QwenEdit_PreservationSettings", size=(340, 280))
    return with_settings(
        flavour, "Train and keep other edits", "train_preservation", "my_edit_preserving", settings, "preservation"
    )


def in_one_node() -> Blueprint:
    """Model, pairs and training as one node. Until the user chooses a model and pairs, it trains the demo."""
    return Blueprint(
        title="Train a Qwen edit LoRA",
        name="blueprint_train",
        description="Trains a LoRA for Qwen-Image-Edit on pairs of pictures: the nodes Qwen Edit Model, Edit Pairs and "
        "Train Qwen Edit LoRA in one.",
        words=("qwen", "edit lora", "train lora", "training"),
        columns=(
            (
                Node(key="model", kind="QwenEdit_ChooseModel", values={"model": _DEMO}),
                Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": _DEMO}),
            ),
            (_train("my_edit"),),
        ),
        app_inputs=_DECISIONS,
        app_outputs=("train",),
    )
