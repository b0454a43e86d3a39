"""Captions, and data sets of several kinds, are imported as SimpleTuner's documents describe them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.imported import ROOT, line, read
from tests.support.quickstart import EDIT_V1
from trainer_core.errors import ConfigError
from trainer_core.json_text import plain_json


def test_tables_of_captions():
    table = {"path": "captions.jsonl", "filename_column": "id", "caption_column": "text", "width_column": "w"}
    table["fallback_caption_column"] = "tags"
    imported = read(caption_strategy="parquet", parquet=table)
    dataset = imported.job.dataset
    assert "read from the pictures" in line(imported, "my-edited-images.parquet.width_column:")
    assert dataset.caption_strategy == "jsonl" and dataset.captions.caption_file == "captions.jsonl"
    assert (dataset.captions.filename_column, dataset.captions.caption_column) == ("id", "text")
    assert dataset.captions.fallback_caption_column == "tags"
    dataset = read(caption_strategy="csv", csv_file="c.csv", csv_caption_column="text").job.dataset
    assert Path(dataset.captions.caption_file) == ROOT / "c.csv" and dataset.captions.caption_column == "text"


def test_variants_of_captions():
    shuffle = {"enable": True, "count": 3, "seed": 42, "split_on": "period", "position_start": 1}
    captions = read(caption_shuffle={**shuffle, "include_original": False}).job.dataset.captions
    assert (captions.caption_shuffle_count, captions.caption_shuffle_seed) == (3, 42)
    assert (captions.caption_shuffle_split_on, captions.caption_shuffle_position_start) == ("period", 1)
    assert not captions.caption_shuffle_include_original
    assert read(caption_shuffle={**shuffle, "enable": False}).job.dataset.captions.caption_shuffle_count == 0
    assert read(caption_shuffle={"enable": "true"}).job.dataset.captions.caption_shuffle_count == 1
    odd = read(caption_shuffle={"enable": True, "count": 500, "split_on": "tab", "sed": 1})
    assert odd.job.dataset.captions.caption_shuffle_count == 100
    assert "100" in line(odd, "my-edited-images.caption_shuffle.count:")
    assert "comma" in line(odd, "my-edited-images.caption_shuffle.split_on:")
    assert "Did you mean 'seed'" in line(odd, "my-edited-images.caption_shuffle.sed:")
    several = read(caption_strategy="instanceprompt", instance_prompt=["one", "", "two"]).job.dataset
    assert (several.instance_prompt, several.captions.more_instance_prompts) == ("one", ("two",))
    first = read(prepend_instance_prompt=True, instance_prompt=["one", "two"])
    assert first.job.dataset.instance_prompt == "one" and not first.job.dataset.captions.more_instance_prompts
    assert "the first prompt" in line(first, "my-edited-images.instance_prompt:")


def test_texts_that_simpletuner_takes_out_of_captions():
    def data(found: Any, **more: Any) -> list[dict]:
        first, *others = json.loads(plain_json(EDIT_V1))
        others = [each for each in others if each.get("dataset_type") != "text_embeds"]
        embeds = {"id": "words", "dataset_type": "text_embeds", "default": True, "caption_filter_list": found}
        return [{**first, **more}, *others, embeds, {"id": "none", "dataset_type": "text_embeds"}]

    imported = read({}, data(["arafed ", "s/a/b/", "x(y)", ""]))
    assert imported.job.dataset.captions.caption_filter_list == ("arafed ", "s/a/b/", "x(y)")
    assert any("plain text" in each and "'x(y)'" in each for each in imported.report)
    assert not read({}, data(["a"], text_embeds="none")).job.dataset.captions.caption_filter_list
    file = read({}, data("filters.txt"))
    assert "LEFT OUT. Copy the lines of 'filters.txt'" in line(file, "my-edited-images.caption_filter_list:")
    with pytest.raises(ConfigError, match="list of texts or a file"):
        read({}, data([1]))


@pytest.mark.parametrize("key", ["is_regularisation_data", "is_regularization_data"])
def test_regularisation_data_is_marked(key: str):
    data = json.loads(plain_json(EDIT_V1))
    imported = read(datasets=[*data, {**data[0], "id": "keep", key: True}])
    assert [part.is_regularisation_data for part in imported.job.datasets] == [False, True]
    assert "base model's own prediction" in line(imported, f"keep.{key}:")
    with pytest.raises(ConfigError, match="nothing to learn"):
        read(**{key: True})


def test_a_data_set_without_references_is_text_to_image_beside_one_with():
    data = json.loads(plain_json(EDIT_V1))
    plain = {"id": "plain", "instance_data_dir": "plain", "is_regularisation_data": True}
    imported = read({"num_eval_images": 3}, [*data, plain])
    edits, kept = imported.job.datasets
    assert (edits.dataset.reference_dirs, kept.dataset.reference_dirs) == (
        (str(Path("/datasets/reference-images")),),
        (),
    )
    assert (edits.encoding.num_eval_images, kept.encoding.num_eval_images) == (3, 0), "SimpleTuner samples edits only"
    assert not [each for each in imported.report if "LEFT OUT" in each]
    with pytest.raises(ConfigError, match="No data set to train on"):
        read({}, [{**data[0], "conditioning_data": None}, *data[1:]])
    mask = {"id": "m", "conditioning_type": "mask", "instance_data_dir": "masks"}
    with pytest.raises(ConfigError, match="only masks"):
        read({}, [*data, {**plain, "conditioning_data": "m"}, mask])


def test_each_data_set_keeps_its_offset():
    def data(*offsets: float | None) -> list[dict]:
        first, *others = json.loads(plain_json(EDIT_V1))
        sets = [{**first, "id": f"set{number}"} for number in range(len(offsets))]
        return [one | {"timestep_sampling_offset": each} for one, each in zip(sets, offsets, strict=True)] + others

    imported = read({"flow_sigmoid_scale": 2.0}, data(-0.5, 1, None))
    assert [part.timestep_sampling_offset for part in imported.job.datasets] == [-0.5, 1.0, 0.0]
    assert (imported.job.noise.logit_mean, imported.job.noise.logit_std) == (0.0, 2.0)
    alike = read({"flow_sigmoid_scale": 2.0}, data(-0.5, -0.5)).job
    assert alike.noise.logit_mean == -1.0 and {part.timestep_sampling_offset for part in alike.datasets} == {0.0}
    validated = read({"eval_dataset_id": "set1"}, data(-0.5, 1)).job
    assert validated.noise.logit_mean == -0.5 and {part.timestep_sampling_offset for part in validated.datasets} == {
        0.0
    }
    uniform = read({"flow_use_uniform_schedule": True}, data(-0.5, 1))
    assert {part.timestep_sampling_offset for part in uniform.job.datasets} == {0.0}
    assert "SimpleTuner ignores it" in line(uniform, "timestep_sampling_offset:")
