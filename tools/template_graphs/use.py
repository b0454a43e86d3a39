"""Templates that use a LoRA in ComfyUI's own edit graph."""

from __future__ import annotations

from dataclasses import dataclass

from trainer_core.qwen_image.flavours import Flavour

from .node import TEXT_ENCODER, TITLE, VAE, Node, Template, model, note

_WIDTH = 380
_MORE = "For more references, connect *image2* and *image3* of both text nodes."


@dataclass(frozen=True, slots=True, kw_only=True)
class EditGraph:
    """How ComfyUI's own template edits with a release. `method` is that of FluxKontextMultiReferenceLatentMethod."""

    text_node: str
    picture: str = "image1"
    method: str = ""
    shift: float = 3.0
    steps: int = 20
    cfg: float = 4.0
    note: str = _MORE


EDIT_GRAPHS = {
    "Qwen-Image-Edit": EditGraph(text_node="TextEncodeQwenImageEdit", picture="image", cfg=2.5, note=""),
    "2509": EditGraph(text_node="TextEncodeQwenImageEditPlus"),
    "2511": EditGraph(
        text_node="TextEncodeQwenImageEditPlus",
        method="index_timestep_zero",
        shift=3.1,
        steps=40,
        note=f"{_MORE} This needs ComfyUI 0.8 or newer.",
    ),
}


def use(flavour: Flavour, name: str, run_name: str) -> Template:
    """ComfyUI's own edit graph for a release, with a loader of the run's LoRA. `name`: of the API prompt."""
    graph = EDIT_GRAPHS[flavour.release]
    return Template(
        title=f"{TITLE}Use {flavour.release}",
        name=name,
        columns=(
            (note("How To Use", "use", 520, release=flavour.release, run_name=run_name, more=graph.note),),
            _loaders(flavour.comfyui_file),
            (
                Node(
                    key="lora",
                    kind="LoraLoaderModelOnly",
                    title="Your LoRA",
                    size=(_WIDTH, 100),
                    values={"lora_name": f"{run_name}/{run_name}.safetensors"},
                    links={"model": ("unet", "MODEL")},
                ),
                Node(
                    key="scale", kind="FluxKontextImageScale", size=(_WIDTH, 50), links={"image": ("picture", "IMAGE")}
                ),
                *_text(graph, "instruction", "Edit Instruction", "turn the photo into a pencil drawing"),
                *_text(graph, "negative", "Negative Prompt", " "),
                Node(
                    key="latent",
                    kind="VAEEncode",
                    size=(_WIDTH, 60),
                    links={"pixels": ("scale", "IMAGE"), "vae": ("vae", "VAE")},
                ),
            ),
            _sampling(graph),
            _results(),
        ),
    )


def _loaders(file: str) -> tuple[Node, ...]:
    clip = {"clip_name": TEXT_ENCODER["name"], "type": "qwen_image"}
    transformer = model(file)
    return (
        Node(key="unet", kind="UNETLoader", size=(_WIDTH, 90), values={"unet_name": file}, models=(transformer,)),
        Node(key="clip", kind="CLIPLoader", size=(_WIDTH, 120), values=clip, models=(TEXT_ENCODER,)),
        Node(key="vae", kind="VAELoader", size=(_WIDTH, 70), values={"vae_name": VAE["name"]}, models=(VAE,)),
        Node(key="picture", kind="LoadImage", size=(_WIDTH, 420), values={"image": "example.png"}),
    )


def _text(graph: EditGraph, key: str, title: str, prompt: str) -> list[Node]:
    """The node that encodes a prompt with the picture, and the one that sets the method for references."""
    links = {"clip": ("clip", "CLIP"), "vae": ("vae", "VAE"), graph.picture: ("scale", "IMAGE")}
    nodes = [
        Node(key=key, kind=graph.text_node, size=(_WIDTH, 220), title=title, values={"prompt": prompt}, links=links)
    ]
    if graph.method:
        nodes.append(
            Node(
                key=f"{key} method",
                kind="FluxKontextMultiReferenceLatentMethod",
                size=(_WIDTH, 80),
                values={"reference_latents_method": graph.method},
                links={"conditioning": (key, "CONDITIONING")},
            )
        )
    return nodes


def _sampling(graph: EditGraph) -> tuple[Node, ...]:
    end = " method" if graph.method else ""
    values = {"steps": graph.steps, "cfg": graph.cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {
        "model": ("norm", "patched_model"),
        "positive": (f"instruction{end}", "CONDITIONING"),
        "negative": (f"negative{end}", "CONDITIONING"),
        "latent_image": ("latent", "LATENT"),
    }
    return (
        Node(
            key="shift",
            kind="ModelSamplingAuraFlow",
            size=(320, 70),
            values={"shift": graph.shift},
            links={"model": ("lora", "MODEL")},
        ),
        Node(key="norm", kind="CFGNorm", size=(320, 70), values={"strength": 1.0}, links={"model": ("shift", "MODEL")}),
        Node(key="sampler", kind="KSampler", size=(320, 480), values=values, links=links),
    )


def _results() -> tuple[Node, ...]:
    return (
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
    )
