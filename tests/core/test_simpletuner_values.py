"""Imported values have SimpleTuner's meaning: schedules, optimizers, defaults, sizes. All its options are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.imported import line, mentioned, options, read
from tests.support.limits import result_or_own_error
from tests.support.quickstart import CONFIG, EDIT_V1
from trainer_core.errors import ConfigError
from trainer_core.json_text import plain_json
from trainer_core.simpletuner.keys import CONFIG_REASONS
from trainer_core.training.schedule import learning_rate_at


def test_no_option_of_simpletuner_is_unknown():
    names = options()
    assert len(names) == len(set(names)) == 571
    imported = read(dict.fromkeys(names) | json.loads(plain_json(CONFIG)))
    assert not [each for each in imported.report if "UNKNOWN" in each or "has no effect" in each]
    assert not set(names) - mentioned(imported)
    assert len(set(names) & set(CONFIG_REASONS)) == LEFT_OUT and len(set(names) - set(CONFIG_REASONS)) == 571 - LEFT_OUT
    for option, reason in REASONS.items():
        assert reason in line(imported, f"{option}: left out; ")


LEFT_OUT = 472
REASONS = {
    "crepa_lambda": "this additional loss is not supported",
    "ltx2_validation_pipeline_mode": "it is for another model family",
    "ramtorch": "memory is auto",
    "fsdp_version": "torchrun or accelerate starts the processes",
    "post_checkpoint_script": "no script is run",
    "sdnq_group_size": "weights have the format that base_model_precision names",
    "tread_config": "every token passes through every block",
    "timestep_bias_strategy": "noise levels are logit-normal, uniform, mode or cosmap",
    "validation_on_startup": "a run is validated every validation_step_interval steps and at its end",
    "validation_external_script": "no script is run",
    "masked_loss_probability": "a mask counts in every step",
    "lycoris_config": "for LoKr, set lora.lora_type",
    "init_lora_step": "counts its steps from 0",
    "lr_num_cycles": "SimpleTuner's schedules do not use it",
    "__active_tab__": "SimpleTuner's own start and page",
}


# Rates of SimpleTuner 4.8's schedulers before these steps of 1,000, with learning_rate 1e-4 and lr_warmup_steps 100
STEPS = (0, 1, 50, 99, 100, 101, 150, 200, 500, 999)
RATES = {
    "cosine": [1e-4, 9.9975e-5, 5.02e-5, 4.24e-7, 4e-7, 4.24e-7, 5.0199e-5, 1e-4, 4e-7, 9.9975e-5],
    "sine": [5.02e-5, 5.1764e-5, 1e-4, 5.1764e-5, 5.02e-5, 4.8635e-5, 4e-7, 5.0199e-5, 5.02e-5, 4.8635e-5],
    "cosine_with_restarts": [1e-4] * 10,
    "polynomial": [0, 1e-6, 5e-5, 9.9e-5, 1e-4, 9.991146e-5, 9.554818e-5, 9.104364e-5, 6.263595e-5, 8.313853e-7],
    "constant_with_warmup": [0, 1e-6, 5e-5, 9.9e-5, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4],
    "constant": [0, 1e-6, 5e-5, 9.9e-5, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4],  # lr_warmup_steps makes it the one above
    "linear": [0, 1e-6, 5e-5, 9.9e-5, 1e-4, 9.988889e-5, 9.444444e-5, 8.888889e-5, 5.555556e-5, 1.111111e-7],
    None: [0, 1e-6, 5e-5, 9.9e-5, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4],
}
WARMED_UP = ("polynomial", "constant_with_warmup", "constant", "linear", None)


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_are_simpletuners_step_by_step(name: str | None):
    imported = read({"lr_scheduler": name, "learning_rate": 1e-4, "lr_warmup_steps": 100, "max_train_steps": 1000})
    rates = [learning_rate_at(step, 1000, imported.job.optimizer) for step in STEPS]
    warm = [step < 100 and name in WARMED_UP for step in STEPS]
    for step, rate, theirs, warming_up in zip(STEPS, rates, RATES[name], warm, strict=True):
        expected = 1e-4 * (step + 1) / 101 if warming_up else theirs
        assert rate == pytest.approx(expected, abs=1.01e-9), step
        assert rate == pytest.approx(theirs, abs=1e-6), step  # a warm-up starts at a hundredth of the rate, not at 0
    if name in WARMED_UP:
        assert "From step 100 on the rates are equal" in line(imported, "lr_warmup_steps:")
    if name in ("cosine", "sine", "cosine_with_restarts", "constant"):
        assert {"cosine": "cosine_wave", "sine": "sine_wave", "constant": "constant_with_warmup"}.get(
            name, "becomes constant"
        ) in line(imported, "lr_scheduler:")


def test_schedules_without_a_warm_up():
    wave = read({"lr_scheduler": "cosine", "learning_rate": 1e-4})
    assert (wave.job.optimizer.lr_scheduler, wave.job.optimizer.lr_wave_steps) == ("cosine_wave", 1000)
    assert "so 1000" in line(wave, "lr_warmup_steps:")
    flat = read({"lr_scheduler": "constant", "learning_rate": 1e-4}).job.optimizer
    assert [learning_rate_at(step, 10, flat) for step in (0, 9)] == [1e-4, 1e-4]
    unset = read({"learning_rate": 1e-4}).job.optimizer
    assert [learning_rate_at(step, 10, unset) for step in (0, 9)] == [1e-4, 1e-4]
    polynomial = read({"lr_scheduler": "polynomial"}).job.optimizer
    assert (polynomial.lr_power, polynomial.lr_end) == (0.8, 4e-7)


@pytest.mark.parametrize(
    ("theirs", "ours", "constants"),
    [
        (None, "adamw", (0.9, 0.999, 0.01, 1e-6)),
        ("adamw_bf16", "adamw", (0.9, 0.999, 0.01, 1e-6)),
        ("torch-adamw", "adamw", (0.9, 0.999, 0.01, 1e-8)),
        ("optimi-adamw", "adamw", (0.9, 0.99, 0.0, 1e-6)),
        ("optimi-stableadamw", "adamw", (0.9, 0.99, 0.01, 1e-6)),
        ("bnb-adamw8bit-paged", "adamw-8bit", (0.9, 0.999, 0.01, 1e-6)),
        ("bnb-adam8bit", "adamw-8bit", (0.9, 0.999, 0.0, 1e-8)),
        ("adamw_schedulefree+aggressive", "adamw-schedulefree", (0.9, 0.999, 0.001, 1e-6)),
        ("prodigy", "prodigy", (0.9, 0.99, 0.0, 1e-8)),
        ("soap", "adamw", (0.9, 0.999, 0.01, 1e-8)),
    ],
)
def test_optimizers_have_simpletuners_constants(theirs: str | None, ours: str, constants: tuple[float, ...]):
    found = read({"optimizer": theirs}).job.optimizer
    assert found.optimizer == ours
    assert (found.adam_beta1, found.adam_beta2, found.weight_decay, found.adam_epsilon) == constants


def test_betas_and_decay_that_simpletuner_ignores():
    for name, decay in (("optimi-lion", 0.0), ("bnb-lion8bit-paged", 0.0), ("sdnq-lion", 0.01)):
        lion = read({"optimizer": name, "optimizer_beta1": 0.95, "optimizer_beta2": 0.98, "learning_rate": 3e-5})
        found = lion.job.optimizer
        assert (found.adam_beta1, found.lion_beta2, found.adam_beta2, found.weight_decay) == (0.95, 0.98, 0.999, decay)
    plain = read({"optimizer": "optimi-lion"}).job.optimizer
    assert (plain.adam_beta1, plain.lion_beta2, plain.weight_decay) == (0.9, 0.99, 0.0)
    one = read({"optimizer_beta2": 0.95, "adam_beta2": 0.9, "adam_weight_decay": 0.3, "adam_epsilon": 1e-6})
    assert (one.job.optimizer.adam_beta2, one.job.optimizer.weight_decay) == (0.999, 0.01)
    assert "only together" in line(one, "optimizer_beta2:")
    assert "only with DeepSpeed; its adamw_bf16 has 0.01" in line(one, "adam_weight_decay:")
    assert not [each for each in one.report if each.startswith("adam_epsilon:")]  # SimpleTuner's value too
    config = read({"optimizer_config": "weight_decay=0.3,eps=1e-7,kahan_sum=false"})
    assert (config.job.optimizer.weight_decay, config.job.optimizer.adam_epsilon) == (0.3, 1e-7)
    assert "kahan_sum=false" in line(config, "optimizer_config:")
    speed = read({"deepspeed_config": {"a": 1}, "adam_beta2": 0.9, "adam_weight_decay": 0.3}).job.optimizer
    assert (speed.adam_beta2, speed.weight_decay, speed.adam_epsilon) == (0.9, 0.3, 1e-8)
    without = read({"deepspeed_config": {"a": 1}, "adam_beta1": 0, "adam_weight_decay": 0}).job.optimizer
    assert (without.adam_beta1, without.weight_decay) == (0, 0)


def test_missing_keys_take_simpletuners_values_or_get_a_line():
    data = json.loads(plain_json(EDIT_V1))
    del data[0]["caption_strategy"]
    imported = read({"seed": 5}, data)
    assert imported.job.dataset.caption_strategy == "filename" and "file names" in line(
        imported, "my-edited-images.caption_strategy:"
    )
    none = read(caption_strategy=None)
    assert none.job.dataset.caption_strategy == "filename"
    assert "null, which is no caption in SimpleTuner" in line(none, "my-edited-images.caption_strategy:")
    assert imported.job.encoding.sizes.crop_style == "random"
    assert "share one crop here" in line(imported, "my-edited-images.crop_style:")
    assert imported.job.validation.validation_step_interval == 100 and imported.job.validation.validation_seed == 5
    assert "clips each element of the gradient at 2 (" in line(imported, "max_grad_norm:")
    assert read().job.validation.validation_seed == 0
    assert "validation_resolution '' (SimpleTuner's 256)" in line(read({"validation_resolution": None}), "Not in your")


@pytest.mark.parametrize(("area", "edge"), [(1.0, 1024), (0.25, 512), (0.5, 768), (2, 1536), (4.0, 2048), (1.04, 1024)])
def test_areas_that_simpletuner_rounds(area: float, edge: int):
    imported = read(resolution_type="area", resolution=area, minimum_image_size=0.25)
    sizes = imported.job.encoding.sizes
    assert (imported.job.encoding.resolution, sizes.resolution_type) == (edge, "pixel_area")
    assert sizes.minimum_image_size == pytest.approx(500)
    said = line(imported, "my-edited-images.resolution:")
    assert f"becomes {edge}" in said
    # calculate_new_size_by_pixel_area of SimpleTuner: only square pictures get the rounded area
    other = {1.0: 992, 0.25: 0, 0.5: 704, 2: 1408, 4.0: 1984, 1.04: 1024}[area]
    assert (f"about {other}²" in said) if other not in (0, edge) else ("other shapes" not in said)
    assert "other shapes" not in line(
        read(resolution_type="area", resolution=area, crop=True), said.split(":")[0] + ":"
    )


def test_resolutions_that_change_are_said():
    assert "512.5 becomes 512" in line(read(resolution=512.5), "my-edited-images.resolution:")
    assert "768 x 768" in line(read(resolution=704), "my-edited-images.resolution:")
    for same in (512, 768, 1024, 1328):
        assert not [each for each in read(resolution=same).report if each.startswith("my-edited-images.resolution:")]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("int8-torchao", "int8-quanto"),
        ("int8-sdnq", "int8-quanto"),
        ("fp8wo-torchao", "fp8-quanto"),
        ("uint4-sdnq", "int4-quanto"),
        ("fp16-sdnq", "none"),
    ],
)
def test_precisions_become_the_nearest(theirs: str, ours: str):
    imported = read({"base_model_precision": theirs, "text_encoder_1_precision": theirs, "quantize_via": "pipeline"})
    assert imported.job.model.base_model_precision == imported.job.model.text_encoder_precision == ours
    assert imported.job.model.quantize_via == "accelerator"
    for key in ("base_model_precision", "text_encoder_1_precision"):
        assert f"{theirs} is not supported; {ours} is used" in line(imported, f"{key}:")
    assert "pipeline becomes accelerator" in line(imported, "quantize_via:")


@pytest.mark.parametrize(
    ("theirs", "prefix", "words"),
    [
        ("comfyui", "diffusion_model", "converted: "),
        (" Diffusers", "transformer", "converted: "),
        ("kohya", "transformer", "lora_format: 'kohya' is neither comfyui nor diffusers; SimpleTuner takes diffusers."),
        (None, "diffusion_model", "lora_format"),
    ],
)
def test_the_naming_of_the_exported_file(theirs: str | None, prefix: str, words: str):
    imported = read({"lora_format": theirs})
    assert imported.job.export.layer_prefix == prefix
    assert words in line(imported, "lora_format:" if theirs == "kohya" else "config.json: converted: ")


def test_the_maximum_length_of_captions():
    imported = read({"tokenizer_max_length": "512"})
    assert imported.job.encoding.tokenizer_max_length == 512
    assert "longer captions and prompts are refused" in line(imported, "tokenizer_max_length: ")
    assert read({}).job.encoding.tokenizer_max_length == 1024
    with pytest.raises(ConfigError, match=r"tokenizer_max_length must be .* got 0"):
        read({"tokenizer_max_length": 0})


def test_guidance_that_simpletuner_ignores():
    """Its Qwen previews have true guidance 4, or validation_guidance_real above 1."""
    for config, guidance in (({"validation_guidance": None}, 4.0), ({}, 4.0), ({"validation_guidance": 7.5}, 7.5)):
        imported = read(config)
        assert imported.job.validation.validation_guidance == guidance
        said = [each for each in imported.report if each.startswith("validation_guidance")]
        assert said == ([] if guidance == 4 else [said[0]]) and all(
            "ignores it for Qwen-Image and uses 4" in s for s in said
        )
    assert read({"validation_guidance_real": 3}).job.validation.validation_guidance == 3.0


@pytest.mark.parametrize(
    ("theirs", "unlocked", "ours"), [(16, None, 32), (16, True, 16), (32, None, 32), (64, True, 32), (None, None, 32)]
)
def test_alignment_that_simpletuner_replaces(theirs: int | None, unlocked: bool | None, ours: int):
    imported = read({"aspect_bucket_alignment": theirs, "i_know_what_i_am_doing": unlocked})
    assert imported.job.encoding.sizes.aspect_bucket_alignment == ours
    said = [each for each in imported.report if each.startswith("aspect_bucket_alignment")]
    assert len(said) == (theirs not in (None, ours)) and all(f"{theirs} becomes 32" in each for each in said)


def test_zero_for_no_checkpoints_and_no_limit():
    imported = read({"checkpoint_step_interval": 0, "checkpoints_total_limit": 0})
    checkpoints = imported.job.checkpoints
    assert (checkpoints.checkpoint_step_interval, checkpoints.checkpoints_total_limit) == (1_000_000, 1_000_000)
    assert "only at the end" in line(imported, "checkpoint_step_interval:")
    assert "all are kept" in line(imported, "checkpoints_total_limit:")


@pytest.mark.parametrize(
    ("config", "first", "words"),
    [
        (
            {},
            {"instance_data_dir": "~nosuchuser/x"},
            "my-edited-images.instance_data_dir: ~nosuchuser/x: there is no user",
        ),
        ({"output_dir": "~nosuchuser/x"}, {}, "output_dir: .*there is no user"),
        ({"init_lora": "~nosuchuser/x"}, {}, "init_lora: .*there is no user"),
        ({"pretrained_model_name_or_path": "~nosuchuser/x"}, {}, "there is no user"),
        ({"output_dir": "C:\new"}, {}, "output_dir was read with .n as a line break"),
        ({"peft_lora_target_modules": "[1"}, {}, "peft_lora_target_modules is not JSON.*line 1, column 3"),
        ({"peft_lora_target_modules": True}, {}, "must be a list of layer names, got True"),
        ({"peft_lora_target_modules": [1]}, {}, r"must be a list of layer names, got \[1\]"),
        ({"lora_rank": 10**400}, {}, "lora_rank must be a number"),
        ({"lora_rank": "9" * 5000}, {}, "lora_rank must be a finite number"),
        ({"max_train_steps": 10**30}, {}, "max_train_steps"),
        ({}, {"conditioning_data": {"a": 1}}, "conditioning_data refers to"),
        ({}, {"disabled": [[]]}, r"my-edited-images.disabled must be true or false, got \[\[\]\]"),
        ({"validation_resolution": ["a"]}, {}, "validation_resolution"),
        ({"output_dir": "a" * 5000}, {}, "run_dir"),
    ],
)
def test_values_of_any_type_end_in_our_own_error(config: dict, first: dict, words: str):
    result = result_or_own_error(lambda: read(config, **first))
    assert isinstance(result, ConfigError) and re.search(words, str(result)), result


def test_links_of_any_type_are_no_links():
    data = json.loads(plain_json(EDIT_V1))
    data[1]["source_dataset_id"] = ["t"]
    data[2]["conditioning_image_embeds"] = {"a": []}
    assert read({}, data).job.dataset.reference_dirs == (str(Path("/datasets/reference-images")),)


def test_only_spellings_of_one_setting_are_said_to_mean_the_same(monkeypatch: pytest.MonkeyPatch):
    reference = {"id": "r", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "before"}
    reference |= {"source_dataset_id": "t", "resolution": 512, "resolution_type": "pixel", "crop": False}
    reference |= {"caption_strategy": "textfile", "instance_prompt": "draw"}
    target = {"id": "t", "type": "local", "dataset_type": "image", "instance_data_dir": "after"}
    report = read({}, [{**target, "conditioning_data": "r"}, reference]).report
    assert not [note for note in report if "means the same" in note]
    assert "r.caption_strategy, instance_prompt: ignored; the captions of the targets are used." in report
    report = read({}, [{**target, "conditioning_data": "r", "disabled": False, "disable": "no"}, reference]).report
    assert not [note for note in report if "means the same" in note]
