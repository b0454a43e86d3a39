"""The edit-aware loss weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.narrow import read_rows
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import ModelConfig, NoiseConfig, TrainConfig, ValidationConfig
from trainer_core.errors import ConfigError
from trainer_core.run import train_lora
from trainer_core.training.edit_weight import FLOOR, combined_weights, edit_weight_preview, edit_weights


def edited() -> tuple[torch.Tensor, torch.Tensor]:
    """Target and reference latents [2, 16, 12, 12]: the first pair differs in a corner, the second not at all."""
    reference = torch.randn(2, 16, 12, 12)
    target = reference.clone()
    target[0, :, :4, :4] += 2
    return target, reference


def test_weights_are_large_where_the_edit_is() -> None:
    target, reference = edited()
    assert torch.equal(edit_weights(target, reference, 0.0), torch.ones(2, 1, 12, 12))
    weights = edit_weights(target, reference, 1.0)
    assert weights.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert float(weights[0, 0, 8, 8] / weights[0, 0, 1, 1]) == pytest.approx(FLOOR, abs=1e-5)
    assert torch.allclose(weights[1], torch.ones(1))
    half = edit_weights(target, reference, 0.5)
    assert torch.allclose(half, 0.5 + 0.5 * weights)


def test_other_sizes_and_shapes_and_masks() -> None:
    target, reference = edited()
    larger = torch.nn.functional.interpolate(reference, scale_factor=2, mode="nearest")
    assert float(edit_weights(target, larger, 1.0)[0, 0, 1, 1]) > 2
    assert torch.equal(edit_weights(target, reference[..., :6], 1.0), torch.ones(2, 1, 12, 12))
    mask = torch.zeros(2, 1, 12, 12)
    mask[..., :6] = 2
    both = combined_weights(target, (reference,), mask, 1.0)
    assert both is not None and not both[..., 6:].any()
    assert both.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert combined_weights(target, (reference,), mask, 0.0) is mask
    assert combined_weights(target, (), None, 1.0) is None


def test_a_run_follows_it_and_the_preview_shows_it(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> None:
    losses = []
    for strength in (0.0, 1.0):
        config = TrainConfig(
            run_dir=str(tmp_path / f"{strength}"),
            encoded=str(encoded.manifest),
            model=model,
            max_train_steps=1,
            noise=NoiseConfig(edit_weight=strength),
            validation=ValidationConfig(num_validation_images=0),
        )
        losses.append(read_rows(train_lora(config).run_dir / "metrics.jsonl")[0]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.5)
    assert edit_weight_preview(encoded, 1.0, max_pairs=2).width > 160
    with pytest.raises(ConfigError, match="edit_weight must be 0 to 1, got 2"):
        NoiseConfig(edit_weight=2)
