"""The graphs of the templates. tools/templates.py writes them to workflows/.

ComfyUI shows a template under the name of its file and searches that name, so the titles are for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template as Text
from typing import Any

TITLE = "Qwen edit LoRA - "
PREVIEW = "QwenEdit_PreviewPairs"
_DEMO = "demo (embedded)"
_NOTES = Path(__file__).parent / "template_notes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node. `values`: widgets that differ from their defaults. `links`: input -> (key of a node, name of its output).

    `size` is in pixels. `room`: the height that its column keeps for it, if pictures or reports make it taller.
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


def _note(title: str, file: str, height: int, **values: str) -> Node:
    """A note with the text of a file in tools/template_notes, in which `values` replace their $names."""
    text = Text((_NOTES / f"{file}.md").read_text(encoding="utf-8"))
    filled = text.substitute(values, title=TITLE, to_stop=_TO_STOP)
    return Node(key="note", kind="MarkdownNote", title=title, size=(360, height), values={"text": filled})


_HUB = "https://huggingface.co"
_EDIT_FILES = f"{_HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models"
_IMAGE_FILES = f"{_HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"


def _model(directory: str, name: str) -> dict[str, str]:
    place = _EDIT_FILES if directory == "diffusion_models" else f"{_IMAGE_FILES}/{directory}"
    return {"name": name, "url": f"{place}/{name}", "directory": directory}


_TEXT_ENCODER = _model("text_encoders", "qwen_2.5_vl_7b_fp8_scaled.safetensors")
_VAE = _model("vae", "qwen_image_vae.safetensors")
_TO_STOP = (
    "**To stop**, press ComfyUI's *Cancel current run* button. The work is kept; press Run to continue. To end early "
    "and keep the LoRA, press *Stop and keep* in the side panel *Training runs*."
)


_TRAIN_LINKS = {"model": ("model", "edit model"), "dataset": ("pairs", "dataset")}


def _path(note: Node, model: Node, pairs: tuple[Node, ...], run_name: str) -> Sequence[Sequence[Node]]:
    """The columns of the short path."""
    train = Node(key="train", kind="QwenEdit_Train", size=(400, 620), values={"run_name": run_name}, links=_TRAIN_LINKS)
    trial = Node(key="try", kind="QwenEdit_TryLora", size=(400, 500), links={"run": ("train", "run")})
    return ((note,), (model, *pairs), (train,), (trial,))


def _demo() -> Template:
    return Template(
        title=f"{TITLE}Try the demo",
        name="demo",
        columns=_path(
            _note("The Demo", "demo", 380),
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


def _short(release: str, name: str, file: str, repository: str, edit: str) -> Template:
    """The four nodes, for one release of the model."""
    downloads = (_model("diffusion_models", file), _TEXT_ENCODER, _VAE)
    listed = "\n".join(f"- [{each['name']}]({each['url']}) into `models/{each['directory']}`" for each in downloads)
    return Template(
        title=f"{TITLE}Train {release}",
        name=name,
        columns=_path(
            _note("How To Train", "short", 620, release=release, repository=repository, downloads=listed),
            Node(key="model", kind="QwenEdit_ChooseModel", values={"model": file}, models=downloads),
            (Node(key="pairs", kind="QwenEdit_EditPairs", values={"data_set": "my_edit"}),),
            edit,
        ),
        models=downloads,
        app_inputs=(("model", "model"), ("pairs", "data_set"), ("pairs", "instruction"), ("train", "run_name")),
        app_outputs=("train", "try"),
    )


_CARD = {  # the preset 24gb, in single nodes
    "encode": {"resolution": 1024, "match_target_res": True, "num_eval_images": 2},
    "lora": {"lora_rank": 16, "lora_targets": "attention-mlp"},
    "training": {"gradient_accumulation_steps": 1},
    "validation": {"num_validation_images": 2},
}


def _loader(folder: str, flavour: str) -> Node:
    values = {"base_model": folder, "flavour": flavour, "base_model_precision": "int8-quanto"}
    return Node(key="model", kind="QwenEdit_LoadModel", size=(340, 226), values=values)


def _pairs(key: str, values: Mapping[str, Any], title: str = "") -> Node:
    return Node(key=key, kind="QwenEdit_PairFolders", size=(340, 300), title=title, values=values)


def _preview(key: str, pairs: str, title: str = "") -> Node:
    return Node(key=key, kind=PREVIEW, size=(340, 400), title=title, links={"dataset": (pairs, "dataset")})


def _encode(key: str, pairs: str, title: str = "", **values: Any) -> Node:
    links = {"model": ("model", "model"), "dataset": (pairs, "dataset")}
    return Node(
        key=key, kind="QwenEdit_EncodePairs", size=(340, 434), title=title, values={**_CARD["encode"], **values},
        links=links,
    )  # fmt: skip


def _settings() -> tuple[Node, ...]:
    return (
        Node(key="lora", kind="QwenEdit_LoraSettings", size=(340, 446), values=_CARD["lora"]),
        Node(key="optimizer", kind="QwenEdit_OptimizerSettings", size=(340, 424)),
        Node(key="training", kind="QwenEdit_TrainingSettings", size=(340, 502), values=_CARD["training"]),
        Node(key="validation", kind="QwenEdit_ValidationSettings", size=(340, 216), values=_CARD["validation"]),
    )


def _train(run_name: str, encoded: str) -> Node:
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
        Node(key="plot", kind="QwenEdit_PlotLoss", size=(440, 340), links={"run": ("train", "run")}),
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
        f"Download the whole folder [{repository}]({_HUB}/{repository}) into ComfyUI's `models/diffusers/{folder}`, so "
        f"that the file `models/diffusers/{folder}/transformer/config.json` exists. Then press R and choose it in "
        "**Load Qwen Edit Model**. Or connect **Qwen Edit Model** to train from the files that you generate with. "
        "Train on the same release that you will use the LoRA with."
    )


def _long(title: str, name: str, repository: str, pairs: Node, run_name: str, **encode: Any) -> Template:
    """Each step in its own node, for 2509."""
    model = _loader(repository.split("/")[-1], "edit-v2")
    return Template(
        title=TITLE + title,
        name=name,
        columns=(
            (_note(title, name.removeprefix("train_"), 900, download=_download(repository)),),
            (model, pairs, _preview("preview", "pairs")),
            (_encode("encode", "pairs", **encode), *_settings()),
            (_train(run_name, "encode"),),
            _results(),
        ),
    )


def _two_datasets() -> Template:
    def parts(number: int, folder: str, name: str) -> tuple[Node, ...]:
        folders = {"target_folder": f"{folder}/target", "reference_folder_1": f"{folder}/reference"}
        return (
            _pairs(f"pairs{number}", {**folders, "mask_folder": f"{folder}/mask"}, f"Pairs {number}: {name}"),
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
            (_note(title, "two_datasets", 1000, download=_download("Qwen/Qwen-Image-Edit")),),
            (_loader("Qwen-Image-Edit", "edit-v1"), *parts(1, "my_faces", "Faces")),
            (*parts(2, "my_people", "Whole People"), mix),
            encoded,
            _settings(),
            (_train("my_masked_edit", "mix"),),
            _results(),
        ),
        scale=0.6,
    )


def _import() -> Template:
    imported = ("import", "imported")
    return Template(
        title=f"{TITLE}Import SimpleTuner",
        name="import_simpletuner",
        columns=(
            (_note("How To Use Your Configuration", "import_simpletuner", 760),),
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


def _use(release: str, file: str, run_name: str) -> Template:
    """ComfyUI's own edit graph for a release, with a LoRA loader."""
    is_first, is_last = release == "Qwen-Image-Edit", release == "2511"
    text = "TextEncodeQwenImageEdit" + ("" if is_first else "Plus")
    picture = "image" if is_first else "image1"

    def encoder(key: str, title: str, prompt: str) -> list[Node]:
        links = {"clip": ("clip", "CLIP"), "vae": ("vae", "VAE"), picture: ("scale", "IMAGE")}
        nodes = [Node(key=key, kind=text, size=(380, 220), title=title, values={"prompt": prompt}, links=links)]
        if is_last:
            method = {"reference_latents_method": "index_timestep_zero"}
            kind, source = "FluxKontextMultiReferenceLatentMethod", {"conditioning": (key, "CONDITIONING")}
            nodes.append(Node(key=f"{key} method", kind=kind, size=(380, 80), values=method, links=source))
        return nodes

    end = " method" if is_last else ""
    more = [] if is_first else ["For more references, connect `image2` and `image3` of both text nodes."]
    more += ["This needs ComfyUI 0.8 or newer."] if is_last else []
    transformer = _model("diffusion_models", file)
    return Template(
        title=f"{TITLE}Use {release}",
        name=f"use_{run_name.removeprefix('my_edit_') if not is_first else 'qwen_image_edit'}",
        columns=(
            (_note("How To Use", "use", 520, release=release, run_name=run_name, more=" ".join(more)),),
            (
                Node(key="unet", kind="UNETLoader", size=(380, 90), values={"unet_name": file}, models=(transformer,)),
                Node(
                    key="clip",
                    kind="CLIPLoader",
                    size=(380, 120),
                    values={"clip_name": _TEXT_ENCODER["name"], "type": "qwen_image"},
                    models=(_TEXT_ENCODER,),
                ),
                Node(key="vae", kind="VAELoader", size=(380, 70), values={"vae_name": _VAE["name"]}, models=(_VAE,)),
                Node(key="picture", kind="LoadImage", size=(380, 420), values={"image": "example.png"}),
            ),
            (
                Node(
                    key="lora",
                    kind="LoraLoaderModelOnly",
                    title="Your LoRA",
                    size=(380, 100),
                    values={"lora_name": f"{run_name}/{run_name}.safetensors"},
                    links={"model": ("unet", "MODEL")},
                ),
                Node(key="scale", kind="FluxKontextImageScale", size=(380, 50), links={"image": ("picture", "IMAGE")}),
                *encoder("instruction", "Edit Instruction", "turn the photo into a pencil drawing"),
                *encoder("negative", "Negative Prompt", " "),
                Node(
                    key="latent",
                    kind="VAEEncode",
                    size=(380, 60),
                    links={"pixels": ("scale", "IMAGE"), "vae": ("vae", "VAE")},
                ),
            ),
            (
                Node(
                    key="shift",
                    kind="ModelSamplingAuraFlow",
                    size=(320, 70),
                    values={"shift": 3.1 if is_last else 3.0},
                    links={"model": ("lora", "MODEL")},
                ),
                Node(
                    key="norm",
                    kind="CFGNorm",
                    size=(320, 70),
                    values={"strength": 1.0},
                    links={"model": ("shift", "MODEL")},
                ),
                Node(
                    key="sampler",
                    kind="KSampler",
                    size=(320, 480),
                    values={
                        "steps": 40 if is_last else 20,
                        "cfg": 2.5 if is_first else 4.0,
                        "sampler_name": "euler",
                        "scheduler": "simple",
                        "denoise": 1.0,
                    },
                    links={
                        "model": ("norm", "patched_model"),
                        "positive": (f"instruction{end}", "CONDITIONING"),
                        "negative": (f"negative{end}", "CONDITIONING"),
                        "latent_image": ("latent", "LATENT"),
                    },
                ),
            ),
            (
                Node(
                    key="decode",
                    kind="VAEDecode",
                    size=(320, 60),
                    links={"samples": ("sampler", "LATENT"), "vae": ("vae", "VAE")},
                ),
                Node(
                    key="save",
                    kind="SaveImage",
                    size=(460, 480),
                    values={"filename_prefix": "edit"},
                    links={"images": ("decode", "IMAGE")},
                ),
            ),
        ),
    )


