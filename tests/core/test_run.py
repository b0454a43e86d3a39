"""train_lora without training: an ended run returns its stored result, and a refused run leaves no folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from trainer_core import run as run_module
from trainer_core.config import EmaConfig, ModelConfig, TrainConfig, resume_key, to_json
from trainer_core.errors import DatasetError
from trainer_core.events import Stop
from trainer_core.files import write_tensors
from trainer_core.run import train_lora
from trainer_core.runs.folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Config of a run whose pairs and base model don't exist, so that reading either is an error."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(tmp_path / "pairs.json"),
        model=ModelConfig(base=str(tmp_path / "no model")),
        max_train_steps=5,
    )


def ended(config: TrainConfig, steps: int, *, kept: bool) -> Path:
    """Makes the folder of a run that ended. Returns its LoRA file."""
    with RunFolder.open(Path(config.run_dir), resume_key(config)) as run:
        lora = run.path / "run.safetensors"
        write_tensors(lora, {"weight": torch.zeros(1)})
        result = {"lora_file": lora.name, "steps": steps, "kept": kept, "export": to_json(config.export)}
        run.write_state(state="finished", steps=steps, result=result)
    return lora


@pytest.mark.parametrize(("steps", "stopped"), [(5, Stop.NO), (3, Stop.KEEP)])
def test_a_run_that_ended_is_answered_from_its_folder(
    steps: int, stopped: Stop, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "prepare_training", lambda *_, **__: pytest.fail("it was prepared"))
    lora = ended(config, steps, kept=stopped is Stop.KEEP)
    before = {path: path.stat().st_mtime_ns for path in lora.parent.rglob("*")}
    found = train_lora(config)
    assert (found.run_dir, found.steps_done, found.stopped) == (lora.parent, steps, stopped)
    assert (found.lora_file, found.ema_file, found.samples) == (lora, None, None)
    assert {path: path.stat().st_mtime_ns for path in lora.parent.rglob("*")} == before


def test_it_is_prepared_where_the_folder_is_no_answer(config: TrainConfig) -> None:
    """Training is prepared if the run has too many steps, needs an EMA, goes on after a kept end, or lost its file."""
    lora = ended(config, 3, kept=True)
    longer, averaged = (
        dataclasses.replace(config, **each) for each in ({"max_train_steps": 2}, {"ema": EmaConfig(use_ema=True)})
    )
    for wanted, continue_kept in ((longer, False), (averaged, False), (config, True)):
        with pytest.raises(DatasetError):
            train_lora(wanted, continue_kept=continue_kept)
    lora.unlink()
    with pytest.raises(DatasetError):
        train_lora(config)


def test_a_run_without_pairs_makes_no_folder(config: TrainConfig) -> None:
    with pytest.raises(DatasetError, match="pairs"):
        train_lora(config)
    assert not Path(config.run_dir).exists()
