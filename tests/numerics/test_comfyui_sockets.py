"""With ComfyUI's CLIP and VAE connected, the cache holds what ComfyUI's own nodes put into CONDITIONING."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.comfy_subprocess import Answer, run_in_comfyui
from tests.support.narrow import NARROW, fill, picture
from tests.support.random_base import relative_error
from trainer_core.config import ModelConfig
from trainer_core.demo.text_encoder import build_text_encoder
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.folder import DEMO_FOLDER
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

CASES = {
    "v1": ("edit-v1", "turn it into a negative", [(120, 96)]),
    "plus, two": ("edit-v2", "put the hat of picture 2 on the person in picture 1", [(120, 96), (64, 101)]),
    "2511, two": ("edit-v3", "put the hat of picture 2 on the person in picture 1", [(120, 96), (64, 101)]),
}
SIGMA, LATENTS = 0.63, (1, 16, 12, 12)
LATENTS_TOLERANCE = 1e-5
VELOCITY_TOLERANCE = 1e-4  # relative; both compute in float32
EMBEDS_TOLERANCE = 1e-6  # relative to the largest value: another memory layout of pixels changes a resize's rounding


def case(root: Path, base: ModelConfig, caption: str, sizes: list[tuple[int, int]]) -> dict[str, object]:
    """Writes one pair. No reference has the target's shape, so each is used whole, as in ComfyUI's nodes."""
    places = {"target": (96, 96), **{f"reference_{number}": size for number, size in enumerate(sizes)}}
    for number, (name, size) in enumerate(places.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        picture(number, size).save(root / name / "a.png")
    (root / "target/a.txt").write_text(caption, encoding="utf-8")
    references = [root / name for name in places if name != "target"]
    return {
        "base": base.base,
        "flavour": base.flavour,
        "caption": caption,
        "narrow": NARROW,
        "transformer": str(Path(base.base) / "transformer/diffusion_pytorch_model.safetensors"),
        "latents": noisy().tolist(),
        "sigma": SIGMA,
        "target_dir": str(root / "target"),
        "reference_dirs": [str(folder) for folder in references],
        "references": [str(folder / "a.png") for folder in references],
    }


def noisy() -> torch.Tensor:
    """The latents whose velocity is compared."""
    return torch.randn(LATENTS, generator=stream(0, "sockets"))


@pytest.fixture(scope="module")
def answer(
    tmp_path_factory: pytest.TempPathFactory, base_of: Callable[[str], ModelConfig], comfyui_dir: Path, repo: Path
) -> Answer:
    """The results of both sides for all cases."""
    network = build_text_encoder(DEMO_FOLDER / "text_encoder")
    fill(network, 17)
    weights = {
        name.removeprefix("model.").replace("language_model.", "model."): weight
        for name, weight in network.state_dict().items()
        if name.startswith("model.")
    }
    work = tmp_path_factory.mktemp("sockets")
    question = {
        "config": json.loads((DEMO_FOLDER / "text_encoder/config.json").read_text()),
        "repo": str(repo),
        "output": str(work / "output"),
        "cases": [
            case(work / f"{len(sizes)} references", base_of(flavour), caption, sizes)
            for flavour, caption, sizes in CASES.values()
        ],
    }
    return run_in_comfyui(comfyui_dir, "comfy_subprocess_sockets.py", work / "comfyui", weights, question)


@pytest.mark.parametrize("name", CASES)
def test_stored_equals_conditioning(name: str, answer: Answer):
    number, references = list(CASES).index(name), len(CASES[name][2])
    ours, theirs = answer.tensors[f"{number}.ours.embeds"], answer.tensors[f"{number}.theirs.embeds"]
    assert theirs.std() > 0.1, "flat embeddings would prove nothing"
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= EMBEDS_TOLERANCE * theirs.abs().max()
    for slot in range(references):
        ours = answer.tensors[f"{number}.ours.reference.{slot}"]
        theirs = answer.tensors[f"{number}.theirs.reference.{slot}"]
        assert theirs.std() > 0.01
        assert torch.allclose(ours, theirs, rtol=0, atol=LATENTS_TOLERANCE)
    assert f"{number}.theirs.reference.{references}" not in answer.tensors


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_velocity_is_comfyuis(name: str, answer: Answer, base_of: Callable[[str], ModelConfig]):
    """From pictures and caption to the velocity: ComfyUI with its own nodes, and training with what is in the cache.

    Versions of ComfyUI before 0.8 don't know the method of 2511's references.
    """
    number, (flavour, _, references) = list(CASES).index(name), CASES[name]
    tensors = answer.tensors
    transformer = load_transformer(BaseModel(base_of(flavour)), torch.device("cpu"))
    follow_comfyui(transformer)
    stored = tuple(tensors[f"{number}.ours.reference.{slot}"].unsqueeze(0) for slot in range(len(references)))
    condition = Condition(stored, tensors[f"{number}.ours.embeds"].unsqueeze(0))
    ours = predict_velocity(transformer, noisy(), torch.tensor([SIGMA]), condition)[0]
    known = flavour != "edit-v3" or answer.values["supports_timestep_zero"]
    assert (f"{number}.theirs.velocity" in tensors) == known
    transformer.zero_cond_t = not transformer.zero_cond_t
    other = predict_velocity(transformer, noisy(), torch.tensor([SIGMA]), condition)[0]
    assert relative_error(other, ours) > 1e-2, "the method would make no difference"
    if known:
        assert relative_error(ours, tensors[f"{number}.theirs.velocity"]) < VELOCITY_TOLERANCE


def test_keys_tell_networks_apart(answer: Answer):
    keys = answer.values["keys"]
    (latents, prompt), own = keys["both"], keys["own"]
    assert keys["again"] == [latents, prompt]
    assert latents != own[0] and prompt != own[1]
    assert keys["only clip"] == [own[0], prompt]
    assert keys["only vae"] == [latents, own[1]]
    assert keys["other clip"][0] == latents and keys["other clip"][1] not in (prompt, own[1])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("diffusers", "works with comfyui only"),
        ("diffusers, vae", "works with comfyui only"),
        ("patched", "LoRA or hook"),
        ("nothing", "clip and vae"),
        ("flat vae", "[1, 16, 12, 12]"),
        ("other clip", "not Qwen-Image's text encoder"),
    ],
)
def test_refusals(name: str, says: str, answer: Answer):
    assert answer.values["refusals"][name].startswith("ConfigError: ")
    assert says in answer.values["refusals"][name]
