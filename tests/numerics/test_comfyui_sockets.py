"""With ComfyUI's CLIP and VAE connected, the cache holds what ComfyUI's own nodes put into CONDITIONING."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.comfy_subprocess import Answer, run_in_comfyui
from tests.support.narrow import fill, picture
from trainer_core.config import ModelConfig
from trainer_core.demo.text_encoder import build_text_encoder
from trainer_core.qwen_image.folder import DEMO_FOLDER

CASES = {
    "v1": ("edit-v1", "turn it into a negative", [(120, 96)]),
    "plus, two": ("edit-v2", "put the hat of picture 2 on the person in picture 1", [(120, 96), (64, 101)]),
}
LATENTS_TOLERANCE = 1e-5
EMBEDS_TOLERANCE = 1e-6  # relative to the largest value: another memory layout of pixels changes a resize's rounding


def case(root: Path, base: ModelConfig, caption: str, sizes: list[tuple[int, int]]) -> dict[str, object]:
    """Writes one pair. No reference has the target's shape, so each is used whole, as in ComfyUI's nodes."""
    places = {"target": (96, 96), **{f"reference_{number}": size for number, size in enumerate(sizes)}}
    for number, (name, size) in enumerate(places.items()):
        (root / name).mkdir(parents=True)
        picture(number, size).save(root / name / "a.png")
    (root / "target/a.txt").write_text(caption, encoding="utf-8")
    references = [root / name for name in places if name != "target"]
    return {
        "base": base.base,
        "flavour": base.flavour,
        "caption": caption,
        "target_dir": str(root / "target"),
        "reference_dirs": [str(folder) for folder in references],
        "references": [str(folder / "a.png") for folder in references],
    }


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
            case(work / str(number), base_of(flavour), caption, sizes)
            for number, (flavour, caption, sizes) in enumerate(CASES.values())
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
