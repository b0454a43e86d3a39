"""The demo's preset, with its pairs and its model: a few of its steps already make an edit that people see."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest

from tests.support.runs import named
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import MatmulPrecision, ModelConfig, TrainConfig
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TrainConfig:
    """The preset's first steps on the demo's pairs, in a run folder that is still empty."""
    folder, pairs = tmp_path_factory.mktemp("demo"), pairs_of(demo_data_set(), "")
    model = ModelConfig(tokenizer=str(tokenizer_dir), mixed_precision="no", device="cpu")
    encoded = encode_dataset(pairs, BaseModel(model), encoding_preset("demo"), folder / "cache")
    places = {"run_dir": str(folder / "run"), "encoded": str(encoded.manifest), "model": model}
    return dataclasses.replace(training_preset("demo"), max_train_steps=STEPS, **places)


def report_of(run: TrainConfig) -> SampleReport:
    seen = Seen()
    train_lora(run, seen)
    (report,) = seen.samples
    assert report.step == run.validation.validation_step_interval == STEPS
    return report


def test_the_first_pictures_show_the_edit(run: TrainConfig) -> None:
    report = report_of(run)
    assert report.psnr_base is not None and report.psnr_lora is not None
    assert report.psnr_base < 9 < 13 < report.psnr_lora  # the pictures after the VAE alone: 22.6


def test_8_bit_products_learn_as_much(run: TrainConfig) -> None:
    """The edit's pictures after as many steps are as near to their targets, up to 0.3 dB."""
    validation, found = dataclasses.replace(run.validation, num_validation_images=2), []
    for products in get_args(MatmulPrecision)[1:]:
        model = dataclasses.replace(run.model, base_model_precision="int8-quanto", matmul_precision=products)
        report = report_of(named(run, products, model=model, validation=validation))
        assert report.psnr_base is not None and report.psnr_lora is not None
        assert report.psnr_lora > report.psnr_base + 3  # something was learned
        found.append(report.psnr_lora)
    assert found[0] != found[1] == pytest.approx(found[0], abs=0.3)
