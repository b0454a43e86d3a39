"""The demo's preset, with its pairs and its model: a few of its steps already make an edit that people see."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import ModelConfig
from trainer_core.data_sets.use import demo_data_set, pairs_of
from trainer_core.events import SampleReport, SilentObserver
from trainer_core.presets import encoding_preset, training_preset
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora

STEPS = 20  # its first validation


class Seen(SilentObserver):
    """Keeps the reports of all validations."""

    def __init__(self) -> None:
        self.samples: list[SampleReport] = []

    def on_samples(self, report: SampleReport) -> None:
        self.samples.append(report)


def test_the_first_pictures_show_the_edit(tmp_path: Path, tokenizer_dir: Path) -> None:
    model = ModelConfig(tokenizer=str(tokenizer_dir), mixed_precision="no", device="cpu")
    pairs, seen = pairs_of(demo_data_set(), ""), Seen()
    encoded = encode_dataset(pairs, BaseModel(model), encoding_preset("demo"), tmp_path / "cache")
    preset = training_preset("demo")
    places = {"run_dir": str(tmp_path / "run"), "encoded": str(encoded.manifest), "model": model}
    train_lora(dataclasses.replace(preset, max_train_steps=STEPS, **places), seen)
    (report,) = seen.samples
    assert report.step == preset.validation.validation_step_interval == STEPS
    assert report.psnr_base is not None and report.psnr_lora is not None
    assert report.psnr_base < 9 < 13 < report.psnr_lora  # the pictures after the VAE alone: 22.6
