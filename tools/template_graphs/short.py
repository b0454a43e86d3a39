"""Templates of the short path: one for each release, and the demo."""

from __future__ import annotations

from collections.abc import Sequence

from trainer_core.qwen_image.recognise import gigabytes

from .node import PREVIEW, TEXT_ENCODER, TITLE, VAE, Blueprint, Node, Template, model, note

_DEMO = "demo (embedded)"
_TRAIN_LINKS = {"model": ("model", "edit model"), "dataset": ("pairs", "dataset")}
_DECISIONS = (("model", "model"), ("pairs", "data_set"), ("pairs", "instruction"), ("train", "run_name"))


def _train(run_name: str) -> Node:
    return Node(key="train", kind="QwenEdit_Train", size=(440, 620), values={"run_name": run_name}, links=_TRAIN_LINKS)


def _path(note: Node, model: Node, pairs: tuple[Node, ...], run_name: str) -> Sequence[Sequence[Node]]:
    """The columns of the short path."""
    trial = Node(key="try", kind="QwenEdit_TryLora", size=(400, 500), links={"run": ("train", "run")})
    return ((note,), (model, *pairs), (_train(run_name),), (trial,))


def demo() -> Template:
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


def train(release: str, name: str, file: str, repository: str, edit: str) -> Template:
    """The four nodes, for one release of the model."""
    downloads = (model("diffusion_models", file), TEXT_ENCODER, VAE)
    listed = "\n".join(
        f"- [{each['name']}]({each['url']}), {gigabytes(each['name']):g} GB, into *models/{each['directory']}*"
        for each in downloads
    )
    return Template(
        title=f"{TITLE}Train LoRA {release}",
        name=name,
        columns=_path(
            note("How To Train", "short", 620, release=release, repository=repository, downloads=listed),
            Node(key="model", kind="QwenEdit_ChooseModel", values={"model": file}, models=downloads),
            (Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": "my_edit"}),),
            edit,
        ),
        models=downloads,
        app_inputs=_DECISIONS,
        app_outputs=("train", "try"),
    )


def in_one_node() -> Blueprint:
    """The short path as one node. It trains the demo until the user chooses a model and pairs, so it always runs."""
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
