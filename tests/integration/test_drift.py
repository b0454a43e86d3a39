"""The drift score of a run appears in its metrics, in TensorBoard and in the report of its sample pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.narrow import read_rows
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import LoraConfig, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.run import find_result, train_lora
from trainer_core.training import validation_pictures


def test_a_known_drift_is_in_every_report(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = encoded.load_pictures(encoded.validation_pairs[0])[0].float() / 255
    moved = torch.roll(target, (1, 2), (1, 2)) * 0.9

    def decode(_vae: Any, _latents: torch.Tensor) -> torch.Tensor:
        return moved

    monkeypatch.setattr(validation_pictures, "decode_latents", decode)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=2,
        lora=LoraConfig(lora_rank=2),
        validation=ValidationConfig(
            validation_step_interval=0, validation_num_inference_steps=1, num_validation_images=1
        ),
    )
    samples = train_lora(config).samples
    assert samples is not None and samples.drift_shift is not None
    assert samples.drift_shift == pytest.approx(5**0.5, abs=0.3)
    assert samples.drift_colour == pytest.approx(float(target.mean()) * 25.5, abs=8)
    assert f"Drift, the change outside the edit (less is better): {samples.drift_shift:.2f} px, " in samples.as_text()
    first, last = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert "drift_shift" not in first
    assert {name: last[name] for name in samples.drift()} == samples.drift()
    found = find_result(config)
    assert found is not None and found.samples == samples
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    assert all(name.encode() in events.read_bytes() for name in samples.drift())
