"""The noise levels that the transformer is told in bfloat16: in training, rollouts, validation and previews."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import (
    BatchingConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    Preprocessing,
    RolloutConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.sampling import load_scheduler, sigma_schedule
from trainer_core.rng import stream
from trainer_core.run import train_lora
from trainer_core.training.objective import draw_sigma
from trainer_core.training.rollout import draw_offsets, rollout_sigmas
from trainer_core.training.validation import LOSS_SIGMAS

STEPS, TOKENS, SEED = 3, 36, 4
ROLLOUT = RolloutConfig(
    scheduled_sampling_max_step_offset=8,
    scheduled_sampling_probability=1.0,
    scheduled_sampling_sampler="euler",
    scheduled_sampling_reflexflow=False,
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the time projection of any transformer gets from now on."""
    seen: list[Tensor] = []
    forward = Timesteps.forward
    monkeypatch.setattr(Timesteps, "forward", lambda self, levels: seen.append(levels.clone()) or forward(self, levels))
    return seen


def run(model: ModelConfig, preprocessing: Preprocessing, folder: Path) -> None:
    """Three steps in bf16 with a rollout in each, and a validation with a preview at the end."""
    dataset = pair_folders(make_pairs(folder / "pairs", 3))
    encoding = small_encoding(preprocessing=preprocessing)
    encoded = encode_dataset(dataset, BaseModel(model), encoding, folder / "cache")
    train_lora(
        TrainConfig(
            run_dir=str(folder / "run"),
            encoded=str(encoded.manifest),
            model=dataclasses.replace(model, mixed_precision="bf16"),
            max_train_steps=STEPS,
            seed=SEED,
            lora=LoraConfig(lora_rank=2, lora_targets="attention"),
            batching=BatchingConfig(train_batch_size=1, gradient_accumulation_steps=1),
            rollout=ROLLOUT,
            validation=ValidationConfig(validation_num_inference_steps=3, num_validation_images=1),
        )
    )


def exact_levels() -> tuple[list[float], list[float]]:
    """The levels of the turns with their rollouts, and those of the validation's losses and previews."""
    training: list[float] = []
    for index, offset in enumerate(draw_offsets(ROLLOUT, 0, SEED, range(STEPS))):
        sigma = float(draw_sigma(NoiseConfig(), TOKENS, stream(SEED, "sigma", index)))
        training += rollout_sigmas(sigma, offset)
    schedule = sigma_schedule(load_scheduler(Path("none")), 3, TOKENS)[:-1].tolist()
    return training, [*LOSS_SIGMAS, *schedule]


def test_comfyui_is_told_every_level_exactly(model: ModelConfig, told: list[Tensor], tmp_path: Path):
    run(model, "comfyui", tmp_path)
    training, validation = exact_levels()
    assert all(levels.dtype == torch.float32 for levels in told)
    found = set(torch.cat(told).tolist())
    assert found == set(torch.tensor([*training, *validation]).tolist())
    assert len(set(training)) > STEPS + 8, "no rollout"
    rounded = torch.tensor(training).bfloat16().unique()
    assert len(rounded) <= len(set(training)) / 2, "bfloat16 would tell these levels apart too"


def test_diffusers_rounds_every_level_as_its_pipelines(model: ModelConfig, told: list[Tensor], tmp_path: Path):
    run(model, "diffusers", tmp_path)
    exact = torch.tensor([level for levels in exact_levels() for level in levels])
    assert all(levels.dtype == torch.bfloat16 for levels in told)
    assert set(torch.cat(told).tolist()) == set(((exact * 1000).bfloat16() / 1000).tolist())
