"""With preprocessing `diffusers`, a sample equals that of diffusers' own edit pipelines, for every flavour."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit_v1_pipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus_pipeline
from PIL import Image

import trainer_core.sample
from tests.support.narrow import picture
from trainer_core.conditioning.pictures import plan_reference, vision_picture
from trainer_core.config import EncodingConfig, ModelConfig, ValidationConfig
from trainer_core.geometry import Box, Size
from trainer_core.qwen_image.base_model import BaseModel, compute_dtype
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.qwen_image.folder import model_folder
from trainer_core.qwen_image.latents import pack
from trainer_core.qwen_image.positions import follow_comfyui
from trainer_core.qwen_image.sampling import load_scheduler, sample_latents
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.qwen_image.types import Condition
from trainer_core.qwen_image.vision import rotary_positions
from trainer_core.rng import stream
from trainer_core.sample import SampleRequest, sample_edit

PIXEL_TOLERANCE = 1e-3  # of the pixel range; a quarter of an 8-bit step
REFERENCE_AREA, VISION_AREA = 128 * 128, 96 * 96  # instead of 1024² and 384², on both sides
SIZE = Size(128, 96)
PROMPT, NEGATIVE = "turn the sky red and remove the boat", "blurry, grey"
REFERENCES = ((150, 100), (90, 140), (121, 117))
CASES = [
    pytest.param("edit-v1", 1, id="edit-v1"),
    pytest.param("edit-v2", 2, id="edit-v2, two references"),
    pytest.param("edit-v2", 3, id="edit-v2, three references"),
    pytest.param("edit-v3", 2, id="edit-v3, two references"),
]


@pytest.fixture(scope="module")
def bases(base_of: Callable[[str], ModelConfig]) -> dict[str, ModelConfig]:
    """A narrow base model per flavour; they differ in `zero_cond_t` only."""
    return {name: base_of(name) for name in FLAVOURS}


@pytest.fixture
def small_areas(true_areas: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the areas in the pipelines and in our flavours to REFERENCE_AREA and VISION_AREA."""
    dimensions = edit_v1_pipeline.calculate_dimensions
    monkeypatch.setattr(edit_v1_pipeline, "calculate_dimensions", lambda _, ratio: dimensions(REFERENCE_AREA, ratio))
    monkeypatch.setattr(edit_plus_pipeline, "VAE_IMAGE_SIZE", REFERENCE_AREA)
    monkeypatch.setattr(edit_plus_pipeline, "CONDITION_IMAGE_SIZE", VISION_AREA)
    for name, row in list(FLAVOURS.items()):
        vision = REFERENCE_AREA if row.vision_area == row.reference_area else VISION_AREA
        small = dataclasses.replace(row, reference_area=REFERENCE_AREA, vision_area=vision)
        monkeypatch.setitem(FLAVOURS, name, small)


def pictures(count: int) -> list[Image.Image]:
    """The first `count` references, which differ in size."""
    return [picture(number, size) for number, size in enumerate(REFERENCES[:count])]


def build_pipeline(model: ModelConfig) -> Any:
    """diffusers' pipeline for the flavour, with the base model's networks."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    device, folder = torch.device("cpu"), model_folder(model)
    encoder = load_text_encoder(BaseModel(model), "diffusers", device)
    pipeline = QwenImageEditPipeline if model.flavour == "edit-v1" else QwenImageEditPlusPipeline
    built = pipeline(
        scheduler=load_scheduler(folder.scheduler),
        vae=AutoencoderKLQwenImage.from_pretrained(folder.vae),
        text_encoder=encoder.network,
        tokenizer=encoder.tokenizer,
        processor=Qwen2VLProcessor(Qwen2VLImageProcessor(), encoder.tokenizer, Qwen2VLVideoProcessor()),
        transformer=QwenImageTransformer2DModel.from_pretrained(
            folder.transformer, torch_dtype=compute_dtype(model), zero_cond_t=FLAVOURS[model.flavour].zero_cond_t
        ),
    )
    built.set_progress_bar_config(disable=True)
    return built


def for_pipeline(model: ModelConfig, references: list[Image.Image]) -> Any:
    """The pipeline's `image` argument: one picture for edit-v1, a list for later flavours."""
    return references[0] if model.flavour == "edit-v1" else references


