"""Convert SimpleTuner's config.json and multidatabackend.json into a job, with a report on every key."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import JobConfig, RolloutConfig, from_json
from ..disk import name_exists
from ..errors import ConfigError
from ..json_text import parse_json, read_json
from ..qwen_image.flavours import FLAVOURS, Flavour
from ..settings import changed
from ..text import brief, shown
from .backends import Backends, ids_of
from .datasets import INHERITED, read_data
from .keys import CONFIG_REASONS
from .model import read_model
from .optimizer import read_optimizer
from .section import Section, put
from .validation import read_validation

_ROLLOUT = "scheduled_sampling_"
_FOR_EVER = 1_000_000  # steps between checkpoints, or checkpoints to keep
_OTHER_INTERVALS = ("checkpointing_steps", "checkpointing_step_interval", "checkpoint_steps_interval")
_LONGEST_NAME = 60  # letters of a file name; file systems allow 255 bytes
MAX_BYTES = 2**20  # of a configuration file
_PREFIXES = {"diffusers": "transformer", "comfyui": "diffusion_model"}  # of names in the exported file, by lora_format
MOST_REFERENCES = max(row.max_references for row in FLAVOURS.values())
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
    ("noise.flow_schedule_auto_shift", ("flow_schedule_auto_shift",), Section.truth),
    ("noise.logit_std", ("flow_sigmoid_scale",), Section.number),
    ("noise.loss_type", ("loss_type",), Section.text),
    ("noise.huber_c", ("huber_c",), Section.number),
    ("noise.huber_schedule", ("huber_schedule",), Section.text),
    ("validation.validation_num_inference_steps", ("validation_num_inference_steps",), Section.whole),
    ("ema.use_ema", ("use_ema",), Section.truth),
    ("ema.ema_device", ("ema_device",), Section.text),
    ("ema.ema_decay", ("ema_decay",), Section.number),
    ("ema.ema_update_interval", ("ema_update_interval",), Section.whole),
    ("ema.ema_validation", ("ema_validation",), Section.text),
    ("encoding.validation_negative_prompt", ("validation_negative_prompt",), Section.text),
    ("encoding.tokenizer_max_length", ("tokenizer_max_length",), Section.whole),
)
# Our settings whose defaults differ from SimpleTuner's, and SimpleTuner's. They keep ours if the files don't set them.
_THEIR_DEFAULTS = {
    "optimizer.learning_rate": "4e-7",
    "lora.lora_dropout": "0.1",
    "batching.caption_dropout_probability": "0.1",
    "noise.flow_schedule_shift": "3.0",
    "batching.train_batch_size": "4",
    "batching.gradient_accumulation_steps": "1",
    "validation.validation_resolution": "256",
    "checkpoints.checkpoint_step_interval": "500",
    "checkpoints.checkpoints_total_limit": "5",
    "encoding.validation_negative_prompt": "'blurry, cropped, ugly'",
    "export.layer_prefix": "'transformer'",
}
_NAMED_OTHERWISE = {"layer_prefix": "lora_format"}  # SimpleTuner's names of these settings


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
    named = data_file_of(settings, str(config))
    if data is None and not named:
        raise ConfigError(f"{config} has no data_backend_config. Give the data file with --data.")
    if data is None and not name_exists(root / named):
        raise ConfigError(
            f"{config} names the data file {shown(named)}, but it is not in {root}, where relative paths start. Run "
            "the command in the folder in which SimpleTuner is started, or give the file with --data."
        )
    datasets = read_json(data or root / named, loose=True, max_bytes=MAX_BYTES)
    imported = convert(settings, datasets, base=base, root=root, changes=changes)
    places = f"Relative paths start at {root}. Encoded pairs are stored in `cache` next to the job."
    return dataclasses.replace(imported, report=(*imported.report, places))


def data_file_of(settings: object, name: str) -> str:
    """The data file that parsed `settings` name; empty if they name none. `name` stands for the file in messages.

    Raises:
        ConfigError: this isn't a configuration.
    """
    if not isinstance(settings, dict):
        hint = " This looks like multidatabackend.json, the data file." if isinstance(settings, list) else ""
        raise ConfigError(
            f"{name} must be an object with named settings, as config.json is, got {brief(settings)}.{hint}"
        )
    named = typing.cast("dict[str, Any]", settings).get("data_backend_config")
    return named if isinstance(named, str) else ""


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
    values |= {"model": read_model(section, flavour, base, root), **found.values}
    values |= {"cache_dir": "cache", "run_dir": f"runs/{_file_name(found.name)}"}
    for ours, theirs, read in _SAME:
        value = read(section, *theirs)
        if value is not None:
            put(values, ours, value)
    _checkpoints(section, values)
    read_optimizer(section, values)
    _lora(section, values, root)
    _rollout(section, values)
    _noise(section, values, found.offset)
    read_validation(section, values, values.get("seed"))
    _steps_and_folders(section, values, root)
    _rest(section, values)
    unused = " gradient_checkpointing applies only with manual." if "gradient_checkpointing" in section else ""
    section.note(
        "memory.memory",
        f"auto. The trainer chooses for your card what is recomputed, offloaded, streamed and compiled.{unused}",
    )
    section.explain(CONFIG_REASONS)
    values = changed(values, changes)
    job = from_json(JobConfig, values)
    return Imported(job, values, _arranged([*notes, *_defaults_to_report(section, values, job)]))


def _defaults_to_report(section: Section, values: Mapping[str, Any], job: JobConfig) -> list[str]:
    """A line on the settings that are not in the files and have another default than in SimpleTuner."""
    listed = [] if "seed" in section else [f"seed {job.seed} (SimpleTuner's is random)"]
    for dotted, theirs in _THEIR_DEFAULTS.items():
        group, name = dotted.split(".")
        if name not in values.get(group, {}) and _NAMED_OTHERWISE.get(name, name) not in section:
            listed.append(f"{name} {getattr(getattr(job, group), name)!r} (SimpleTuner's {theirs})")
    return [f"Not in your files, so this trainer's defaults apply: {', '.join(listed)}."] if listed else []


def _arranged(notes: Iterable[str]) -> tuple[str, ...]:
    """The lines of the report, with one for all keys of which the same is said.

    Lines on what is unknown or left out by mistake come first, and lists of converted keys last.
    """
    keys: dict[str, list[str]] = {}
    for line in notes:
        key, _, text = line.partition(": ")
        keys.setdefault(text, []).append(key)
    lines = [f"{', '.join(each)}: {text}" for text, each in keys.items()]
    return tuple(
        sorted(lines, key=lambda line: (": converted: " in line, "UNKNOWN" not in line and "LEFT OUT" not in line))
    )


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip(".")[:_LONGEST_NAME] or "lora"


def _kind(section: Section) -> Flavour:
    """The flavour. Raises ConfigError if this is not the configuration of an edit LoRA."""
    for key, allowed in (("model_family", "qwen_image"), ("model_type", "lora")):
        value = section.text(key)
        if value is None and key == "model_type":
            section.note(key, "not given; a LoRA is trained.")
        elif value not in (None, allowed):
            raise ConfigError(
                f"{key} must be {allowed}, got {brief(value)}. Only LoRAs for Qwen-Image-Edit are trained."
            )
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
        raise ConfigError(f"model_flavour must be one of {', '.join(known)}, got {brief(name)}.")
    return known[name]


def _checkpoints(section: Section, values: dict[str, Any]) -> None:
    """Intervals and numbers of checkpoints. SimpleTuner takes 0 for none in between and for no limit."""
    for key, others, meaning in (
        ("checkpoint_step_interval", _OTHER_INTERVALS, "only at the end of a run"),
        ("checkpoints_total_limit", ("save_total_limit",), "all are kept"),
    ):
        value = section.whole(key, *others)
        if value is not None and value <= 0:
            section.note(key, f"{value} means {meaning}; it becomes {_FOR_EVER}.")
            value = _FOR_EVER
        if value is not None:
            put(values, f"checkpoints.{key}", value)


def _lora(section: Section, values: dict[str, Any], root: Path) -> None:
    if section.truth("use_dora"):
        put(values, "lora.lora_type", "dora")
    targets = section.take("peft_lora_target_modules")
    if isinstance(targets, str) and targets.lstrip().startswith("["):
        targets = parse_json(targets, "peft_lora_target_modules")
    if targets:
        named = [targets] if isinstance(targets, str) else targets
        if not isinstance(named, list) or not all(isinstance(each, str) and each.strip() for each in named):
            raise ConfigError(f"peft_lora_target_modules must be a list of layer names, got {brief(targets)}.")
        put(values, "lora.lora_targets", "pattern")
        put(values, "lora.lora_target_pattern", rf"(?:.*\.)?(?:{'|'.join(re.escape(each.strip()) for each in named)})")
    if start := section.path(root, "init_lora"):
        put(values, "lora.init_lora", start)
    if form := section.text("lora_format"):
        prefix = _PREFIXES.get(form.strip().lower())
        if prefix is None:
            section.note("lora_format", f"{brief(form)} is neither comfyui nor diffusers; SimpleTuner takes diffusers.")
        put(values, "export.layer_prefix", prefix or _PREFIXES["diffusers"])


def _rollout(section: Section, values: dict[str, Any]) -> None:
    """Read scheduled sampling, whose settings have the same names here."""
    readers = {int: Section.whole, float: Section.number, bool: Section.truth}
    for name, hint in typing.get_type_hints(RolloutConfig).items():
        value = readers.get(hint, Section.text)(section, name)
        if value is not None:
            put(values, f"rollout.{name}", value)
    rollout = values.get("rollout", {})
    if not rollout.get(f"{_ROLLOUT}max_step_offset"):
        return
    for end in ("start", "end") if rollout.get(f"{_ROLLOUT}ramp_steps") else ():
        if rollout.get(f"{_ROLLOUT}prob_{end}", 0 if end == "start" else None) == 0:
            probability = rollout.get(f"{_ROLLOUT}probability", 0.0)
            if not probability:
                continue
            rollout[f"{_ROLLOUT}prob_{end}"] = probability
            section.note(
                f"{_ROLLOUT}prob_{end}",
                f"0 becomes {probability:g}: SimpleTuner then takes scheduled_sampling_probability.",
            )
    if rollout.get(f"{_ROLLOUT}sampler", "unipc") != "euler":
        section.note(
            f"{_ROLLOUT}sampler", "SimpleTuner ignores it for Qwen and takes Euler steps. Set euler for the same steps."
        )
    if rollout.get(f"{_ROLLOUT}reflexflow", True):
        section.note(
            f"{_ROLLOUT}reflexflow", "applies to rolled-out pairs only. SimpleTuner adds its terms to all pairs."
        )


def _noise(section: Section, values: dict[str, Any], offset: float) -> None:
    shift = section.number("flow_schedule_shift")
    if shift == 0 and not values.get("noise", {}).get("flow_schedule_auto_shift"):
        shift = 1.0
        section.note("flow_schedule_shift", "0 means no shift, which is 1 here.")
    if shift:
        put(values, "noise.flow_schedule_shift", shift)
    if section.truth("flow_use_uniform_schedule"):
        put(values, "noise.sigma_distribution", "uniform")
        ignored = [part.pop("timestep_sampling_offset", 0) for part in values.get("datasets", ())]
        if any(ignored):
            section.note(
                "timestep_sampling_offset",
                "left out, because flow_use_uniform_schedule is true. SimpleTuner ignores it.",
            )
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
    else:
        section.note(
            "max_train_steps",
            "neither it nor num_train_epochs sets the length, so 1000, this trainer's default. SimpleTuner trains one "
            "epoch: pairs x (repeats + 1) / (train_batch_size x gradient_accumulation_steps).",
        )
    folder = section.path(root, "output_dir")
    if folder:
        values["run_dir"] = str(Path(folder) / "qwen_edit_trainer")
        put(values, "export.lora_name", _file_name(Path(folder).name))
        section.note("output_dir", f"the run is stored in {values['run_dir']}, next to SimpleTuner's own files.")


def _rest(section: Section, values: dict[str, Any]) -> None:
    section.take("data_backend_config")
    if "tokenizer_max_length" in section:
        section.note(
            "tokenizer_max_length",
            "longer captions and prompts are refused. SimpleTuner ignores this option for Qwen-Image.",
        )
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
    _alignment(section, values)


def _alignment(section: Section, values: dict[str, Any]) -> None:
    """SimpleTuner replaces any aspect_bucket_alignment of Qwen-Image by 32, unless it is told not to."""
    step = section.whole("aspect_bucket_alignment")
    if step == 16 and section.truth("i_know_what_i_am_doing"):
        values["encoding"].setdefault("sizes", {})["aspect_bucket_alignment"] = step
    elif step not in (None, 32):
        section.note("aspect_bucket_alignment", f"{step} becomes 32, as in SimpleTuner, because Qwen-Image needs it.")