_FOLDERS = {"target_folder": "my_edit/target", "reference_folder_1": "my_edit/reference"}
_SCENES = {
    "target_folder": "my_scenes/target",
    "reference_folder_1": "my_scenes/person",
    "reference_folder_2": "my_scenes/clothes",
    "reference_folder_3": "my_scenes/place",
}
_RELEASES = (  # release, transformer file, folder on the hub, name of the example run
    ("2511", "qwen_image_edit_2511_bf16.safetensors", "Qwen/Qwen-Image-Edit-2511", "my_edit_2511"),
    ("2509", "qwen_image_edit_2509_fp8_e4m3fn.safetensors", "Qwen/Qwen-Image-Edit-2509", "my_edit_2509"),
    ("Qwen-Image-Edit", "qwen_image_edit_fp8_e4m3fn.safetensors", "Qwen/Qwen-Image-Edit", "my_edit"),
)
TEMPLATES: tuple[Template, ...] = (
    _demo(),
    *(
        _short(release, f"train_{release.lower().replace('-', '_')}", file, repository, run_name)
        for release, file, repository, run_name in _RELEASES
    ),
    _long(
        "Train with all settings",
        "train_all_settings",
        "Qwen/Qwen-Image-Edit-2509",
        _pairs("pairs", _FOLDERS),
        "my_edit_2509",
    ),
    _long(
        "Train with three references",
        "train_three_references",
        "Qwen/Qwen-Image-Edit-2509",
        _pairs("pairs", _SCENES),
        "my_scenes_2509",
        resolution=768,
    ),
    _two_datasets(),
    _import(),
    *(_use(release, file, run_name) for release, file, _, run_name in _RELEASES),
)
