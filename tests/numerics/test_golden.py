"""Pins the loss curve of a run: a change that is not meant to alter the computation must not move it.

To change the curve on purpose, run `python -m tests.numerics.test_golden`, which rewrites tests/golden/loss_curve.json,
and commit that file alone, so that the commit shows the curve before and after.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.support.narrow import make_base, make_pairs, read_rows, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import BatchingConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig, ValidationConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curve.json"


def curve(model: ModelConfig, folder: Path) -> list[list[float]]:
    """Loss and gradient norm of each of twenty steps, then the final validation loss."""
    dataset = pair_folders(make_pairs(folder / "pairs", 6, ((96, 96), (128, 96))))
    encoded = encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=2), folder / "cache")
    result = train_lora(
        TrainConfig(
            run_dir=str(folder / "run"),
            encoded=str(encoded.manifest),
            model=model,
            max_train_steps=20,
            seed=1,
            lora=LoraConfig(lora_rank=4, lora_targets="attention-mlp"),
            optimizer=OptimizerConfig(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=3),
            batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=2),
            validation=ValidationConfig(validation_step_interval=0, num_validation_images=0),
        )
    )
    rows = read_rows(result.run_dir / "metrics.jsonl")
    return [[row["loss"], row["grad_norm"]] for row in rows] + [[rows[-1]["validation_loss"], 0.0]]


def test_the_loss_curve_is_the_pinned_one(model: ModelConfig, tmp_path: Path) -> None:
    pinned = json.loads(GOLDEN.read_text())
    measured = curve(model, tmp_path)
    # float32 sums differ in their last bits between processors (AVX2, AVX-512); a changed computation by about 1e-3
    assert measured == [pytest.approx(row, rel=1e-5) for row in pinned]


if __name__ == "__main__":
    from tools.comfyui import comfyui_dir

    with tempfile.TemporaryDirectory() as place:
        tokenizer = comfyui_dir() / "comfy" / "text_encoders" / "qwen25_tokenizer"
        model = make_base(Path(place) / "base", tokenizer)
        GOLDEN.write_text(json.dumps(curve(model, Path(place)), indent=1) + "\n")
