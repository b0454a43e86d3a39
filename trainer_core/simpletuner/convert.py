"""Convert SimpleTuner's config.json and multidatabackend.json into a job, with a report on every key."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DEMO_MODEL, ENDLESS, JobConfig, RolloutConfig, from_json
from ..config.model import EIGHT_BITS
from ..errors import ConfigError
from ..json_text import read_json
from ..qwen_image.flavours import FLAVOURS, Flavour
from ..settings import changed
from .backends import Backends, ids_of
from .datasets import INHERITED, read_data
from .keys import CONFIG_REASONS
from .section import Section, put
from .validation import read_validation

_PRECISIONS = {
    "no_change": "none",
    "fp8uz-quanto": "fp8-quanto",
    "int8-torchao": "int8-quanto",
    "fp8-torchao": "fp8-quanto",
    "int4-torchao": "int4-quanto",
}
MAX_BYTES = 2**20  # of a configuration file
MOST_REFERENCES = max(row.max_references for row in FLAVOURS.values())
_SCHEDULERS = {"sine": "cosine"}
# Part of SimpleTuner's optimizer name -> our name. The first match counts.
_OPTIMIZERS = {
    "schedulefree": "adamw-schedulefree",
    "adamw8bit": "adamw-8bit",
    "adamw": "adamw",
    "lion": "lion",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
}
# our setting, SimpleTuner's spellings, reader
_SAME: tuple[tuple[str, tuple[str, ...], Callable[..., Any]], ...] = (
    ("seed", ("seed",), Section.whole),
    ("gradient_checkpointing", ("gradient_checkpointing",), Section.truth),
    ("batching.train_batch_size", ("train_batch_size",), Section.whole),
    ("batching.gradient_accumulation_steps", ("gradient_accumulation_steps",), Section.whole),
    ("batching.caption_dropout_probability", ("caption_dropout_probability",), Section.number),
    ("lora.lora_rank", ("lora_rank",), Section.whole),
    ("lora.lora_alpha", ("lora_alpha",), Section.number),
    ("lora.lora_dropout", ("lora_dropout",), Section.number),
    ("lora.use_rslora", ("use_rslora",), Section.truth),
    ("optimizer.learning_rate", ("learning_rate",), Section.number),
    ("optimizer.lr_warmup_steps", ("lr_warmup_steps",), Section.whole),
    ("optimizer.lr_num_cycles", ("lr_num_cycles",), Section.whole),
    ("optimizer.lr_power", ("lr_power",), Section.number),
    ("optimizer.lr_end", ("lr_end",), Section.number),
    ("optimizer.adam_beta1", ("adam_beta1", "optimizer_beta1"), Section.number),
    ("optimizer.adam_beta2", ("adam_beta2", "optimizer_beta2"), Section.number),
    ("optimizer.weight_decay", ("adam_weight_decay", "optimizer_weight_decay"), Section.number),
    ("optimizer.adam_epsilon", ("adam_epsilon",), Section.number),
    ("noise.flow_schedule_auto_shift", ("flow_schedule_auto_shift",), Section.truth),
    ("noise.logit_std", ("flow_sigmoid_scale",), Section.number),
    ("noise.loss_type", ("loss_type",), Section.text),
    ("noise.huber_c", ("huber_c",), Section.number),
    ("noise.huber_schedule", ("huber_schedule",), Section.text),
    (
        "checkpoints.checkpoint_step_interval",
        ("checkpoint_step_interval", "checkpointing_steps", "checkpointing_step_interval", "checkpoint_steps_interval"),
        Section.whole,
    ),
    ("checkpoints.checkpoints_total_limit", ("checkpoints_total_limit",), Section.whole),
    (
        "validation.validation_step_interval",
        ("validation_step_interval", "validation_steps", "validation_steps_interval", "validation_step_interval_steps"),
        Section.whole,
    ),
    ("validation.validation_num_inference_steps", ("validation_num_inference_steps",), Section.whole),
    ("validation.validation_seed", ("validation_seed",), Section.whole),
    ("ema.use_ema", ("use_ema",), Section.truth),
    ("ema.ema_device", ("ema_device",), Section.text),
    ("ema.ema_decay", ("ema_decay",), Section.number),
    ("ema.ema_update_interval", ("ema_update_interval",), Section.whole),
    ("ema.ema_validation", ("ema_validation",), Section.text),
    ("encoding.validation_negative_prompt", ("validation_negative_prompt",), Section.text),
)
# SimpleTuner's defaults that differ from ours.
_THEIR_DEFAULTS = {
    "learning_rate": "4e-7",
    "lora_dropout": "0.1",
    "caption_dropout_probability": "0.1",
    "flow_schedule_shift": "3.0",
    "train_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "lr_warmup_steps": "0",
    "checkpoint_step_interval": "500",
    "checkpoints_total_limit": "5",
    "validation_negative_prompt": "'blurry, cropped, ugly'",
}


@dataclass(frozen=True, slots=True)
class Imported:
    """The job, its JSON without default values, and a report with a line on every key that needs attention."""

    job: JobConfig
    values: dict[str, Any]
    report: tuple[str, ...]


def import_simpletuner(
    config: Path, data: Path | None = None, *, base: str = "", root: Path, changes: Sequence[str] = ()
) -> Imported:
    """Import both files. Relative paths in them start at `root`, the folder in which SimpleTuner was started.

    `changes` are settings of the job that replace the imported ones, each as `name=value`.

    Raises:
        ConfigError: a file can't be read, it is not for an edit LoRA, an id doesn't exist, or a value is out of range.
    """
    settings = read_json(config, loose=True, max_bytes=MAX_BYTES)
    if data is None:
        named = settings.get("data_backend_config") if isinstance(settings, dict) else None
        if not isinstance(named, str):
            raise ConfigError(f"{config} has no data_backend_config. Give the data file with --data.")
        data = root / named
    imported = convert(
        settings, read_json(data, loose=True, max_bytes=MAX_BYTES), base=base, root=root, changes=changes
    )
    places = f"Relative paths start at {root}. Encoded pairs are stored in `cache` next to the job."
    return dataclasses.replace(imported, report=(*imported.report, places))


def convert(settings: object, datasets: object, *, base: str = "", root: Path, changes: Sequence[str] = ()) -> Imported:
    """Convert parsed `settings` (config.json) and `datasets` (multidatabackend.json) into a job."""
    notes: list[str] = []
    section = Section(settings, "", notes)
    values: dict[str, Any] = {}
    flavour = _kind(section)
    inherited = {key: section.take(key) for key in INHERITED}
    backends = Backends(datasets, ids_of(section.take("eval_dataset_id")), notes)
    alone = (
        section.text("conditioning_multidataset_sampling") == "random"
    )  # each turn shows one of up to three references
    found = read_data(backends, inherited, root, MOST_REFERENCES if alone else flavour.max_references, notes)
    values |= {"model": _model(section, flavour, base, root), **found.values}
    values |= {"cache_dir": "cache", "run_dir": f"runs/{_file_name(found.name)}"}
    missing = [name for name in _THEIR_DEFAULTS if name not in section]
    for ours, theirs, read in _SAME:
        value = read(section, *theirs)
        if value is not None:
            put(values, ours, value)
    _optimizer(section, values)
    _rollout(section, values)
    _noise(section, values, found.offset)
    read_validation(section, values)
    _steps_and_folders(section, values, root)
    _rest(section, values)
    notes.append(
        "memory is auto: what is recomputed, offloaded, streamed and compiled is chosen for the device. "
        "gradient_checkpointing applies only with memory.memory manual."
    )
    section.explain(CONFIG_REASONS)
    values = changed(values, changes)
    job = from_json(JobConfig, values)
    if "num_eval_images" not in section:
        _held_out_unasked(section, job)
    listed = ", ".join(f"{name} (SimpleTuner's {_THEIR_DEFAULTS[name]})" for name in missing)
    notes += [f"Not in your files, so this trainer's defaults apply: {listed}."] if missing else []
    notes.sort(key=lambda line: "UNKNOWN" not in line and "LEFT OUT" not in line)
    return Imported(job, values, tuple(notes))


def _held_out_unasked(section: Section, job: JobConfig) -> None:
    """Report held-out pairs that nobody asked for. SimpleTuner validates on training pairs instead."""
    held = max(part.encoding.num_eval_images for part in job.parts())
    if held > 0 and not job.eval_dataset_id:
        section.note(
            "num_eval_images",
            f"neither it nor eval_dataset_id is given, so {held} pairs of each data set are kept out of training for "
            "validation. With encoding.num_eval_images 0 all pairs are trained on and no pictures are sampled.",
        )


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip(".") or "lora"


def _kind(section: Section) -> Flavour:
    """The flavour. Raises ConfigError if this is not the configuration of an edit LoRA."""
    for key, allowed in (("model_family", "qwen_image"), ("model_type", "lora")):
        value = section.text(key)
        if value is None and key == "model_type":
            section.note(key, "not given; a LoRA is trained.")
        elif value not in (None, allowed):
            raise ConfigError(f"{key} must be {allowed}, got {value!r}. Only LoRAs for Qwen-Image-Edit are trained.")
    if (section.text("lora_type") or "standard") != "standard":
        section.note(
            "lora_type", "a standard LoRA is trained. Of LyCORIS only LoKr is supported, with lora.lora_type lokr."
        )
    name = section.text("model_flavour", "model_flavor")
    if name == "edit-v2+":
        section.note("model_flavour", "edit-v2+ (2509 with 2511's timestep of references) is trained as edit-v2.")
        name = "edit-v2"
    known = {str(each): row for each, row in FLAVOURS.items()}
    if name not in known:
        raise ConfigError(f"model_flavour must be one of {', '.join(known)}, got {name!r}.")
    return known[name]


def _model(section: Section, flavour: Flavour, base: str, root: Path) -> dict[str, Any]:
    """The files and precisions of the base model."""
    model: dict[str, Any] = {"flavour": flavour.name}
    named = section.text("pretrained_model_name_or_path")
    local = root / Path(named).expanduser() if named else None
    if base:
        model["base"] = base if base == DEMO_MODEL else str(root / Path(base).expanduser())
    elif local and local.is_dir():
        model["base"] = str(local)
    else:
        model["base"] = str(root / "models" / (named or flavour.released_as).split("/")[-1])
        section.note(
            "pretrained_model_name_or_path",
            f"nothing is downloaded. Put {named or flavour.released_as} into {model['base']}, or change model.base.",
        )
    for part in ("transformer", "vae"):
        key = f"pretrained_{part}_model_name_or_path"
        file = section.text(key)
        if file and file.endswith((".safetensors", ".gguf")):
            model[f"{part}_file"] = str(root / Path(file).expanduser())
        elif file:
            section.note(
                key, f"left out; the {part} of model.base is used. Set model.{part}_file to use a single file."
            )
    precision = section.text("base_model_precision")
    if precision in _PRECISIONS and precision != "no_change":
        section.note("base_model_precision", f"{precision} is not supported; {_PRECISIONS[precision]} is used.")
    via = section.text("quantize_via")
    mixed = section.text("mixed_precision")
    if mixed not in (None, "bf16", "no"):
        section.note("mixed_precision", f"{mixed} is not supported; bf16 is used.")
        mixed = "bf16"
    model |= {"base_model_precision": _PRECISIONS.get(precision, precision)} if precision else {}
    model |= {"quantize_via": "accelerator" if via == "pipeline" else via} if via else {}
    model |= _other_precisions(section, str(model.get("base_model_precision", "none")))
    return model | ({"mixed_precision": mixed} if mixed else {})


def _other_precisions(section: Section, precision: str) -> dict[str, Any]:
    """The precisions of the activations and of the text encoder."""
    found: dict[str, Any] = {}
    if section.truth("quantize_activations"):
        if precision in EIGHT_BITS:
            found["quantize_activations"] = True
        else:
            section.note("quantize_activations", f"left out, because it works only with {' and '.join(EIGHT_BITS)}.")
    text_encoder = section.text("text_encoder_1_precision", "text_encoder_precision")
    if text_encoder:
        found["text_encoder_precision"] = _PRECISIONS.get(text_encoder, text_encoder)
    return found


def _optimizer(section: Section, values: dict[str, Any]) -> None:
    name = section.text("optimizer")
    if name:
        plain = name.lower().replace("_", "").replace("-", "")
        taken = next((ours for part, ours in _OPTIMIZERS.items() if part in plain), "adamw")
        put(values, "optimizer.optimizer", taken)
        if name.replace("_", "-") != taken:
            section.note("optimizer", f"{name} becomes {taken}.")
        _learning_rate_for(name, taken, section, values["optimizer"])
    scheduler = section.text("lr_scheduler")
    if scheduler in _SCHEDULERS:
        section.note("lr_scheduler", f"{scheduler} becomes {_SCHEDULERS[scheduler]}.")
    if scheduler == "constant":
        put(values, "optimizer.lr_warmup_steps", 0)
    if scheduler:
        put(values, "optimizer.lr_scheduler", _SCHEDULERS.get(scheduler, scheduler))
    _schedule_for(section, values)
    _clipping_and_targets(section, values)


def _learning_rate_for(theirs: str, ours: str, section: Section, optimizer: dict[str, Any]) -> None:
    """Drop a learning rate that was chosen for an optimizer we do not have."""
    rate = optimizer.get("learning_rate")
    if ours == "prodigy" and (rate is None or not 0.1 <= rate <= 10):
        optimizer["learning_rate"] = 1.0
        section.note("learning_rate", "becomes 1, a factor on the rate that prodigy finds.")
    elif ours == "adamw" and "adam" not in theirs.lower():
        section.note(
            "learning_rate", f"was chosen for {theirs}; AdamW usually needs 1e-4 for ranks up to 16 and 5e-5 above."
        )
        if rate is not None and not 0 < rate < 0.01:
            del optimizer["learning_rate"]


def _schedule_for(section: Section, values: dict[str, Any]) -> None:
    """Replace schedules that the optimizer does not support. SimpleTuner ignores them silently."""
    optimizer = values.get("optimizer", {})
    falling = optimizer.get("lr_scheduler", "constant_with_warmup") not in ENDLESS
    if optimizer.get("optimizer") == "adamw-schedulefree" and falling:
        optimizer["lr_scheduler"] = "constant_with_warmup"
        section.note("lr_scheduler", "becomes constant_with_warmup; adamw-schedulefree takes no other.")


def _clipping_and_targets(section: Section, values: dict[str, Any]) -> None:
    norm, method = section.number("max_grad_norm"), section.text("grad_clip_method")
    if norm is not None and method == "norm":
        put(values, "optimizer.max_grad_norm", norm)
    elif norm is not None:
        section.note(
            "max_grad_norm",
            f"left out. SimpleTuner clips each element at {norm:g} (grad_clip_method value), but this trainer limits "
            "the norm of the whole gradient, by default to 1.",
        )
    if section.truth("use_dora"):
        put(values, "lora.lora_type", "dora")
    targets = section.take("peft_lora_target_modules")
    if targets:
        targets = json.loads(targets) if isinstance(targets, str) and targets.startswith("[") else targets
        endings = "|".join(re.escape(str(each)) for each in ([targets] if isinstance(targets, str) else targets))
        put(values, "lora.lora_targets", "pattern")
        put(values, "lora.lora_target_pattern", rf"(?:.*\.)?(?:{endings})")


def _rollout(section: Section, values: dict[str, Any]) -> None:
    """Read scheduled sampling, whose settings have the same names here."""
    readers = {int: Section.whole, float: Section.number, bool: Section.truth}
    for name, hint in typing.get_type_hints(RolloutConfig).items():
        value = readers.get(hint, Section.text)(section, name)
        if value is not None:
            put(values, f"rollout.{name}", value)


def _noise(section: Section, values: dict[str, Any], offset: float) -> None:
    shift = section.number("flow_schedule_shift")
    if shift == 0 and not values.get("noise", {}).get("flow_schedule_auto_shift"):
        shift = 1.0
        section.note("flow_schedule_shift", "0 means no shift, which is 1 here.")
    if shift:
        put(values, "noise.flow_schedule_shift", shift)
    if section.truth("flow_use_uniform_schedule"):
        put(values, "noise.sigma_distribution", "uniform")
    if offset:
        put(values, "noise.logit_mean", offset * values.get("noise", {}).get("logit_std", 1.0))


def _steps_and_folders(section: Section, values: dict[str, Any], root: Path) -> None:
    steps, epochs = section.whole("max_train_steps"), section.number("num_train_epochs")
    if steps and steps > 0:
        values["max_train_steps"] = steps
        if epochs:
            section.note("num_train_epochs", f"left out, because max_train_steps ({steps}) sets the length.")
    elif epochs:
        section.note(
            "num_train_epochs",
            f"left out. The length is set in steps. Set max_train_steps to {epochs:g} x pairs x (repeats + 1) / "
            "(train_batch_size x gradient_accumulation_steps); the default is 1000.",
        )
    folder = section.text("output_dir")
    if folder:
        values["run_dir"] = str(root / Path(folder).expanduser() / "qwen_edit_trainer")
        put(values, "export.lora_name", _file_name(Path(folder).name))
        section.note("output_dir", f"the run is stored in {values['run_dir']}, next to SimpleTuner's own files.")
    if start := section.text("init_lora"):
        put(values, "lora.init_lora", str(root / Path(start).expanduser()))


def _rest(section: Section, values: dict[str, Any]) -> None:
    section.take("data_backend_config")
    extra = section.inside("model_kwargs")
    if extra is not None:
        match = extra.truth("match_target_res")
        if match is not None:
            put(values, "encoding.match_target_res", match)
        extra.explain({})
    if sampling := section.text("conditioning_multidataset_sampling"):
        put(values, "encoding.conditioning_multidataset_sampling", sampling)
    elif any(len(part["dataset"]["reference_dirs"]) > 1 for part in values.get("datasets", [values])):
        section.note(
            "conditioning_multidataset_sampling",
            "not given, so combined: all references of a pair are used together. SimpleTuner's default is random.",
        )
    step = section.whole("aspect_bucket_alignment")
    if step in (16, 32):
        values["encoding"].setdefault("sizes", {})["aspect_bucket_alignment"] = step
    elif step is not None:
        section.note(
            "aspect_bucket_alignment", f"left out; {step} is not 16 or 32. 32 is used, as Qwen-Image-Edit expects."
        )