def their_sample(model: ModelConfig, references: list[Image.Image], *, seed: int, steps: int) -> torch.Tensor:
    """Pixels [3, H, W] in 0..1 that the pipeline samples from our noise."""
    noise = torch.randn((1, 16, SIZE.height // 8, SIZE.width // 8), generator=stream(seed, "sample"))
    pipeline = build_pipeline(model)
    return pipeline(
        image=for_pipeline(model, references),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=4.0,
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=steps,
        latents=pipeline._pack_latents(noise, 1, 16, SIZE.height // 8, SIZE.width // 8),
        output_type="pt",
    ).images[0]


def our_sample(
    monkeypatch: pytest.MonkeyPatch, model: ModelConfig, references: list[Image.Image], **changes: object
) -> torch.Tensor:
    """Pixels [3, H, W] in 0..1 that `sample_edit` samples, before they become bytes."""
    monkeypatch.setattr(trainer_core.sample, "to_picture", lambda pixels: pixels)
    settings = {"seed": 5, "preprocessing": "diffusers", "prompt": PROMPT, "size": SIZE}
    request = SampleRequest(
        model=model,
        references=tuple(references),
        negative_prompt=NEGATIVE,
        sampling=ValidationConfig(validation_num_inference_steps=changes.pop("steps", 4), validation_guidance=4.0),
        **{**settings, **changes},
    )
    return sample_edit(request)  # type: ignore[return-value]


@pytest.mark.usefixtures("small_areas")
@pytest.mark.parametrize(("flavour", "count"), CASES)
def test_sample_equals_the_pipelines(
    monkeypatch: pytest.MonkeyPatch, bases: dict[str, ModelConfig], flavour: str, count: int
):
    model, references = bases[flavour], pictures(count)
    theirs = their_sample(model, references, seed=5, steps=4)
    ours = our_sample(monkeypatch, model, references)
    assert ours.shape == theirs.shape == (3, SIZE.height, SIZE.width)
    assert ((theirs > 0.01) & (theirs < 0.99)).float().mean() > 0.5, "a clipped picture would prove nothing"
    assert theirs.std() > 0.02, "a flat picture would prove nothing"
    assert (ours - theirs).abs().max() < PIXEL_TOLERANCE


@pytest.mark.usefixtures("small_areas")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"prompt": "turn the sky blue and remove the boat"}, id="one word"),
        pytest.param({"preprocessing": "comfyui"}, id="the other policy"),
        pytest.param({"seed": 6}, id="noise"),
    ],
)
def test_the_comparison_would_notice(
    monkeypatch: pytest.MonkeyPatch, bases: dict[str, ModelConfig], change: dict[str, object]
):
    references = pictures(2)
    as_asked = our_sample(monkeypatch, bases["edit-v2"], references)
    otherwise = our_sample(monkeypatch, bases["edit-v2"], references, **change)
    assert (as_asked - otherwise).abs().max() > 3 * PIXEL_TOLERANCE


@pytest.mark.usefixtures("small_areas")
@pytest.mark.parametrize(("flavour", "count"), CASES)
def test_prompt_embeds_equal_the_pipelines(bases: dict[str, ModelConfig], flavour: str, count: int):
    model, references = bases[flavour], pictures(count)
    encoding = EncodingConfig(preprocessing="diffusers")
    views = [plan_reference(Box(0, 0, *each.size), FLAVOURS[flavour], encoding, SIZE)[1] for each in references]
    seen = [vision_picture(each, view) for each, view in zip(references, views, strict=True)]
    ours = load_text_encoder(BaseModel(model), "diffusers", torch.device("cpu")).encode(PROMPT, seen)

    pipeline = build_pipeline(model)
    resized = [
        pipeline.image_processor.resize(each, view.size.height, view.size.width)
        for each, view in zip(references, views, strict=True)
    ]
    theirs, mask = pipeline.encode_prompt(PROMPT, image=for_pipeline(model, resized))
    assert mask is None
    assert ours.shape == theirs[0].shape
    assert (ours - theirs[0]).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.usefixtures("true_areas")
def test_sizes_equal_the_pipelines_at_their_own_areas():
    rng = np.random.default_rng(0)
    encoding = EncodingConfig(preprocessing="diffusers")
    for width, height in rng.integers(40, 5000, (400, 2)).tolist():
        for flavour in FLAVOURS.values():
            reference, vision = plan_reference(Box(0, 0, width, height), flavour, encoding, Size(1024, 1024))
            ratio = width / height
            if flavour.name == "edit-v1":
                wanted = [edit_v1_pipeline.calculate_dimensions(1024 * 1024, ratio)[:2]] * 2
            else:
                areas = (edit_plus_pipeline.VAE_IMAGE_SIZE, edit_plus_pipeline.CONDITION_IMAGE_SIZE)
                wanted = [edit_plus_pipeline.calculate_dimensions(area, ratio) for area in areas]
            if min(map(min, wanted)) == 0:
                continue  # the pipelines fail on so narrow a picture; ours is 32 pixels wide
            assert [reference.size, vision.size] == wanted, (width, height, flavour.name)


