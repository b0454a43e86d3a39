"""The problems in the Troubleshooting section of SimpleTuner's quickstart, reproduced with its configurations."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.quickstart import CONFIG, EDIT_V1, EDIT_V2, as_edit_v2, in_folders
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import JobConfig, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError, DatasetError, TrainerError
from trainer_core.job import encode_job, pair_job
from trainer_core.json_text import plain_json
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.simpletuner.convert import convert


def job_of(folder: Path, config: str, data: str, *changes: str) -> JobConfig:
    values = json.loads(plain_json(in_folders(data, folder / "pairs", 3)))
    changes = (f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}", *changes)
    return convert(json.loads(plain_json(config)), values, root=folder, changes=changes).job


def problems_of(job: JobConfig) -> str:
    with pytest.raises(DatasetError) as caught:
        pair_job(job)
    return str(caught.value)


def test_a_control_set_lacks_a_file_that_the_edits_have(tmp_path: Path) -> None:
    """SimpleTuner says: Control tensor list length does not match batch size."""
    job = job_of(tmp_path, as_edit_v2(CONFIG), EDIT_V2)
    (tmp_path / "pairs" / "reference_2" / "001.png").unlink()
    (tmp_path / "pairs" / "reference_3" / "000.png").rename(tmp_path / "pairs" / "reference_3" / "zero.png")
    said = problems_of(job)
    assert "001" in said and "reference_2" in said and "000" in said and "reference_3" in said
    assert "reference_1" not in said and "002" not in said


def test_a_control_set_is_empty(tmp_path: Path) -> None:
    job = job_of(tmp_path, as_edit_v2(CONFIG), EDIT_V2)
    shutil.rmtree(tmp_path / "pairs" / "reference_1")
    (tmp_path / "pairs" / "reference_1").mkdir()
    assert "reference_1" in problems_of(job)


def test_out_of_memory_during_validation(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is kept, and the error names those of SimpleTuner's recommended settings that help here."""
    from trainer_core.training import validation

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validation.Validator, "sample", exhausted)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=1,
        validation=ValidationConfig(validation_num_inference_steps=1, num_validation_images=1),
    )
    with pytest.raises(TrainerError) as caught:
        train_lora(config)
    assert all(word in str(caught.value) for word in ("validation_resolution", "base_model_precision", "memory"))
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_cache_of_embeds_that_has_no_entry(tmp_path: Path) -> None:
    """SimpleTuner says: Cache not found. Our import of its file lists the ids that exist."""
    wrong = EDIT_V1.replace('"conditioning_image_embeds": "my-reference-embeds"', '"conditioning_image_embeds": "mine"')
    with pytest.raises(
        ConfigError, match=r"conditioning_image_embeds refers to 'mine'. It must be one of my-reference-embeds"
    ):
        job_of(tmp_path, CONFIG, wrong)


def test_a_cache_of_embeds_that_was_never_made(tmp_path: Path, model: ModelConfig) -> None:
    """The same mistake in our own job file: the error lists the caches that exist."""
    smaller = ("encoding.resolution=96", "encoding.match_target_res=true", "encoding.num_eval_images=0")
    job = dataclasses.replace(job_of(tmp_path, CONFIG, EDIT_V1, *smaller), model=model)
    encode_job(job)
    assert job.dataset is not None
    asked = dataclasses.replace(job.encoding, conditioning_image_embeds="my-reference-embed", create_image_embeds=False)
    with pytest.raises(ConfigError) as caught:
        encode_dataset(pair_folders(job.dataset), BaseModel(model), asked, Path(job.cache_dir))
    said = str(caught.value)
    assert "'my-reference-embed'" in said and "my-reference-embeds" in said and "Did you mean" in said
