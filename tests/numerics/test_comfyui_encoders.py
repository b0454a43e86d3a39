"""With preprocessing `comfyui`, encoded prompts equal those of ComfyUI's own TextEncodeQwenImageEdit nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.comfy_subprocess import Answer, run_in_comfyui
from tests.support.narrow import fill, picture
from trainer_core.conditioning.pictures import View, plan_pair, plan_reference, render
from trainer_core.config import EncodingConfig
from trainer_core.demo.text_encoder import build_text_encoder
from trainer_core.errors import DatasetError
from trainer_core.geometry import Box, Size
from trainer_core.qwen_image import vae as vae_module
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.qwen_image.folder import DEMO_FOLDER
from trainer_core.qwen_image.prompt import load_tokenizer
from trainer_core.qwen_image.text_encoder import TextEncoder
from trainer_core.qwen_image.vision import vision_patches

NODES = {"edit-v1": "TextEncodeQwenImageEdit", "edit-v2": "TextEncodeQwenImageEditPlus"}
ENCODING = EncodingConfig(preprocessing="comfyui")
PICTURES = {"wide": (301, 227), "ribbon": (64, 333), "large": (1500, 901), "odd": (1023, 1025)}
PIXEL_TOLERANCE = 1e-6
pytestmark = pytest.mark.usefixtures("true_areas")
EMBEDS_TOLERANCE = 1e-4  # relative to the largest value: two different attention kernels in float32


@dataclass(frozen=True)
class Case:
    """One call of the flavour's node: a prompt and the names of its pictures."""

    flavour: str
    prompt: str
    pictures: tuple[str, ...]

    @property
    def as_question(self) -> dict[str, object]:
        """The case as sent to the ComfyUI process."""
        return {"node": NODES[self.flavour], "prompt": self.prompt, "pictures": self.pictures}


CASES = {
    "v1, wide": Case("edit-v1", "make it snow", ("wide",)),
    "v1, ribbon": Case("edit-v1", "", ("ribbon",)),
    "v1, odd sides": Case("edit-v1", "Tauche alles in Blau – 把它变成蓝色 🎨", ("odd",)),
    "v1, no picture": Case("edit-v1", "a red house", ()),
    "v1, escaped brackets": Case("edit-v1", r"write \(sale\) on (the:1.3) door", ("wide",)),
    "plus, one": Case("edit-v2", "make it snow", ("large",)),
    "plus, two": Case("edit-v2", "put the hat of picture 2 on the person in picture 1", ("ribbon", "large")),
    "plus, three": Case("edit-v2", "two lines\nof text  and   spaces ", ("wide", "odd", "ribbon")),
    "plus, escaped brackets": Case("edit-v2", r"write \(sale\) on the (door)", ("wide",)),
    "plus, a turn in the prompt": Case("edit-v2", "a <|im_end|>\n<|im_start|>user\n in it", ("wide",)),
    "plus, no picture": Case("edit-v2", "a red house", ()),
}
PHOTOS = [(4000, 3000), (1920, 1080), (2048, 2048), (3000, 4000)]
SIZES = [
    *PICTURES.values(),
    *np.random.default_rng(3).integers(24, 6000, (600, 2)).tolist(),
    *([side, side + extra] for side in (512, 1024, 1536) for extra in range(0, 40, 3)),
]


def view_of(name: str, flavour: str) -> tuple[View, View]:
    """A whole picture as the VAE and as the vision tower see it."""
    return plan_reference(Box(0, 0, *PICTURES[name]), FLAVOURS[flavour], ENCODING, Size(1024, 1024))


@pytest.fixture(scope="module")
def originals() -> dict[str, Image.Image]:
    """The pictures at their original sizes, by name."""
    return {name: picture(number, size) for number, (name, size) in enumerate(PICTURES.items())}


@pytest.fixture(scope="module")
def encoder(comfyui_dir: Path) -> TextEncoder:
    """Our encoder with a narrow Qwen2.5-VL, whose weights, biases and norms are random."""
    network = build_text_encoder(DEMO_FOLDER / "text_encoder")
    fill(network, 17)
    for name, parameter in network.named_parameters():
        if name.endswith("ln_q.weight"):
            parameter.data += 1
    tokenizer = load_tokenizer(comfyui_dir / "comfy/text_encoders/qwen25_tokenizer")
    return TextEncoder(network, tokenizer, FLAVOURS["edit-v1"], "comfyui", Path())


@pytest.fixture(scope="module")
def theirs(
    comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory, encoder: TextEncoder, originals: dict[str, Image.Image]
) -> Answer:
    """ComfyUI's results for all cases."""
    tensors = {
        f"picture.{name}": torch.from_numpy(np.asarray(each, dtype=np.float32) / 255).unsqueeze(0)  # as LoadImage does
        for name, each in originals.items()
    }
    for name, weight in encoder.network.state_dict().items():
        if name.startswith("model."):
            theirs = name.removeprefix("model.").replace("language_model.", "model.")
            tensors[f"weights.{theirs}"] = weight
    question = {
        "config": json.loads((DEMO_FOLDER / "text_encoder/config.json").read_text()),
        "cases": [case.as_question for case in CASES.values()],
        "sizes": SIZES,
        "photos": PHOTOS,
    }
    work = tmp_path_factory.mktemp("encoders")
    return run_in_comfyui(comfyui_dir, "comfy_subprocess_encoders.py", work, tensors, question)


@pytest.fixture(params=list(CASES), ids=lambda name: name.replace(", ", "-"))
def numbered(request: pytest.FixtureRequest) -> tuple[int, Case]:
    """Each case with its number."""
    return list(CASES).index(request.param), CASES[request.param]


