"""A job with several datasets on the command line: one at two resolutions, and one for validation only."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import write_job
from tests.support.narrow import make_pairs, read_rows
from trainer_core.__main__ import main
from trainer_core.conditioning.encoded import load_encoded
from trainer_core.config import ModelConfig
from trainer_core.errors import DatasetError
from trainer_core.job import encode_job, load_job, pair_job
from trainer_core.planning import report
from trainer_core.planning.duration import Speed


def part(name: str, folder: str, **settings: Any) -> dict[str, Any]:
    folders = {"target_dir": f"{folder}/target", "reference_dirs": [f"{folder}/reference_1"]}
    return {"id": name, "dataset": folders, **settings}


@pytest.fixture
def job(model: ModelConfig, tmp_path: Path) -> Path:
    """A job file with relative paths, outside the working directory."""
    make_pairs(tmp_path / "more", 2)
    parts = [
        part("small", "pairs", repeats=1),
        part("large", "pairs", encoding={"resolution": 128}, probability=0.5),
        part("held-out", "more"),
    ]
    several = {"dataset": None, "datasets": parts, "eval_dataset_id": "held-out", "encoding": {"num_eval_images": 0}}
    return write_job(tmp_path, model, num_pairs=3, max_train_steps=2, **several)


def test_check_and_train(
    job: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speed = Speed(product=1e-14, attention=1e-14, attention_backward=1e-14, vae=1e-9, is_estimate=True)
    monkeypatch.setattr(report, "probed_speed", lambda *_: speed)
    caplog.set_level(logging.INFO)
    assert main(["check", str(job)]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"# {name}\n") for name in ("small", "large", "held-out")] == [1, 1, 1]
    assert main(["train", str(job)]) == 0
    said = [message for message in caplog.messages if message.startswith(("About", "Encoding pictures"))]
    assert "estimated: 2 steps of" in said[0] and ", encoding " in said[0]
    assert len(said) > 1 and not any("About" in message for message in said[1:])
    assert Path(capsys.readouterr().out.strip()) == job.parent / "runs" / "first" / "first.safetensors"
    config = json.loads((job.parent / "runs" / "first" / "config.json").read_text())
    trained, validated = (load_encoded(Path(config[key])) for key in ("encoded", "validation_encoded"))
    assert [(each.repeats, each.probability) for each in trained.pairs] == [(1, 1.0)] * 3 + [(0, 0.5)] * 3
    assert not trained.validation_pairs and len(validated.validation_pairs) == 2 and not validated.pairs
    assert read_rows(job.parent / "runs" / "first" / "metrics.jsonl")[-1]["validation_loss"] > 0
    assert main(["encode", str(job)]) == 0
    assert capsys.readouterr().out.split() == [config["encoded"], config["validation_encoded"]]


def test_one_of_the_datasets_is_no_mix_and_without_eval_pairs_are_held_out_of_each(job: Path) -> None:
    values = json.loads(job.read_text())
    del values["eval_dataset_id"]
    values["encoding"]["num_eval_images"] = 1
    job.write_text(json.dumps(values))
    encoded, validation = encode_job(load_job(job))
    assert validation is None
    assert (len(encoded.pairs), len(encoded.validation_pairs)) == (2 + 2 + 1, 3)


def test_a_job_of_text_to_image_says_that_it_learns_no_edits(
    model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = write_job(tmp_path, model, dataset={"reference_dirs": []})
    assert main(["plan", str(job)]) == 0 and "trains text-to-image and no edits" in capsys.readouterr().out
    assert main(["train", str(job)]) == 0 and "trains text-to-image and no edits" in caplog.text
    assert (tmp_path / "runs" / "first" / "first.safetensors").is_file()


def test_problems_of_all_datasets_come_at_once(job: Path) -> None:
    (job.parent / "pairs" / "reference_1" / "001.png").unlink()
    (job.parent / "more" / "target" / "000.txt").write_text("\n")
    with pytest.raises(DatasetError) as caught:
        pair_job(load_job(job))
    assert len(caught.value.problems) == 3, caught.value
    assert any(each.startswith("held-out: ") and "000.txt" in each for each in caught.value.problems)
    assert all(any(each.startswith(f"{name}: ") for each in caught.value.problems) for name in ("small", "large"))
