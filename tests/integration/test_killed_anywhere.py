"""A small run ends at one file operation after the other, goes on, and gives the files of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.dies_at import DIED
from tests.support.forked import Forked
from tests.support.narrow import make_pairs
from trainer_core.config import ModelConfig, to_json
from trainer_core.files import read_metadata, read_tensors


def job_of(root: Path, pairs: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Three steps with two validations, checkpoints of all steps and an average, in root/cache and root/run."""
    return {
        "run_dir": str(root / "run"),
        "cache_dir": str(root / "cache"),
        "dataset": pairs,
        "model": to_json(model),
        "encoding": {"resolution": 96, "match_target_res": True, "num_eval_images": 1},
        "max_train_steps": 3,
        "lora": {"lora_rank": 2},
        "optimizer": {"learning_rate": 3e-3},
        "ema": {"use_ema": True},
        "checkpoints": {"checkpoint_step_interval": 1, "checkpoints_total_limit": 2},
        "validation": {"validation_step_interval": 2, "validation_num_inference_steps": 2},
    }


def run(root: Path, job: dict[str, Any], seen: list[str], *, record: bool = False) -> tuple[int, list[str]]:
    """Exit code of the process, and the lines that it wrote."""
    plan = root.with_name(f"{root.name}.json")
    plan.write_text(json.dumps({"root": str(root), "job": job, "seen": seen, "record": record}))
    process = Forked("tests.support.dies_at", plan, environment={"OMP_NUM_THREADS": "1"})
    out, err = process.communicate()
    assert process.returncode in (0, DIED), err
    return process.returncode, out.splitlines()


def files_of(root: Path) -> dict[str, Any]:
    """What the files hold that do not depend on times, by path."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    passed_over = ("/tensorboard/", "/checked/", "/run.lock")
    return {name: _content(path, root) for name, path in found.items() if not any(part in name for part in passed_over)}


def _content(path: Path, root: Path) -> Any:
    if path.suffix == ".safetensors" and len(read_metadata(path)) > 1:
        # safetensors writes several entries of a header's metadata in any order
        return read_metadata(path), {name: tensor.tolist() for name, tensor in read_tensors(path).items()}
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    text = path.read_text(encoding="utf-8").replace(str(root), "")
    rows = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_that_dies_at_its_file_operations_gives_the_same_files(model: ModelConfig, tmp_path: Path) -> None:
    """Each process ends at the first operation of a kind that none has ended at. The last one finishes the run."""
    pairs = to_json(make_pairs(tmp_path / "pairs", 3))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        root.mkdir()
    _, operations = run(whole, job_of(whole, pairs, model), [], record=True)
    seen: list[str] = []
    code = DIED
    while code == DIED:
        code, lines = run(broken, job_of(broken, pairs, model), seen)
        seen += lines
    assert set(operations) <= set(seen) and len(seen) == len(set(seen))
    assert list(broken.rglob(".*")) == []
    wanted, found = files_of(whole), files_of(broken)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []
