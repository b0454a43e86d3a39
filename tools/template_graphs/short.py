"""Templates of the short path: one for each release, and the demo."""

from __future__ import annotations

from collections.abc import Sequence

from .node import PREVIEW, TEXT_ENCODER, TITLE, VAE, Node, Template, model, note

_DEMO = "demo (embedded)"
_TRAIN_LINKS = {"model": ("model", "edit model"), "dataset": ("pairs", "dataset")}


def _path(note: Node, model: Node, pairs: tuple[Node, ...], run_name: str) -> Sequence[Sequence[Node]]:
    """The columns of the short path."""
    train = Node(key="train", kind="QwenEdit_Train", size=(400, 620), values={"run_name": run_name}, links=_TRAIN_LINKS)
    trial = Node(key="try", kind="QwenEdit_TryLora", size=(400, 500), links={"run": ("train", "run")})
    return ((note,), (model, *pairs), (train,), (trial,))


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
    listed = "\n".join(f"- [{each['name']}]({each['url']}) into `models/{each['directory']}`" for each in downloads)
    return Template(
        title=f"{TITLE}Train {release}",
        name=name,
        columns=_path(
            note("How To Train", "short", 620, release=release, repository=repository, downloads=listed),
            Node(key="model", kind="QwenEdit_ChooseModel", values={"model": file}, models=downloads),
            (Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": "my_edit"}),),
            edit,
        ),
        models=downloads,
        app_inputs=(("model", "model"), ("pairs", "data_set"), ("pairs", "instruction"), ("train", "run_name")),
        app_outputs=("train", "try"),
    )
