"""`check` refuses whatever `encode` or `train` refuses, with the same message, and lists all problems at once."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.jobs import make_job
from trainer_core.__main__ import main
from trainer_core.config import JobConfig, ModelConfig
from trainer_core.errors import DatasetError, JobError
from trainer_core.job import check_job, encode_parts, load_job, resolve_job
from trainer_core.planning.workload import pictures_in_prompt, workload_of_encoded, workload_of_pairs
from trainer_core.precision import quantise
from trainer_core.settings import from_json, merged


@pytest.fixture
def values(model: ModelConfig, tmp_path: Path) -> dict[str, Any]:
    """A job of four pairs without faults. Its folders are below `tmp_path`."""
    return make_job(tmp_path, model, num_references=2)


def of_two_parts(**second: Any) -> dict[str, Any]:
    """Settings of a job with two datasets, whose second differs."""
    folders = {"target_dir": "pairs/target", "reference_dirs": ["pairs/reference_1"]}
    parts = [{"id": "first", "dataset": folders}, {"id": "second", "dataset": folders, **second}]
    return {"dataset": None, "datasets": parts}


def without_the_tokenizer(folder: Path, values: dict[str, Any]) -> None:
    shutil.copytree(values["model"]["base"], folder / "base", symlinks=True)
    shutil.rmtree(folder / "base" / "tokenizer")
    values["model"]["base"] = "base"


def with_a_folder_that_is_no_run(folder: Path, _values: dict[str, Any]) -> None:
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "holiday.txt").write_text("mine")


def with_a_run_of_other_settings(folder: Path, _values: dict[str, Any]) -> None:
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "run.json").write_text(json.dumps({"key": {"seed": 7}, "state": "started"}))


def with_a_placeholder(folder: Path, _values: dict[str, Any]) -> None:
    (folder / "pairs" / "target" / "001.txt").write_text("put <|image_pad|> here")


def without_a_reference(folder: Path, _values: dict[str, Any]) -> None:
    (folder / "pairs" / "reference_1" / "002.png").unlink()


def with_another_vae(folder: Path, _values: dict[str, Any]) -> None:
    save_file({"weight": torch.zeros(2)}, folder / "wrong.safetensors")


def with_a_pointer(folder: Path, _values: dict[str, Any]) -> None:
    (folder / "wrong.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def with_a_long_caption(folder: Path, _values: dict[str, Any]) -> None:
    (folder / "pairs" / "target" / "001.txt").write_text("brighter " * 1500)


PREPARE: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "tokenizer": without_the_tokenizer,
    "no run": with_a_folder_that_is_no_run,
    "other settings": with_a_run_of_other_settings,
    "placeholder": with_a_placeholder,
    "pairing": without_a_reference,
    "VAE": with_another_vae,
    "text encoder": with_a_pointer,
    "transformer": with_a_pointer,
    "long caption": with_a_long_caption,
}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "held out": ({"encoding": {"num_eval_images": 4}}, "num_eval_images must be less than"),
    "all held out": ({"encoding": {"num_eval_images": -1}}, "no pairs to train on"),
    "too small": ({"encoding": {"sizes": {"minimum_image_size": 200}}}, "4 targets are smaller than minimum_image"),
    "references": (
        {"dataset": {"reference_dirs": ["pairs/reference_1", "pairs/reference_2"]}},
        "Qwen-Image-Edit (edit-v1) takes 1",
    ),
    "image embeds": ({"encoding": {"conditioning_image_embeds": "none-such"}}, "no cache exists yet"),
    "base": ({"model": {"base": "nowhere"}}, "does not exist"),
    "flavour": ({"model": {"flavour": "edit-v3"}}, "Choose Qwen-Image-Edit (edit-v1)"),
    "device": ({"model": {"device": "cuda:77"}}, "cuda:77"),
    "adapter": ({"lora": {"lora_targets": "pattern", "lora_target_pattern": "no"}}, "matches no layer"),
    "started from": ({"lora": {"init_lora": "none.safetensors"}}, "none.safetensors"),
    "compiler": ({"memory": {"compile_blocks": "on"}}, "needs a CUDA device"),
    "precision": ({"model": {"text_encoder_precision": "nf4-bnb"}}, "needs the package bitsandbytes"),
    "mixed": (of_two_parts(encoding={"preprocessing": "diffusers"}), "Encode both with the same"),
    "not trained": (of_two_parts(probability=0) | {"encoding": {"num_eval_images": -1}}, "no pair to train on"),
    "tokenizer": ({}, "The tokenizer folder"),
    "no run": ({}, "is not a run: run.json is missing"),
    "other settings": ({}, "was started with other settings"),
    "placeholder": ({}, "a picture placeholder"),
    "pairing": ({}, "002"),
    "VAE": ({"model": {"vae_file": "wrong.safetensors"}}, "wrong.safetensors"),
    "text encoder": ({"model": {"text_encoder_file": "wrong.safetensors"}}, "wrong.safetensors"),
    "transformer": ({"model": {"transformer_file": "wrong.safetensors"}}, "wrong.safetensors"),
    "long caption": ({}, "tokenizer_max_length"),
    "name": ({"run_dir": f"runs/{'x' * 250}"}, "the LoRA file gets this name"),
    "cache name": ({"cache_dir": "c" * 300}, "is too long"),
    "cache below a file": ({"cache_dir": "job.json/cache"}, "job.json is a file"),
    "LoRA name": ({"export": {"lora_name": "ß" * 125}}, "the LoRA file gets this name"),
}
ONLY_WHERE_IT_TRAINS = {"all held out", "compiler", "no run", "other settings"}  # these can be encoded


def said_by(command: str, job: Path, caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
    caplog.clear()
    code = main([command, str(job)])
    return code, caplog.text.partition("ERROR")[2]


@pytest.mark.parametrize("fault", FAULTS)
def test_check_refuses_what_encode_and_train_refuse(
    fault: str,
    values: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    changes, words = FAULTS[fault]
    values = merged(values, changes)
    PREPARE.get(fault, lambda *_: None)(tmp_path, values)
    real = quantise.find_spec
    monkeypatch.setattr(quantise, "find_spec", lambda name: None if "bitsandbytes" in name else real(name))
    job = tmp_path / "job.json"
    job.write_text(json.dumps(values))
    trained = said_by("train", job, caplog)
    assert trained[0] == 1 and words in trained[1], trained
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "it was encoded before it was refused"
    assert said_by("check", job, caplog) == trained
    if fault not in ONLY_WHERE_IT_TRAINS:
        assert said_by("encode", job, caplog) == trained
    assert said_by("plan", job, caplog)[0] == 1


def test_memory_settings_that_never_fit_are_refused_before_encoding(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    job, says = (
        tmp_path / "job.json",
        "The run does not fit into memory. With the smallest memory settings it still needs",
    )
    job.write_text(json.dumps(merged(values, {"memory": {"vram_gib": 0.5}})))
    for command in ("train", "check"):
        code, said = said_by(command, job, caplog)
        assert code == 1 and says in said, (command, said)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert said_by("plan", job, caplog)[0] == 1
    assert capsys.readouterr().out.count(says) == 1
    assert said_by("encode", job, caplog)[0] == 0, "it may be trained on another machine"


def test_prompts_may_be_shorter_than_estimated(values: dict[str, Any], tmp_path: Path) -> None:
    """What is refused before encoding would not fit with the real lengths either."""
    for text in ("x", "brighter " * 100, " " * 900 + "x", "亮" * 300, "internationalization " * 40):
        (tmp_path / "pairs" / "target" / "000.txt").write_text(text, encoding="utf-8")
        job = resolve_job(from_json(JobConfig, values), tmp_path)
        checked = check_job(job)
        checked.raise_problems()
        parts = [part for _, part in checked.planned]
        least = workload_of_pairs(parts, job.batching, job.validation, pictures_in_prompt)
        encoded, _ = encode_parts(job, checked.planned)
        real = workload_of_encoded(encoded, job.batching, job.validation, encoded)
        assert least.train.text_tokens <= real.train.text_tokens
        assert least.train.image_tokens == real.train.image_tokens


def test_all_problems_come_at_once(values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {
        "encoding": {"sizes": {"minimum_image_size": 200}, "conditioning_image_embeds": "none-such"},
        "memory": {"compile_blocks": "on"},
        "lora": {"init_lora": "none.safetensors"},
    }
    job = tmp_path / "job.json"
    job.write_text(json.dumps(merged(values, changes)))
    with_a_folder_that_is_no_run(tmp_path, {})
    checked = check_job(load_job(job))
    with pytest.raises(JobError, match="There are 4 problems") as caught:
        checked.raise_problems()
    wanted = ("compile_blocks", "none.safetensors", "minimum_image_size", "none-such")
    assert all(word in str(error) for word, error in zip(wanted, caught.value.errors, strict=True)), caught.value
    assert main(["train", str(job)]) == 1
    assert all(word in caplog.text for word in wanted)


def test_a_problem_names_its_dataset(values: dict[str, Any], tmp_path: Path) -> None:
    parts = of_two_parts(encoding={"num_eval_images": 4})
    job = tmp_path / "job.json"
    job.write_text(json.dumps(merged(values, parts)))
    with pytest.raises(DatasetError, match=r"^second: num_eval_images must be less"):
        check_job(load_job(job)).raise_problems()


def test_a_problem_of_two_datasets_names_both(values: dict[str, Any], tmp_path: Path) -> None:
    parts = of_two_parts() | {"encoding": {"sizes": {"minimum_image_size": 200}}}
    job = tmp_path / "job.json"
    job.write_text(json.dumps(merged(values, parts)))
    with pytest.raises(DatasetError, match=r"^first, second: 4 targets are smaller than minimum_image"):
        check_job(load_job(job)).raise_problems()


def test_check_and_plan_say_why_a_run_will_not_be_measured(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(merged(values, {"validation": {"validation_resolution": "64x128"}})))
    assert main(["check", str(job)]) == 0
    (reason,) = [line for line in caplog.messages if "can't be compared with their targets" in line]
    assert reason.startswith("1 of 1 validation pictures") and "a picture is 64 x 128, its target 96 x 96" in reason
    for command in (["plan", str(job)], ["plan", str(job), "--vram", "24"]):
        main(command)
        assert reason in capsys.readouterr().out
    caplog.clear()
    assert main(["train", str(job)]) == 0
    assert caplog.messages.count(reason) == 1, "before encoding; not again when the training starts"


@pytest.mark.parametrize("changes", [{}, of_two_parts()])
def test_problems_come_with_the_files_that_are_not_used(
    changes: dict[str, Any], values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_a_reference(tmp_path, values)
    (tmp_path / "pairs" / "reference_1" / "002.heic").write_bytes(b"x")
    job = tmp_path / "job.json"
    job.write_text(json.dumps(merged(values, changes)))
    for command in ("check", "plan", "encode", "train"):
        code, said = said_by(command, job, caplog)
        assert code == 1 and said.count("1 .heic file not used (002.heic), because") == (2 if changes else 1)


def test_a_good_job_is_not_refused_and_check_writes_no_entry(values: dict[str, Any], tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps(values))
    assert main(["check", str(job)]) == 0
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["checked"]
    checked = check_job(load_job(job))
    assert main(["train", str(job)]) == 0
    manifests = [path.stem for path in (tmp_path / "cache" / "datasets").iterdir()]
    assert manifests == [dataset.encoded().manifest.stem for _, dataset in checked.planned]
    assert main(["check", str(job)]) == 0  # a finished run is no problem
