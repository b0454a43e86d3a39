"""LoRAs of validated steps: which are kept, which is the best, and that a run which goes on keeps the same ones."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import PauseAt, equal, lora_tensors, twelve_steps
from trainer_core import results as results_module
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import EmaConfig, ModelConfig
from trainer_core.errors import DiskError
from trainer_core.events import SampleReport, SilentObserver
from trainer_core.files import read_metadata, read_tensors, write_tensors
from trainer_core.run import TrainResult, train_lora
from trainer_core.runs.step_loras import best_of, delete_old, results_header, step_folder, step_loras


def keep(
    samples: Path, step: int, psnr: float | None = None, loss: float | None = None, shift: float | None = None
) -> Path:
    path = step_folder(samples, step) / "lora.safetensors"
    drift = {} if shift is None else {"drift_shift": shift, "drift_zoom": 0.1, "drift_colour": 1.0}
    write_tensors(path, {"a": torch.zeros(1)}, {"format": "pt", **results_header(psnr, loss, drift)})
    return path


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ({1: (20.0, 0.1), 2: (22.5, 0.3), 3: (21.0, 0.2)}, 2),  # by PSNR, whatever the loss
        ({1: (22.0, 0.1, 0.5), 2: (22.05, 0.1, 0.9), 3: (22.09, 0.1, 0.6)}, 1),  # nearly equal: by drift
        ({1: (22.0, 0.1, 0.5), 2: (22.05, 0.1, None)}, 2),  # drift was not always measured
        ({1: (None, 0.3), 2: (None, 0.1), 3: (None, 0.2)}, 2),  # without PSNR by loss
        ({1: (20.0, 0.101), 2: (None, 0.1)}, 1),  # a step that was not compared does not win
        ({1: (20.0, 0.1), 2: (20.0, 0.1)}, 2),
        ({1: (math.inf, 0.1), 2: (20.0, 0.1)}, 1),
        ({1: (math.nan, 0.1), 2: (5.0, 0.1)}, 2),
        ({1: (None, None)}, None),
    ],
)
def test_the_best_step(results: dict[int, Any], best: int | None, tmp_path: Path) -> None:
    for step, measured in results.items():
        keep(tmp_path, step, *measured)
    found = best_of(step_loras(tmp_path))
    assert (found and found.step) == best


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """A later step, which a killed run had reached, does not count. Pictures stay."""
    files = {step: keep(tmp_path, step, psnr=10.0 + 10 * (step == 2)) for step in (1, 2, 3, 4, 5, 6)}
    files[1].with_name("0-lora.png").write_bytes(b"picture")
    delete_old(tmp_path, 5, 2)
    assert [each.step for each in step_loras(tmp_path)] == [2, 4, 5, 6]
    assert files[1].with_name("0-lora.png").exists()
    files[2].write_bytes(files[2].read_bytes()[:-1])  # a damaged file is nobody's best
    assert [each.step for each in step_loras(tmp_path)] == [4, 5, 6]


class Reports(SilentObserver):
    def __init__(self) -> None:
        self.samples: list[SampleReport] = []
        self.notes: list[str] = []

    def on_samples(self, report: SampleReport) -> None:
        self.samples.append(report)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def often(encoded: EncodedDataset, model: ModelConfig, run_dir: Path, limit: int) -> Any:
    config = twelve_steps(encoded, model, run_dir)
    validation = dataclasses.replace(
        config.validation, validation_step_interval=2, validation_loras_total_limit=limit, validation_resolution="64"
    )
    return dataclasses.replace(config, validation=validation)


def test_a_run_keeps_the_weights_that_its_validations_show(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    """Of the last two steps and of the best one, also the average; each with its step and results in its header."""
    config = dataclasses.replace(
        often(encoded, model, tmp_path / "run", 2), ema=EmaConfig(use_ema=True, ema_validation="comparison")
    )
    observer = Reports()
    result = train_lora(config, observer)
    psnr = {report.step: report.psnr_lora for report in observer.samples}
    assert list(psnr) == [2, 4, 6, 8, 10, 12]
    kept = step_loras(tmp_path / "run" / "samples")
    assert {each.step: each.psnr for each in kept} == {each.step: psnr[each.step] for each in kept}
    found = best_of(kept)
    assert found is not None
    assert [each.step for each in kept] == sorted({10, 12, found.step})
    assert result.lora_file is not None
    assert result.ema_file is not None
    for file, exported, title in zip(
        kept[-1].files, (result.lora_file, result.ema_file), ("run-step-12", "run-ema-step-12"), strict=True
    ):
        assert equal(read_tensors(file), read_tensors(exported))
        header, wanted = read_metadata(file), read_metadata(exported)
        wanted = {name: text for name, text in wanted.items() if "strength" not in name and "usage" not in name}
        assert header["modelspec.title"] == header["ss_output_name"] == title
        assert header["ss_steps"] == "12"
        assert header.items() >= {**wanted, "modelspec.title": title, "ss_output_name": title}.items()


def test_a_run_that_goes_on_keeps_the_same_loras(
    encoded: EncodedDataset, model: ModelConfig, unbroken: TrainResult, tmp_path: Path
) -> None:
    """Also if it began without them, as runs of older versions did. They change nothing of the result."""
    config = twelve_steps(encoded, model, tmp_path / "run")
    without = dataclasses.replace(config.validation, validation_loras_total_limit=0, keep_best=False)
    train_lora(dataclasses.replace(config, validation=without), PauseAt(6))
    assert step_loras(tmp_path / "run" / "samples") == []
    train_lora(config, PauseAt(11))
    result = train_lora(config)
    assert equal(lora_tensors(result), lora_tensors(unbroken))
    first, second = (step_loras(each.run_dir / "samples") for each in (unbroken, result))
    assert [each.step for each in first] == [5, 10, 12]
    assert [each.step for each in second] == [10, 12]
    for one, other in zip(first[1:], second, strict=True):
        assert (one.psnr, one.loss) == (other.psnr, other.loss)
        assert read_metadata(one.files[0]) == read_metadata(other.files[0])
        assert equal(read_tensors(one.files[0]), read_tensors(other.files[0]))


def test_a_full_disk_does_not_stop_a_run(
    encoded: EncodedDataset, model: ModelConfig, unbroken: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = results_module.export_lora

    def full(tensors: Any, path: Path, *more: Any) -> Path:
        if path.parent.name.startswith("step-"):
            raise DiskError("The disk is full", 28)
        return export(tensors, path, *more)

    monkeypatch.setattr(results_module, "export_lora", full)
    observer = Reports()
    result = train_lora(twelve_steps(encoded, model, tmp_path / "run"), observer)
    assert [note for note in observer.notes if "not kept" in note] == [
        f"The LoRA of step {step} is not kept: The disk is full" for step in (5, 10, 12)
    ]
    assert equal(lora_tensors(result), lora_tensors(unbroken))