@torch.no_grad()
@pytest.mark.usefixtures("small_areas")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("flavour", "count"), CASES)
def test_latents_in_bf16_equal_the_pipelines_bit_for_bit(
    bases: dict[str, ModelConfig], flavour: str, count: int, guidance: float
):
    """The pipeline calls diffusers' forward of the same network. It tells it a level that was rounded to bf16 twice."""
    model, steps, bf16 = dataclasses.replace(bases[flavour], mixed_precision="bf16"), 5, torch.bfloat16
    pipeline = build_pipeline(model)
    pipeline.vae.to(bf16)
    prompts = [torch.randn(1, length, 128, generator=stream(length, "prompt")).to(bf16) for length in (21, 13)]
    noise = torch.randn((1, 16, SIZE.height // 8, SIZE.width // 8), generator=stream(7, "noise"))
    encoded: list[torch.Tensor] = []
    encode = pipeline._encode_vae_image
    pipeline._encode_vae_image = lambda **given: encoded.append(encode(**given)) or encoded[-1]
    theirs = pipeline(
        image=for_pipeline(model, pictures(count)),
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        true_cfg_scale=guidance,
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=steps,
        latents=pack(noise),
        output_type="latent",
    ).images
    references = tuple(each.squeeze(2).float() for each in encoded)
    conditions = [Condition(references, prompt.float()) for prompt in prompts]
    transformer = load_transformer(BaseModel(model), torch.device("cpu"))
    sample = functools.partial(
        sample_latents,
        transformer,
        noise,
        conditions[0],
        scheduler=load_scheduler(model_folder(model).scheduler),
        num_steps=steps,
        guidance=guidance,
        negative=conditions[1],
    )
    ours = sample()
    assert len(references) == count and theirs.dtype == bf16 and theirs.std() > 0.1
    assert torch.equal(pack(ours), theirs.float())
    follow_comfyui(transformer)
    assert (sample() - ours).norm() > 1e-2 * ours.norm(), "ComfyUI's rounding is another"


class Positions:
    """Records the positions that Qwen2.5-VL's language model gets."""

    def __init__(self, network: Any) -> None:
        self.seen: list[torch.Tensor | None] = []
        self.lengths: list[int] = []
        network.model.language_model.rotary_emb.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, _: object, arguments: tuple, named: dict) -> None:
        positions = named.get("position_ids", arguments[1] if len(arguments) > 1 else None)
        self.seen.append(positions)
        self.lengths.append(arguments[0].shape[1])


@pytest.mark.usefixtures("small_areas")
def test_the_pipelines_and_our_diffusers_policy_count_pictures_as_text(bases: dict[str, ModelConfig]):
    """transformers 5 needs `mm_token_type_ids` for three-dimensional positions, which diffusers 0.42 does not pass.

    If this fails, diffusers passes them. Both encodings then still agree without a change here, but cached prompts of
    the policy `diffusers` are outdated, because their key contains the version of transformers, not of diffusers.
    """
    model, references = bases["edit-v2"], pictures(2)
    pipeline, ours = build_pipeline(model), load_text_encoder(BaseModel(model), "diffusers", torch.device("cpu"))
    theirs_seen, ours_seen = Positions(pipeline.text_encoder), Positions(ours.network)
    pipeline.encode_prompt(PROMPT, image=references)
    ours.encode(PROMPT, references)
    for record in (theirs_seen, ours_seen):
        counted = torch.arange(record.lengths[0])
        assert torch.equal(record.seen[0], counted.expand_as(record.seen[0]))


@pytest.mark.usefixtures("small_areas")
def test_our_comfyui_policy_gives_pictures_rows_and_columns(bases: dict[str, ModelConfig]):
    encoder = load_text_encoder(BaseModel(bases["edit-v2"]), "comfyui", torch.device("cpu"))
    record = Positions(encoder.network)
    encoder.encode(PROMPT, [torch.rand(3, 84, 140), torch.rand(3, 112, 56)])
    positions = record.seen[0].view(3, -1)
    assert not torch.equal(positions[0], positions[1])
    assert not torch.equal(positions[1], positions[2])
    assert positions.max() + 1 < record.lengths[0], "a picture takes fewer positions than tokens"


@pytest.mark.parametrize("grids", [[], [(6, 10)], [(10, 6), (4, 4)], [(2, 2), (14, 4), (8, 26)]])
def test_rotary_positions_equal_transformers_own(bases: dict[str, ModelConfig], grids: list[tuple[int, int]]):
    network = load_text_encoder(BaseModel(bases["edit-v2"]), "comfyui", torch.device("cpu")).network
    ids = [11, 12, 13]
    for rows, columns in grids:
        ids += [151652, *[151655] * (rows * columns // 4), 151653, 14]
    ids += [15, 16]
    input_ids, tensors = torch.tensor([ids]), [torch.tensor([[1, *grid]]) for grid in grids]
    theirs, _ = network.model.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == 151655).int(),
        image_grid_thw=torch.cat(tensors) if tensors else None,
        attention_mask=torch.ones_like(input_ids),
    )
    assert torch.equal(rotary_positions(ids, tensors), theirs[:, 0])
