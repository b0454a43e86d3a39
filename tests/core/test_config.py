"""Settings: strict, checked early, and clear about what is wrong."""

from __future__ import annotations

import dataclasses

import pytest

from trainer_core.config import (
    DatasetConfig,
    EncodingConfig,
    JobConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    digest,
    from_json,
    resume_key,
    to_json,
)
from trainer_core.errors import ConfigError

JOB = {
    "model": {"flavour": "edit-v2"},
    "dataset": {"target_dir": "after", "reference_dirs": ["before"]},
    "cache_dir": "cache",
    "run_dir": "run",
}


def test_json_round_trip() -> None:
    job = from_json(JobConfig, JOB)
    assert from_json(JobConfig, to_json(job)) == job


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimiser": {}}, ["'optimiser'", "'optimizer'"]),
        ({"model": {"flavor": "edit-v1"}}, ["'model.flavor'", "'flavour'"]),
        ({"model": {"flavour": "edit-v9"}}, ["edit-v9", "edit-v1", "Did you mean"]),
        ({"model": {"base_model_precision": "int8_quanto"}}, ["int8-quanto"]),
        ({"lora": {"lora_rank": 0}}, ["lora_rank", "0", "1 to 1024"]),
        ({"lora": {"lora_rank": "16"}}, ["lora.lora_rank", "'16'", "int"]),
        ({"lora": {"lora_rank": True}}, ["lora.lora_rank", "True"]),
        ({"dataset": {"target_dir": "a", "reference_dirs": "b"}}, ["reference_dirs", "'b'", "list"]),
        ({"dataset": {"target_dir": "a", "reference_dirs": ["b"] * 4}}, ["reference_dirs", "one, two or three"]),
        ({"dataset": {"reference_dirs": ["b"]}}, ["dataset.target_dir"]),
        ({"optimizer": {"learning_rate": 3}}, ["learning_rate", "3"]),
        ({"export": {"lora_name": "../up"}}, ["lora_name", "../up", "without folders"]),
        ({"lora": {"lora_targets": "pattern"}}, ["lora_target_pattern"]),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(JobConfig, {**JOB, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"model, dataset, cache_dir, run_dir"):
        from_json(JobConfig, {})


def test_every_setting_is_documented() -> None:
    configs = (JobConfig, TrainConfig, ModelConfig, DatasetConfig, EncodingConfig, LoraConfig, OptimizerConfig)
    for config in configs:
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 10, field.name


def test_instance_prompt_needs_its_sentence() -> None:
    with pytest.raises(ConfigError, match="instance_prompt"):
        DatasetConfig(target_dir="a", reference_dirs=("b",), caption_strategy="instanceprompt")


def test_resume_key_names_what_decides_the_weights() -> None:
    config = TrainConfig(run_dir="a", encoded="x/abc.json")
    same = dataclasses.replace(
        config, run_dir="b", encoded="y/abc.json", max_train_steps=7, gradient_checkpointing=False
    )
    assert resume_key(same) == resume_key(config)
    for change in (
        {"seed": 1},
        {"encoded": "x/def.json"},
        {"lora": LoraConfig(lora_rank=4)},
        {"noise": NoiseConfig(flow_schedule_shift=3.0)},
        {"optimizer": OptimizerConfig(learning_rate=2e-4)},
    ):
        assert resume_key(dataclasses.replace(config, **change)) != resume_key(config), change


def test_model_files_count_by_their_name_and_placement_does_not() -> None:
    def key(**model: str) -> dict:
        return resume_key(TrainConfig(run_dir="a", encoded="x.json", model=ModelConfig(**model)))

    assert key(transformer_file="a/x.safetensors") == key(transformer_file="b/x.safetensors", quantize_via="cpu")
    assert key(transformer_file="a/x.safetensors") != key(transformer_file="a/y.safetensors")


def test_no_change_is_another_word_for_none() -> None:
    assert ModelConfig(base_model_precision="no_change") == ModelConfig()  # type: ignore[arg-type]


def test_number_of_steps_matters_where_the_learning_rate_depends_on_it() -> None:
    cosine = TrainConfig(run_dir="a", encoded="x.json", optimizer=OptimizerConfig(lr_scheduler="cosine"))
    assert resume_key(cosine) != resume_key(dataclasses.replace(cosine, max_train_steps=7))


def test_digest_ignores_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
