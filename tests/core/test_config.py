"""Settings are strict and checked on construction, with errors that name the setting."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import jsonschema
import pytest

from tests.support.hostile_values import HOSTILE
from tools.settings_reference import SECTIONS, job_schema
from trainer_core.config import (
    DatasetConfig,
    DatasetPartConfig,
    EncodingConfig,
    JobConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    digest,
    from_json,
    resume_key,
    to_json,
)
from trainer_core.errors import ConfigError, ModelFileError
from trainer_core.qwen_image.folder import model_folder
from trainer_core.settings import Limits, limits_of

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
        ({"lora": {"lora_rank": "16"}}, ["lora.lora_rank", "'16'", "whole number"]),
        ({"lora": {"lora_rank": True}}, ["lora.lora_rank", "True"]),
        ({"dataset": {"target_dir": "a", "reference_dirs": 5}}, ["reference_dirs", "5", "list"]),
        (
            {"dataset": {"target_dir": "a", "reference_dirs": ["b"] * 4}},
            ["reference_dirs", "one, two or three folders, or an empty list"],
        ),
        ({"dataset": {"reference_dirs": ["b"]}}, ["dataset.target_dir"]),
        ({"optimizer": {"learning_rate": 3}}, ["learning_rate", "3"]),
        ({"export": {"lora_name": "../up"}}, ["lora_name", "../up", "without folders"]),
        ({"lora": {"lora_targets": "pattern"}}, ["lora_target_pattern"]),
        ({"validation": {"validation_resolution": "1024x1000"}}, ["'1024x1000'", "multiples of 16"]),
        ({"validation": {"validation_resolution": "768x768,"}}, ["validation_resolution", "comma-separated"]),
        ({"validation": {"validation_resolution": "32"}}, ["64 to 4096"]),
        ({"encoding": {"validation_prompts": [" "]}}, ["validation_prompts", "edit instructions"]),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(JobConfig, {**JOB, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"run_dir, model, dataset, cache_dir"):
        from_json(JobConfig, {})


PART = {"id": "a", "dataset": {"target_dir": "after", "reference_dirs": ["before"]}}
SEVERAL = {**{key: JOB[key] for key in ("model", "cache_dir", "run_dir")}, "datasets": [PART, {**PART, "id": "b"}]}


def test_several_datasets_share_what_they_do_not_say_of_their_encoding() -> None:
    shared = {"resolution": 512, "match_target_res": True, "sizes": {"crop": True}}
    own = {"resolution": 768, "sizes": {"crop_style": "corner"}}
    values = {**SEVERAL, "encoding": shared, "datasets": [{**PART, "encoding": own}, {**PART, "id": "b", "repeats": 2}]}
    job = from_json(JobConfig, values)
    first, second = job.parts()
    assert (first.encoding.resolution, first.encoding.match_target_res) == (768, True)
    assert (first.encoding.sizes.crop, first.encoding.sizes.crop_style) == (True, "corner")
    assert second.encoding == job.encoding and second.repeats == 2
    assert from_json(JobConfig, to_json(job)) == job


def test_a_dataset_to_validate_on_is_held_out_whole_and_nothing_else() -> None:
    job = from_json(JobConfig, {**SEVERAL, "eval_dataset_id": "b", "batching": {"caption_dropout_probability": 0.1}})
    assert [part.encoding.num_eval_images for part in job.parts()] == [0, -1]
    assert all(part.encoding.encode_empty_caption for part in job.parts())
    assert from_json(JobConfig, JOB).parts()[0].encoding.num_eval_images == EncodingConfig().num_eval_images


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": JOB["dataset"]}, ["dataset and datasets", "both"]),
        ({"datasets": []}, ["neither"]),
        ({"datasets": [PART, PART]}, ["'a'", "id of its own"]),
        ({"datasets": [{**PART, "id": " "}]}, ["id must be a name"]),
        ({"datasets": [{**PART, "probability": 2}]}, ["probability", "0.01 to 1"]),
        ({"datasets": [{**PART, "encoding": {"resolutoin": 1}}]}, ["datasets[0].encoding.resolutoin", "'resolution'"]),
        ({"datasets": [{**PART, "encoding": 3}]}, ["datasets[0].encoding", "object"]),
        ({"datasets": [{**PART, "encoding": {"sizes": 3}}]}, ["datasets[0].encoding.sizes", "object"]),
        ({"datasets": {}}, ["datasets must be a list", "{}"]),
        ({"datasets": [3]}, ["datasets[0] must be", "object", "3"]),
        ({"eval_dataset_id": "c"}, ["eval_dataset_id", "'c'", "a, b"]),
        ({"eval_dataset_id": ["a", "b"]}, ["eval_dataset_id", "a dataset to train on"]),
        ({"encoding": 3}, ["encoding must be", "object", "3"]),
    ],
)
def test_wrong_datasets_are_refused_by_name(change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(JobConfig, {**SEVERAL, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_setting_is_documented() -> None:
    configs = (JobConfig, TrainConfig, DatasetConfig, DatasetPartConfig, EncodingConfig, LoraConfig, OptimizerConfig)
    configs += (NoiseConfig, RolloutConfig)
    for config in configs:
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 10, field.name


@pytest.mark.parametrize("cls", [section[0] for section in SECTIONS])
def test_widgets_offer_only_values_that_are_accepted(cls: type) -> None:
    for field in dataclasses.fields(cls):
        limits = limits_of(cls, field.name)
        for end in (limits.lowest, limits.highest):
            assert end is None or limits.accept(end), field.name


def test_limits_in_words() -> None:
    assert str(Limits(min=1, max=1024, unit="pixels")) == "1 to 1024 pixels"
    assert str(Limits(above=0.0, below=1)) == "above 0 and below 1"
    assert str(Limits(min=0, below=1, usual="0.1")) == "0 or more and below 1, usually 0.1"
    assert str(Limits(above=0, max=1)) == "above 0 and at most 1"
    assert str(Limits(min=2, also=-1)) == "-1, or 2 or more"
    assert str(Limits(choices=(16, 32))) == "16 or 32"
    assert str(Limits(soft_min=0, soft_max=9)) == ""


def test_limits_have_no_place_for_nan() -> None:
    assert not Limits(min=0).accept(float("nan"))
    assert not Limits(below=1).accept(float("nan"))
    assert Limits(min=2, also=-1).accept(-1) and not Limits(min=2, also=-1).accept(0)


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
    cosine = TrainConfig(
        run_dir="a", encoded="x.json", optimizer=OptimizerConfig(lr_scheduler="cosine", lr_warmup_steps=2)
    )
    assert resume_key(cosine) != resume_key(dataclasses.replace(cosine, max_train_steps=7))


def test_digest_ignores_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"$schema": "docs/job.schema.json"}, True),
        ({"encoding": {"validation_prompts": "in autumn"}}, True),
        ({"validation": {"validation_resolution": 768}}, True),
        ({"lora": {"lora_rank": 1024, "lokr_factor": -1}}, True),
        ({"lora": {"lora_rank": 1025}}, False),
        ({"lora": {"lokr_factor": 0}}, False),
        ({"lora": {"lora_dropout": 1.0}}, False),
        ({"lora": {"lora_targets": "everything"}}, False),
        ({"encoding": {"sizes": {"aspect_bucket_alignment": 8}}}, False),
        ({"optimizer": {"learning_rates": 1e-4}}, False),
        ({"max_train_steps": "many"}, False),
    ],
)
def test_json_schema_and_trainer_accept_the_same_files(change: dict, fits: bool):
    job = {**JOB, **change}
    assert jsonschema.Draft202012Validator(job_schema()).is_valid(job) == fits
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError):
        from_json(JobConfig, job)


@pytest.mark.parametrize(("older", "now"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_compile_blocks_was_a_switch(older: object, now: str) -> None:
    assert from_json(MemoryConfig, {"compile_blocks": older}).compile_blocks == now


def test_all_wrong_settings_are_named_at_once() -> None:
    """Also those beside an unknown key, of a wrong type, and in other sections; each with its section."""
    wrong = {**JOB, "max_train_steps": "x", "lora": {"lora_rank": 0}, "encoding": {"resolution": 9999, "xyz": 1}}
    with pytest.raises(ConfigError) as caught:
        from_json(JobConfig, {**wrong, "model": {"base": "b", "mixed_precision": "fp8"}})
    lines = str(caught.value).split("\n")
    assert lines[0] == "There are 5 problems. Fix them and run again:"
    for words in (
        "Unknown setting 'encoding.xyz'.",
        "encoding.resolution must be 64 to 4096 pixels, got 9999.",
        "max_train_steps must be a whole number, got 'x'.",
        "lora.lora_rank must be 1 to 1024, got 0.",
        "model.mixed_precision must be one of ",
    ):
        assert len([line for line in lines if words in line]) == 1, words
    with pytest.raises(ConfigError, match=r"^There are 2 problems.*\n1. lora_rank .*\n2. lora_dropout "):
        LoraConfig(lora_rank=0, lora_dropout=2.0)


@pytest.mark.parametrize("value", [[True], {"on": True}, 2])
def test_other_values_of_compile_blocks_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="compile_blocks must be one of auto, on, off"):
        from_json(MemoryConfig, {"compile_blocks": value})


SETTINGS = [(cls, field.name) for cls in {cls for cls, _, _ in SECTIONS} for field in dataclasses.fields(cls)]
NEEDED = {
    "target_dir": "a",
    "reference_dirs": ("b",),
    "run_dir": "r",
    "cache_dir": "c",
    "encoded": "e",
    "id": "i",
    "file": "f",
    "model": ModelConfig(),
    "dataset": DatasetConfig(target_dir="a", reference_dirs=("b",)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_setting_made_in_code_takes_its_type_or_refuses_the_value_by_name(name: str) -> None:
    """A config that was made can be stored: as JSON in UTF-8, in digests and run.json."""
    for cls, setting in sorted(SETTINGS, key=str):
        fields = {field.name for field in dataclasses.fields(cls)}
        needed = {key: value for key, value in NEEDED.items() if key in fields}
        try:
            made = cls(**{**needed, setting: HOSTILE[name]})
        except ConfigError as error:
            message = str(error)
        else:
            message = ""
            digest(to_json(made))
            assert to_json(made) == json.loads(json.dumps(to_json(made), allow_nan=False))
        assert not message or setting in message, (cls, setting)
        assert len(message) < 2_000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora_rank": 16.5}, "lora_rank must be a whole number, got 16.5"),
        ({"lora_rank": None}, "lora_rank must be a whole number, got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"init_lora": "a\ud800"}, "init_lora contains half a surrogate pair at character 2"),
        ({"rank_pattern": "0-9 = 8"}, "rank_pattern must be a list, got '0-9 = 8'"),
        ({"rank_pattern": (8,)}, "rank_pattern must be text, got 8"),
        ({"rank_pattern": ("0 = 8",) * 1001}, "rank_pattern must be a list of at most 1000 items, got '1001 items'"),
        ({"lora_target_pattern": "x" * 5000}, "lora_target_pattern has 5,000 characters; at most 4,096 are allowed"),
    ],
)
def test_wrong_types_are_said(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**change)
    assert str(caught.value).startswith(says)


def test_a_whole_number_is_a_float_and_true_is_no_number() -> None:
    assert LoraConfig(lora_alpha=8).lora_alpha == 8
    with pytest.raises(ConfigError, match="lora_alpha must be a finite number, got True"):
        LoraConfig(lora_alpha=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"dataset": {"target_dir": "t", "reference_dirs": "r", "caption_file": "c.csv"}},
            "It belongs in dataset.captions.",
        ),
        ({"lora_rank": 4}, "It belongs in lora."),
    ],
)
def test_a_setting_in_the_wrong_section_is_told_its_section(values, said):
    with pytest.raises(ConfigError) as refused:
        from_json(JobConfig, {**JOB, **values})
    assert str(refused.value).endswith(said), refused.value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("transformer_file",), "but vae_file and text_encoder_file are empty. Set them too,"),
        (("transformer_file", "vae_file"), "but text_encoder_file is empty. Set it too,"),
    ],
)
def test_model_files_without_the_others_name_each_lack(given, said, tmp_path):
    with pytest.raises(ModelFileError) as refused:
        model_folder(ModelConfig(base="demo", **dict.fromkeys(given, str(tmp_path))))
    assert said in str(refused.value)
