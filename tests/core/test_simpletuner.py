"""SimpleTuner's two files are converted to one job, with a report on every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.imported import ROOT, line, read
from tests.support.quickstart import CONFIG, EDIT_V1, EDIT_V2, as_edit_v2, in_folders
from trainer_core.__main__ import main
from trainer_core.config import EmaConfig
from trainer_core.data.pair_check import check_pairs
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError
from trainer_core.job import load_job
from trainer_core.json_text import plain_json, read_json
from trainer_core.simpletuner.convert import convert
from trainer_core.simpletuner.keys import CONFIG_REASONS, DATA_REASONS
from trainer_core.simpletuner.section import Section


def files(folder: Path, config: str, data: str) -> Path:
    """Writes both files, with small folders in place of theirs, and imports them. Returns the written job file."""
    (folder / "config.json").write_text(config)
    (folder / "data.json").write_text(in_folders(data, folder / "pairs"))
    arguments = (str(folder / "config.json"), "--data", str(folder / "data.json"), "--out", str(folder / "job.json"))
    assert main(["import-simpletuner", *arguments]) == 0
    return folder / "job.json"


def test_first_example(tmp_path: Path):
    job = load_job(files(tmp_path, CONFIG, EDIT_V1))
    assert (job.model.flavour, job.model.quantize_via) == ("edit-v1", "cpu")
    assert job.model.base_model_precision == "int8-quanto"
    assert (job.noise.flow_schedule_shift, job.batching.gradient_accumulation_steps) == (1.73, 4)
    assert (job.encoding.resolution, job.validation.validation_guidance) == (1024, 4.0)
    assert job.memory.memory == "auto"  # the trainer chooses what fits the card
    dataset = pair_folders(job.dataset)
    assert len(dataset.pairs) == 4 and check_pairs(dataset, job.pair_check)


def test_second_example_has_three_references(tmp_path: Path):
    job = load_job(files(tmp_path, as_edit_v2(CONFIG), EDIT_V2))
    assert [Path(each).name for each in job.dataset.reference_dirs] == ["reference_1", "reference_2", "reference_3"]
    dataset = pair_folders(job.dataset)
    assert all(len(pair.references) == 3 for pair in dataset.pairs) and check_pairs(dataset, job.pair_check)


def test_every_key_of_the_documents_is_taken_or_explained(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, set[str]]] = []
    explain = Section.explain
    monkeypatch.setattr(
        Section, "explain", lambda self, *args: (asked.append((args[0], set(self.asked))), explain(self, *args))
    )
    read()
    (config_keys,) = (keys for reasons, keys in asked if reasons is CONFIG_REASONS)
    data_keys = next(keys for reasons, keys in asked if reasons is DATA_REASONS)
    assert not config_keys & set(CONFIG_REASONS) and not data_keys & set(DATA_REASONS)
    assert len(config_keys) > 80 and {"csv_file", "conditioning_type"} < data_keys
    imported = read(dict.fromkeys(CONFIG_REASONS, "x"), **dict.fromkeys(DATA_REASONS, "x"))
    for key in CONFIG_REASONS:
        line(imported, f"{key}: left out; ")
    for key in DATA_REASONS:
        line(imported, f"my-edited-images.{key}: left out; ")
    given = {"model_flavour": "edit-v1"}
    assert not [each for each in read(dict.fromkeys(config_keys) | given).report if "has no effect" in each]
    based = convert(json.loads(plain_json(CONFIG)), json.loads(plain_json(EDIT_V1)), base="models/x", root=ROOT)
    assert based.job.model.base == str(ROOT / "models/x")
    assert "ema_device decides" in line(imported, "ema_cpu_only:")


def test_the_running_average_is_taken():
    theirs = {"use_ema": True, "ema_decay": 0.99, "ema_validation": "none"}
    assert read(theirs).job.ema == EmaConfig(use_ema=True, ema_decay=0.99, ema_validation="none")


def test_settings_are_carried_over():
    job = read(
        {
            "--learning_rate": "1e-4",
            "gradient_checkpointing": "true",
            "optimizer": "bnb-adamw8bit",
            "lr_scheduler": "constant",
            "lora_rank": 8,
            "max_train_steps": 300,
            "max_grad_norm": 0.5,
            "grad_clip_method": "norm",
            "flow_sigmoid_scale": 2.0,
            "flow_use_uniform_schedule": True,
            "base_model_precision": "no_change",
            "caption_dropout_probability": 0.05,
            "checkpointing_steps": 50,
            "validation_guidance_real": 3.5,
            "validation_seed": 7,
            "output_dir": "output/my lora",
            "model_kwargs": {"match_target_res": True},
            "peft_lora_target_modules": ["to_q", "to_out.0"],
            "use_dora": True,
            "use_rslora": "true",
            "init_lora": "loras/first.safetensors",
        },
        resolution_type="area",
        resolution=0.6,
        crop="true",
        crop_style="centre",
        minimum_image_size=0.2,
        maximum_image_size=2.0,
        target_downsample_size=1.0,
        timestep_sampling_offset=-0.5,
        prepend_instance_prompt=True,
        instance_prompt="sks,",
    ).job
    assert job.optimizer.learning_rate == 1e-4 and job.optimizer.optimizer == "adamw-8bit"
    assert (job.optimizer.lr_scheduler, job.optimizer.lr_warmup_steps) == ("constant", 0)
    assert job.optimizer.max_grad_norm == 0.5 and job.max_train_steps == 300
    assert (job.noise.logit_std, job.noise.logit_mean, job.noise.sigma_distribution) == (2.0, -1.0, "uniform")
    assert job.model.base_model_precision == "none" and job.batching.caption_dropout_probability == 0.05
    assert job.checkpoints.checkpoint_step_interval == 50
    assert (job.validation.validation_guidance, job.validation.validation_seed) == (3.5, 7)
    assert job.run_dir == str(ROOT / "output/my lora/qwen_edit_trainer") and job.export.lora_name == "my_lora"
    assert job.encoding.match_target_res and job.lora.lora_target_pattern == r"(?:.*\.)?(?:to_q|to_out\.0)"
    assert (job.lora.lora_type, job.lora.use_rslora) == ("dora", True)
    assert job.lora.init_lora == str(ROOT / "loras/first.safetensors")
    sizes = job.encoding.sizes
    assert (sizes.resolution_type, sizes.megapixels, sizes.crop, sizes.crop_style) == ("area", 0.6, True, "center")
    assert (sizes.minimum_image_size, sizes.leave_out_small, sizes.maximum_image_size) == (0.2, True, 2.0)
    assert job.dataset.instance_prompt == "sks," and job.dataset.captions.prepend_instance_prompt


def test_optimizers_and_courses_are_carried_over():
    prodigy = read({"optimizer": "prodigy", "learning_rate": 0.5, "lr_scheduler": "linear", "max_grad_norm": 1})
    assert prodigy.job.optimizer.learning_rate == 1.0 and "finds" in line(prodigy, "learning_rate:")
    assert (prodigy.job.optimizer.lr_scheduler, prodigy.job.optimizer.max_grad_norm) == ("linear", 0.0)
    free = read({"optimizer": "adamw_schedulefree", "lr_scheduler": "polynomial", "lr_end": "1e-8"})
    assert free.job.optimizer.optimizer == "adamw-schedulefree"
    assert free.job.optimizer.lr_scheduler == "constant_with_warmup" and "ignores it" in line(free, "lr_scheduler:")
    lion = read({"optimizer": "optimi-lion", "learning_rate": 3e-5, "loss_type": "huber", "huber_c": 0.2})
    assert (lion.job.optimizer.optimizer, lion.job.optimizer.learning_rate) == ("lion", 3e-5)
    assert (lion.job.noise.loss_type, lion.job.noise.huber_c) == ("huber", 0.2)


def test_scheduled_sampling_is_carried_over():
    imported = read(
        {
            "scheduled_sampling_max_step_offset": 10,
            "scheduled_sampling_probability": "1.0",
            "scheduled_sampling_ramp_steps": 100,
            "scheduled_sampling_prob_end": 0,
            "scheduled_sampling_sampler": "rk4",
            "scheduled_sampling_reflexflow": None,
            "scheduled_sampling_reflexflow_beta1": 5,
            "scheduled_sampling_max_step_ofset": 3,
        }
    )
    rollout = imported.job.rollout
    assert (rollout.scheduled_sampling_max_step_offset, rollout.scheduled_sampling_probability) == (10, 1.0)
    assert (rollout.scheduled_sampling_ramp_steps, rollout.scheduled_sampling_prob_end) == (100, 1.0)
    assert rollout.scheduled_sampling_prob_start == 1.0
    assert "Euler" in line(imported, "scheduled_sampling_sampler:")
    for end in ("start", "end"):
        assert "0 becomes 1" in line(imported, f"scheduled_sampling_prob_{end}:")
    assert rollout.scheduled_sampling_sampler == "rk4" and rollout.scheduled_sampling_reflexflow
    assert rollout.scheduled_sampling_reflexflow_beta1 == 5.0
    assert "'scheduled_sampling_max_step_offset'" in line(imported, "scheduled_sampling_max_step_ofset: UNKNOWN")


def test_what_changes_is_said():
    imported = read({"optimizer": "soap", "max_grad_norm": 0.01, "num_train_epochs": 3, "use_ema": True})
    assert imported.job.optimizer.max_grad_norm == 1.0 and imported.job.optimizer.optimizer == "adamw"
    assert "adamw with this trainer's defaults" in line(imported, "optimizer:")
    assert "each element" in line(imported, "max_grad_norm:")
    assert "3 x pairs" in line(imported, "num_train_epochs:")
    defaults = line(imported, "Not in your files")
    assert "learning_rate 0.0001 (SimpleTuner's 4e-7)" in defaults and "seed 0 (SimpleTuner's is random)" in defaults
    assert "seed" not in line(read({"seed": 7}), "Not in your files")
    assert "'match_target_res'" in line(read({"model_kwargs": {"match_target_rez": True}}), "model_kwargs.match")
    assert "Qwen/Qwen-Image-Edit" in line(imported, "pretrained_model_name_or_path:")


def test_what_conditioning_and_validation_say_is_carried_over():
    changes = {"conditioning_multidataset_sampling": "random", "validation_prompt": "make it night"}
    job = read({**changes, "validation_resolution": "512x768, 1024"}).job
    assert job.dataset.conditioning_type == ("reference_strict",)
    assert (job.encoding.conditioning_image_embeds, job.encoding.create_image_embeds) == ("my-reference-embeds", True)
    assert job.encoding.conditioning_multidataset_sampling == "random"
    assert job.encoding.validation_prompts == ("make it night",)
    assert job.validation.validation_resolution == "627,1024"
    assert read({"validation_resolution": 768}).job.validation.validation_resolution == "768"
    imported = read({"validation_resolution": "1024x1024"})
    assert imported.job.validation.sizes == (1024,)
    assert "1024x1024 becomes 1024: samples have about this area" in line(imported, "validation_resolution:")
    data = json.loads(plain_json(EDIT_V2))
    data[2]["conditioning_type"] = "reference_loose"
    del data[3]["conditioning_type"]
    imported = convert(json.loads(plain_json(as_edit_v2(CONFIG))), data, root=ROOT)
    assert imported.job.dataset.conditioning_type == ("reference_strict", "reference_loose", "auto")
    assert "combined" in line(imported, "conditioning_multidataset_sampling:")


def test_the_other_name_of_the_folder():
    data = json.loads(plain_json(EDIT_V1))
    for entry in data[:2]:
        entry["instance_data_root"] = entry.pop("instance_data_dir")
    imported = read({}, data)
    assert imported.job.dataset == read().job.dataset and not [each for each in imported.report if "UNKNOWN" in each]


def test_masks_and_several_data_sets():
    data = json.loads(plain_json(EDIT_V1))
    mask = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    data += [mask, {**data[0], "id": "more", "resolution": 512, "crop": True, "repeats": 3, "probability": 0.4}]
    data += [{**data[0], "id": "held-out"}, {"id": "plain", "instance_data_dir": "plain"}, {**mask, "id": "spare"}]
    data.append({"id": "text", "dataset_type": "text_embeds", "cache_dir": "cache/text", "type": "local"})
    changes = {"eval_dataset_id": "held-out", "num_eval_images": 3}
    imported = read(changes, data, conditioning_data=["m", "my-reference-images"], crop=False, disable_validation=True)
    first, more, held_out, plain = imported.job.datasets
    assert first.dataset.mask_dir == str(ROOT / "masks") and not more.dataset.mask_dir
    assert first.dataset.reference_dirs == more.dataset.reference_dirs == (str(Path("/datasets/reference-images")),)
    assert [part.encoding.resolution for part in imported.job.datasets] == [1024, 512, 1024, 1024]
    assert [part.encoding.sizes.crop for part in imported.job.datasets] == [False, True, False, False]
    assert (more.repeats, more.probability, first.repeats) == (3, 0.4, 0)
    assert imported.job.eval_dataset_id == ("held-out",) and held_out.id == "held-out"
    assert imported.job.validation.num_validation_images == 3
    assert plain.dataset.reference_dirs == () and "text-to-image" in line(imported, "plain.conditioning_data:")
    assert "No data set" in line(imported, "spare: LEFT")
    assert "cache" in line(imported, "text:") and "probability" in line(imported, "more.probability:")


def test_what_data_sets_share_stands_once_and_can_be_changed():
    data = json.loads(plain_json(EDIT_V2))
    data.append({**data[0], "id": "more", "crop": True})
    settings = {**json.loads(plain_json(as_edit_v2(CONFIG))), "num_eval_images": 1}
    changes = ["encoding.resolution=96", "datasets.more.repeats=2", "datasets.0.probability=0.5", "export.lora_name=x"]
    imported = convert(settings, data, root=ROOT, changes=changes)
    assert imported.values["encoding"] == {
        "resolution": 96,
        "num_eval_images": 1,
        "train_eval_images": True,
        "sizes": {"crop_style": "random"},
    }
    assert imported.values["datasets"][1]["encoding"] == {"sizes": {"crop": True}}
    first, more = imported.job.parts()
    assert (first.encoding.resolution, first.probability, more.repeats) == (96, 0.5, 2)
    assert imported.job.export.lora_name == "x"
    for wrong, words in (
        ("encoding.resolution", "name=value"),
        ("datasets.none.repeats=1", "no 'none'"),
        ("seed.x=1", "has no settings"),
        ("run_dir.x=1", "has no settings"),
        ("encoding.resolutoin=1", "Did you mean 'resolution'"),
    ):
        with pytest.raises(ConfigError, match=words):
            convert({**settings, "seed": 1}, data, root=ROOT, changes=[wrong])


def with_second_reference(**entry: Any) -> list:
    data = json.loads(plain_json(EDIT_V1))
    data[0]["conditioning_data"].append("b")
    return [*data, {**data[1], "id": "b", "instance_data_dir": "/datasets/b", **entry}]


def test_one_reference_a_turn_keeps_all_folders():
    """edit-v1 takes two or three reference folders if each step uses only one of them."""
    imported = read({"conditioning_multidataset_sampling": "random"}, with_second_reference())
    assert imported.job.dataset.reference_dirs == (str(Path("/datasets/reference-images")), str(Path("/datasets/b")))
    assert not [each for each in imported.report if "LEFT OUT" in each]
    data = with_second_reference()
    more = [{**data[-1], "id": each} for each in ("c", "d")]
    data[0]["conditioning_data"] += ["c", "d"]
    imported = read({"conditioning_multidataset_sampling": "random"}, data + more)
    assert len(imported.job.dataset.reference_dirs) == 3
    assert "my-edited-images refers to it, but only the first 3" in line(imported, "d: LEFT OUT.")


def test_references_that_are_named_and_left_out_say_so():
    imported = read({}, with_second_reference())
    assert imported.job.dataset.reference_dirs == (str(Path("/datasets/reference-images")),)
    why = line(imported, "b: LEFT OUT.")
    assert "my-edited-images refers to it" in why and "conditioning_multidataset_sampling random" in why
    assert "no data set refers to it" not in why
    assert line(imported, "my-edited-images.conditioning_data:").endswith("in this order: my-reference-images.")
    second_masks = read({}, with_second_reference(conditioning_type="mask"))
    assert not [each for each in second_masks.report if "LEFT OUT" in each]


def test_validated_pairs_are_trained_on_as_in_simpletuner():
    imported = read({"num_eval_images": 25})
    (part,) = imported.job.parts()
    assert (part.encoding.num_eval_images, part.encoding.train_eval_images) == (25, True)
    assert imported.job.validation.num_validation_images == 25
    said = line(imported, "num_eval_images:")
    assert "Up to 25 pairs" in said and "a loss on training pairs" in said and "encoding.train_eval_images" in said
    (part,) = read().job.parts()
    assert (part.encoding.num_eval_images, part.encoding.train_eval_images) == (4, True)
    (part,) = read({"num_eval_images": 25, "validation_disable": True}).job.parts()
    assert part.encoding.num_eval_images == 0
    (part,) = read({"num_eval_images": 25}, disable_validation=True).job.parts()
    assert (part.encoding.num_eval_images, part.encoding.train_eval_images) == (0, False)
    data = json.loads(plain_json(EDIT_V1))
    data.append({**data[0], "id": "held-out", "dataset_type": "eval"})
    imported = read({}, data)
    parts = {part.id: part.encoding for part in imported.job.parts()}
    assert {name: each.num_eval_images for name, each in parts.items()} == {"my-edited-images": 0, "held-out": -1}
    assert not any(each.train_eval_images for each in parts.values())
    assert not [each for each in imported.report if each.startswith("num_eval_images")]


def test_epochs_beside_steps_are_said():
    imported = read({"max_train_steps": 300, "num_train_epochs": 3})
    assert imported.job.max_train_steps == 300
    assert "max_train_steps (300) sets the length" in line(imported, "num_train_epochs:")
    for epochs in (0, None):
        report = read({"max_train_steps": 300, "num_train_epochs": epochs}).report
        assert not [each for each in report if each.startswith("num_train_epochs")]
    neither = read()
    assert neither.job.max_train_steps == 1000 and "trains one epoch" in line(neither, "max_train_steps:")


def test_names_in_place_of_paths(tmp_path: Path):
    wrong = tmp_path / "config.json"
    for text in (b"{", b"\xff", None):
        wrong.unlink() if text is None else wrong.write_bytes(text)
        with pytest.raises(ConfigError) as caught:
            read_json(wrong, "mine/config.json", loose=True)
        assert "mine/config.json" in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_data_set_of_type_eval_is_validated_on():
    data = json.loads(plain_json(EDIT_V1))
    data.append({**data[0], "id": "held-out", "dataset_type": "eval"})
    job = read({}, data).job
    assert job.eval_dataset_id == ("held-out",) and [part.id for part in job.datasets] == [
        "my-edited-images",
        "held-out",
    ]


@pytest.mark.parametrize(
    ("config", "first", "words"),
    [
        (
            {},
            {"conditioning_image_embeds": "my-reference-embds"},
            ["my-reference-embds", "must be one of my-reference-emb"],
        ),
        ({}, {"conditioning_data": "my-reference"}, ["'my-reference'", "Did you mean 'my-reference-images'"]),
        ({}, {"conditioning_data": None}, ["conditioning_data", "my-reference-images"]),
        ({}, {"type": "aws"}, ["my-edited-images.type", "local"]),
        ({}, {"caption_strategy": "txtfile"}, ["Did you mean 'textfile'"]),
        ({"model_flavour": "v1.0"}, {}, ["edit-v1, edit-v2, edit-v3"]),
        ({"model_type": "full"}, {}, ["model_type", "lora"]),
        ({"eval_dataset_id": "val"}, {}, ["eval_dataset_id", "'val'"]),
        ({"train_batch_size": "one"}, {}, ["train_batch_size", "a number"]),
        ({"base_model_precision": "int3"}, {}, ["base_model_precision", "int8-quanto"]),
    ],
)
def test_mistakes_name_what_there_is(config: dict, first: dict, words: list[str]):
    with pytest.raises(ConfigError) as error:
        read(config, **first)
    assert all(word in str(error.value) for word in words), error.value


def test_a_job_file_as_windows_saves_it(tmp_path: Path):
    """A UTF-8 byte order mark is accepted. Another encoding is an error that says what to do."""
    path = files(tmp_path, CONFIG, EDIT_V1)
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert load_job(path).model.flavour == "edit-v1"
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ConfigError, match=r"job\.json is not UTF-8 text\. Save it"):
        load_job(path)


def test_nothing_is_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    job = files(tmp_path, CONFIG, EDIT_V1)
    (tmp_path / "again.json").write_text("{")
    data = ("--data", str(tmp_path / "data.json"))
    assert main(["import-simpletuner", str(tmp_path / "config.json"), *data, "--out", str(job)]) == 1
    assert "nothing is overwritten" in caplog.text
    assert main(["import-simpletuner", str(tmp_path / "again.json"), *data]) == 1
    assert "line 1, column 2" in caplog.text
