"""Small jobs: pairs of pictures, and the settings of a job file beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.narrow import make_pairs
from trainer_core.config import ModelConfig
from trainer_core.settings import merged


def make_job(
    folder: Path,
    base: ModelConfig,
    *,
    num_pairs: int = 4,
    sizes: tuple[tuple[int, int], ...] = ((96, 96),),
    num_references: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Write pairs to folder/pairs. Returns a job for folder/job.json that encodes them and trains one step.

    Its paths are relative to `folder`. `settings` change sections or single settings of it.
    """
    make_pairs(folder / "pairs", num_pairs, sizes, num_references)
    job = {
        "model": {"base": base.base, "flavour": base.flavour, "mixed_precision": "no", "device": "cpu"},
        "dataset": {"target_dir": "pairs/target", "reference_dirs": ["pairs/reference_1"]},
        "encoding": {"resolution": 96, "match_target_res": True, "num_eval_images": 1},
        "cache_dir": "cache",
        "run_dir": "runs/first",
        "max_train_steps": 1,
        "batching": {"gradient_accumulation_steps": 1},
        "validation": {"validation_num_inference_steps": 1},
    }
    return merged(job, settings)


def write_job(folder: Path, base: ModelConfig, **settings: Any) -> Path:
    """Write the pairs and the job of `make_job`. Returns the path of the job file."""
    path = folder / "job.json"
    path.write_text(json.dumps(make_job(folder, base, **settings)))
    return path