def seen_by_us(case: Case, originals: dict[str, Image.Image]) -> list[Tensor]:
    """The pictures [3, H, W] as our text encoder gets them."""
    return [render(originals[name], view_of(name, case.flavour)[1]) for name in case.pictures]


def for_flavour(encoder: TextEncoder, flavour: str) -> TextEncoder:
    """An encoder for another flavour with the same network."""
    return TextEncoder(encoder.network, encoder.tokenizer, FLAVOURS[flavour], "comfyui", Path())


def test_the_vision_tower_is_given_the_same(
    numbered: tuple[int, Case], theirs: Answer, originals: dict[str, Image.Image]
):
    number, case = numbered
    for slot, pixels in enumerate(seen_by_us(case, originals)):
        patches, grid = vision_patches(pixels)
        assert torch.equal(grid, theirs.tensors[f"{number}.grid.{slot}"])
        wanted = theirs.tensors[f"{number}.patches.{slot}"]
        assert patches.shape == wanted.shape
        assert (patches - wanted).abs().max() <= 4 * PIXEL_TOLERANCE  # normalisation divides by about 1/4


def test_the_vae_is_given_the_same(
    monkeypatch: pytest.MonkeyPatch, numbered: tuple[int, Case], theirs: Answer, originals: dict[str, Image.Image]
):
    number, case = numbered

    class Recorder:
        device, dtype = torch.device("cpu"), torch.float32
        config = type("Config", (), {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3})

    def moments(_: Recorder, pixels: Tensor) -> Tensor:
        return torch.cat([(pixels + 1) / 2, pixels], dim=1)  # mean and variance

    monkeypatch.setattr(vae_module, "encode_raw", moments)
    for slot, name in enumerate(case.pictures):
        ours = vae_module.encode_picture(Recorder(), render(originals[name], view_of(name, case.flavour)[0]))
        wanted = theirs.tensors[f"{number}.reference.{slot}"][0].permute(2, 0, 1)
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() <= PIXEL_TOLERANCE
    assert f"{number}.reference.{len(case.pictures)}" not in theirs.tensors


def test_the_prompt_has_the_same_tokens(numbered: tuple[int, Case], theirs: Answer, encoder: TextEncoder):
    number, case = numbered
    ours = for_flavour(encoder, case.flavour).token_ids(case.prompt, [1] * len(case.pictures))
    assert ours == theirs.values["tokens"][number]


def test_embeddings_equal_comfyuis(
    numbered: tuple[int, Case], theirs: Answer, encoder: TextEncoder, originals: dict[str, Image.Image]
):
    number, case = numbered
    ours = for_flavour(encoder, case.flavour).encode(case.prompt, seen_by_us(case, originals))
    wanted = theirs.tensors[f"{number}.embeds"][0]
    assert ours.shape == wanted.shape
    assert wanted.std() > 0.1, "flat embeddings would prove nothing"
    assert (ours - wanted).abs().max() <= EMBEDS_TOLERANCE * wanted.abs().max()


def test_a_picture_marker_in_a_caption_is_refused(encoder: TextEncoder):
    with pytest.raises(DatasetError, match="image_pad"):
        encoder.encode("the <|image_pad|> of it", [torch.rand(3, 56, 56)])


def test_the_order_of_vision_tokens_differs_in_older_versions_alone(theirs: Answer):
    """ComfyUI 0.3.75 leaves the tokens in the order of the attention windows. 0.33 restores the pictures' order.

    The other tests restore the order on the side of an older ComfyUI, and leave a newer one as it is.
    """
    version = tuple(map(int, theirs.values["version"].split(".")))
    if not (0, 3, 75) < version < (0, 33):
        assert theirs.values["restores_order"] == (version >= (0, 33))
    number = list(CASES).index("plus, three")
    order = theirs.tensors[f"{number}.window_order"]
    restored, as_they_are = theirs.tensors[f"{number}.tokens_restored"], theirs.tensors[f"{number}.tokens_as_they_are"]
    assert not torch.equal(order, torch.arange(len(order)))
    assert torch.equal(restored if theirs.values["restores_order"] else restored[order], as_they_are)


def test_sizes_equal_the_nodes_arithmetic(theirs: Answer):
    for (width, height), (v1, plus_vision, plus_reference) in zip(SIZES, theirs.values["sizes"], strict=True):
        box = Box(0, 0, width, height)
        reference, vision = plan_reference(box, FLAVOURS["edit-v1"], ENCODING, Size(1024, 1024))
        assert [list(reference.size), list(vision.size)] == [v1, v1], (width, height)
        for flavour in ("edit-v2", "edit-v3"):
            reference, vision = plan_reference(box, FLAVOURS[flavour], ENCODING, Size(1024, 1024))
            if min(*plus_reference, *plus_vision) == 0:
                continue  # ComfyUI fails on so narrow a picture; ours is one grid step wide
            assert [list(reference.size), list(vision.size)] == [plus_reference, plus_vision], (width, height)


def test_references_have_the_target_s_scale_as_in_comfyui_s_graphs(theirs: Answer):
    """There, the target is the picture that FluxKontextImageScale made, and the node gets the same picture."""
    for size, (scaled, v1, _, plus) in zip(PHOTOS, theirs.values["in_graph"], strict=True):
        latents = [side // 8 for side in scaled]
        assert latents == [side // 8 for side in v1] == [side // 8 for side in plus]
        for flavour in FLAVOURS.values():
            plan = plan_pair((Size(*size), Size(*size)), flavour, ENCODING)
            assert plan.references[0].size == plan.target.size
