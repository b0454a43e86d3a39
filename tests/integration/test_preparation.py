"""Each fact about a run is determined once, however many parts of the program need it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.narrow import make_pairs
from trainer_core.__main__ import main
from trainer_core.adapters import plan as adapter_plan
from trainer_core.config import ModelConfig, layer_patterns
from trainer_core.qwen_image import base_model
from trainer_core.runs import folder as run_folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each fact is determined."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counted[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counting)

    for name in ("model_folder", "transformer_settings", "_check_flavour", "empty_transformer"):
        count(base_model, name)
    count(layer_patterns, "_pattern")
    layer_patterns._parsed.cache_clear()
    original_read = Path.read_text

    def read_text(path: Path, *arguments: Any, **named: Any) -> str:
        counted["run.json"] += path.name == "run.json"
        return original_read(path, *arguments, **named)

    monkeypatch.setattr(run_folder.Path, "read_text", read_text)
    plan = "trainer_core.planning.preparation.plan_adapter"
    original_plan = adapter_plan.plan_adapter
    monkeypatch.setattr(plan, lambda *a: (counted.update(["plan_adapter"]), original_plan(*a))[1])
    return counted


def test_every_fact_of_a_run_is_found_out_once(
    model: ModelConfig, tmp_path: Path, calls: Counter[str], write_job: Callable[..., Path]
) -> None:
    """One command encodes and trains two steps; a second one continues with one more step."""
    job = write_job(model, rank_pattern=["0 = 2"])
    assert main(["train", str(job)]) == 0
    once = ("model_folder", "transformer_settings", "_check_flavour", "empty_transformer", "plan_adapter", "_pattern")
    assert {name: calls[name] for name in once} == dict.fromkeys(once, 1)
    assert calls["run.json"] == 0  # the process that wrote it knows its content
    calls.clear()
    assert main(["train", str(job), "--set", "max_train_steps=3"]) == 0
    # By the checks before encoding, and by the training before and after locking, as the folder may change in between.
    assert calls["run.json"] <= 4
    assert {name: calls[name] for name in once[:5]} == dict.fromkeys(once[:5], 1)


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    def write(model: ModelConfig, **lora: Any) -> Path:
        folders = make_pairs(tmp_path / "pairs", 3)
        values = {
            "model": {"base": model.base, "flavour": model.flavour, "mixed_precision": "no", "device": "cpu"},
            "dataset": {"target_dir": folders.target_dir, "reference_dirs": list(folders.reference_dirs)},
            "encoding": {"resolution": 96, "num_eval_images": 1, "match_target_res": True},
            "validation": {"num_validation_images": 0},
            "lora": {"lora_rank": 4, **lora},
            "cache_dir": str(tmp_path / "cache"),
            "run_dir": str(tmp_path / "run"),
            "max_train_steps": 2,
        }
        values["model"]["tokenizer"] = model.tokenizer
        path = tmp_path / "job.json"
        path.write_text(json.dumps(values))
        return path

    return write
