"""`python -m trainer_core`, as someone without ComfyUI uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked import Forked
from tests.support.jobs import write_job
from tests.support.writers import make_writing_base
from trainer_core.__main__ import main
from trainer_core.config import ModelConfig
from trainer_core.files import read_metadata

REPO = Path(__file__).parents[2]


@pytest.fixture
def job(model: ModelConfig, tmp_path: Path) -> Path:
    """A job file with relative paths, outside the working directory."""
    return write_job(tmp_path, model, max_train_steps=2, validation={"validation_num_inference_steps": 2})


def trainer(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Forked("trainer_core", *arguments)
    out, err = program.communicate()
    assert program.returncode is not None
    return subprocess.CompletedProcess(arguments, program.returncode, out, err)


def test_check_encode_train_and_sample(job: Path) -> None:
    checked = trainer("check", job)
    assert checked.returncode == 0 and "4 pairs" in checked.stdout, checked
    command = [sys.executable, "-m", "trainer_core", "train", str(job)]  # a new Python: nothing is imported before
    trained = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1200, check=False)
    assert trained.returncode == 0, trained.stderr
    lora = Path(trained.stdout.strip())
    assert lora == job.parent / "runs" / "first" / "first.safetensors"
    assert read_metadata(lora)["ss_steps"] == "2"
    assert "step 2 of 2" in trained.stderr
    assert not [line for line in trained.stderr.splitlines() if "gemm_4bit_forward" in line]
    out = job.parent / "edited.png"
    reference = job.parent / "pairs" / "reference_1" / "000.png"
    sampled = ("sample", job, "--reference", reference, "--prompt", "x", "--lora", lora, "--out", out)
    assert trainer(*sampled).returncode == 0
    assert out.is_file()
    again = trainer(*sampled)
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr


def test_captions_are_drafted(model: ModelConfig, tmp_path: Path) -> None:
    writing = make_writing_base(tmp_path / "base", model, shouts=True)
    job = write_job(tmp_path, writing, caption_drafts={"max_tokens": 8})
    captions = tmp_path / "pairs" / "target"
    before = (captions / "000.txt").read_text()
    for key in ("001", "002"):
        (captions / f"{key}.txt").unlink()
    listed = trainer("caption", job, "--dry-run")
    assert listed.returncode == 0 and "2 pairs without a caption:\n  - 001\n  - 002\n" in listed.stdout, listed
    assert not (captions / "001.txt").exists()
    unread = trainer("caption", job, "--set", "dataset.caption_strategy=filename")
    assert unread.returncode == 0 and "Nothing to draft" in unread.stdout and not (captions / "001.txt").exists()
    drafted = trainer("caption", job)
    assert drafted.returncode == 0 and "2 captions drafted" in drafted.stdout, drafted
    assert "Drafting captions: 2 of 2" in drafted.stderr
    assert [(captions / f"{key}.txt").read_text() for key in ("000", "001", "002")] == [before, *["!!!!!!!!\n"] * 2]
    again = trainer("caption", job)
    assert again.returncode == 0 and "No pair lacks a caption" in again.stdout and "Loading" not in again.stderr
    (captions / "001.txt").unlink()
    demo = trainer("caption", job, "--set", "model.base=demo", "--set", f"model.tokenizer={writing.base}/tokenizer")
    assert demo.returncode == 1 and "The demo model can't write captions" in demo.stderr, demo


def test_all_mistakes_of_a_sample_are_in_one_report(job: Path) -> None:
    job.with_name("out.png").touch()
    reference = job.parent / "nowhere.png"
    sampled = ("sample", job, "--reference", reference, "--prompt", "x", "--lora", job, "--out", job.parent / "out.png")
    failed = trainer(*sampled)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "There are 3 problems" in failed.stderr, failed.stderr
    assert "nowhere.png" in failed.stderr and "out.png exists" in failed.stderr
    assert "job.json is not a .safetensors file" in failed.stderr
    unwritable = trainer(*sampled[:-1], job / "out.png")  # below a file
    assert "There are 3 problems" in unwritable.stderr and "needs a folder of that name" in unwritable.stderr


def test_mistakes_are_sentences(job: Path) -> None:
    settings = json.loads(job.read_text())
    (job.parent / "pairs" / "reference_1" / "002.png").unlink()
    (job.parent / "pairs" / "target" / "001.txt").write_text("\n")
    failed = trainer("encode", job)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "002" in failed.stderr and "001.txt" in failed.stderr
    job.write_text(json.dumps({**settings, "max_train_step": 3}))
    failed = trainer("train", job)
    assert failed.returncode == 1 and "Did you mean 'max_train_steps'" in failed.stderr
    job.write_text("{")
    assert "is not JSON" in trainer("check", job).stderr
    assert "No such file" in trainer("check", job.with_name("none.json")).stderr


def test_a_setting_written_as_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "job.json", "--max_train_steps", "3"])
    assert caught.value.code == 2 and "write --set NAME=VALUE" in capsys.readouterr().err
