"""Import multidatabackend.json: folders of targets, references and masks, captions, sizes and crops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import is_plain_name
from ..text import brief, shown
from .backends import CACHES, MASKS, Backends, ids_of
from .captions import read_captions
from .keys import DATA_REASONS
from .section import Section, path_of, words

_SIZE_LIMITS = ("maximum_image_size", "target_downsample_size")
# SimpleTuner takes an area within _SAME_AREA of these (in megapixels) for a square of this side in pixels.
_USUAL_AREAS = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}
_SAME_AREA = 0.05
_ALIGNMENT = 32  # pixels
# Defaults for all data sets, which config.json may contain.
INHERITED = words(
    "resolution resolution_type caption_strategy instance_prompt crop crop_style crop_aspect minimum_image_size "
    "maximum_image_size target_downsample_size prepend_instance_prompt only_instance_prompt disable_multiline_split"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedData:
    """What the data file contributes to a job.

    `values` has `dataset` or `datasets`, `encoding` and `eval_dataset_id` of the job's JSON, `name` is a name for the
    run, and `offset` is the timestep_sampling_offset of all data sets; 0 if `datasets` has one for each.
    """

    values: dict[str, Any]
    name: str
    offset: float


def read_data(
    backends: Backends, inherited: dict[str, Any], root: Path, max_references: int, notes: list[str]
) -> ImportedData:
    """Read all entries of the data file.

    Raises:
        ConfigError: an id does not exist, a data set is not a local folder, or references are missing.
    """
    names = backends.main()
    parts, offsets, used, cut = [], {}, set(names), {}
    known: set[str] = set()
    for name in names:
        entry = {**{key: value for key, value in inherited.items() if value is not None}, **backends.entries[name]}
        section = Section(entry, name, notes)
        references, masks, beyond = _linked(backends, section, name, max_references)
        used |= {*references, *masks}
        cut |= beyond
        parts.append(_part(backends, section, references, masks, root))
        offset = section.number("timestep_sampling_offset")
        if name not in backends.eval_ids:
            offsets[name] = offset or 0.0
        section.explain(DATA_REASONS)
        known |= section.asked
    for other in backends.entries:
        if other not in names:
            _other(backends, other, used, cut, known, notes)
    first = next(iter(offsets))
    if len(set(offsets.values())) > 1:
        for part in parts:
            part |= {"timestep_sampling_offset": each} if (each := offsets.get(part["id"])) else {}
        offsets[first] = 0.0
    evals = [name for name in names if name in backends.eval_ids]
    return ImportedData(values=_job_values(parts, evals, notes), name=first, offset=offsets[first])


def _job_values(parts: list[dict[str, Any]], evals: list[str], notes: list[str]) -> dict[str, Any]:
    """One data set as `dataset`, several as `datasets`. The settings that all share go into `encoding`."""
    if all(part.get("is_regularisation_data") for part in parts if part["id"] not in evals):
        raise ConfigError(
            "is_regularisation_data is true in all data sets, so there is nothing to learn. Set it to false in those "
            "that show edits."
        )
    if len(parts) == 1:
        part = parts[0]
        if part.get("repeats", 0) or part.get("probability", 1) != 1:
            notes.append(
                f"{part['id']}.repeats, probability: with one data set they change only the length of an epoch."
            )
        return {"dataset": part["dataset"], "encoding": part["encoding"]}
    shared = _take_shared([part["encoding"] for part in parts])
    sizes = [part["encoding"].get("sizes", {}) for part in parts]
    if shared_sizes := _take_shared(sizes):
        shared["sizes"] = shared_sizes
    for part in parts:
        part["encoding"] = {key: value for key, value in part["encoding"].items() if value != {}}
    own = [{key: value for key, value in part.items() if value != {}} for part in parts]
    return {"datasets": own, "encoding": shared, **({"eval_dataset_id": evals} if evals else {})}


def _take_shared(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Remove the settings that are equal in all objects and return them."""
    shared = {
        key: value
        for key, value in objects[0].items()
        if key != "sizes" and all(key in each and each[key] == value for each in objects)
    }
    for each in objects:
        for key in shared:
            del each[key]
    return shared


def _part(backends: Backends, section: Section, references: list[str], masks: list[str], root: Path) -> dict[str, Any]:
    """One entry of `datasets`."""
    name = section.take("id")
    folders = [_folder(backends.entries[each], each, root) for each in references]
    dataset: dict[str, Any] = {
        "target_dir": _folder(backends.entries[name], name, root),
        "reference_dirs": folders,
    }
    if masks:
        dataset["mask_dir"] = _folder(backends.entries[masks[0]], masks[0], root)
        section.note("conditioning_data", f"masks from {masks[0]}: white counts in the loss, black does not.")
    section.settle("type", "disabled", "disable", "dataset_type", "instance_data_dir", "instance_data_root")
    section.knows("conditioning_type", "source_dataset_id")  # only references and masks have them
    read_captions(backends, section, dataset, root)
    kinds = [backends.entries[each].get("conditioning_type") or "auto" for each in references]
    if set(kinds) - {"auto"}:
        dataset["conditioning_type"] = kinds if len(set(kinds)) > 1 else kinds[0]
    encoding = {**_sizes(section), **_image_embeds(backends, section, name)}
    # SimpleTuner samples no data set without references
    if section.truth("disable_validation") or not (references or name in backends.eval_ids):
        encoding |= {"num_eval_images": 0, "train_eval_images": False}
    return {"id": name, "dataset": dataset, "encoding": encoding, **_turns(section), **_regularisation(section)}


def _image_embeds(backends: Backends, section: Section, name: str) -> dict[str, Any]:
    """The visual token cache that a data set refers to. Its entry in the file means that it may be created."""
    embeds = section.take("conditioning_image_embeds")
    if embeds is None:
        return {}
    known = backends.of_kind("conditioning_image_embeds")
    found = backends.named(embeds, f"{name}.conditioning_image_embeds", known)
    if not is_plain_name(found):
        section.note(
            "conditioning_image_embeds", f"left out; {brief(found)} is not a valid folder name. The default is used."
        )
        return {}
    return {"conditioning_image_embeds": found, "create_image_embeds": True}


def _turns(section: Section) -> dict[str, Any]:
    """repeats and probability, unless they have their defaults."""
    repeats, probability = section.whole("repeats") or 0, section.number("probability")
    turns: dict[str, Any] = {"repeats": max(0, repeats)} if repeats > 0 else {}
    if probability is not None and not (probability == 0 or 0.01 <= probability <= 1):
        section.note(
            "probability", f"{probability:g} becomes {min(1.0, max(0.01, probability)):g}; it must be 0.01 to 1."
        )
        probability = min(1.0, max(0.01, probability))
    if probability not in (None, 1):
        turns["probability"] = probability
        section.note("probability", "the share of the pairs that each epoch draws, anew every time.")
    return turns


def _regularisation(section: Section) -> dict[str, Any]:
    """is_regularisation_data, if it is true."""
    spellings = ("is_regularisation_data", "is_regularization_data")
    if not section.truth(*spellings):
        return {}
    section.note(
        next(each for each in spellings if each in section),
        "its pairs are trained towards the base model's own prediction. SimpleTuner does so with LyCORIS only.",
    )
    return {"is_regularisation_data": True}


def _linked(
    backends: Backends, section: Section, name: str, max_references: int
) -> tuple[list[str], list[str], dict[str, str]]:
    """Ids of the references in order, ids of the mask, and why other linked data sets are not used."""
    known = tuple(each for each in backends.of_kind("conditioning", "image") if each != name)
    ids = [
        backends.named(each, f"{name}.conditioning_data", known) for each in ids_of(section.take("conditioning_data"))
    ]
    ids += [each for each in backends.made_of(name) if each not in ids]
    for each in ids:
        kind = backends.entries[each].get("conditioning_type")
        if kind not in (None, "reference_strict", "reference_loose", *MASKS):
            raise ConfigError(
                f"{each}.conditioning_type must be reference_strict, reference_loose, mask or segmentation for an edit "
                f"model, got {brief(kind)}."
            )
    masks = [each for each in ids if backends.entries[each].get("conditioning_type") in MASKS]
    references = [each for each in ids if each not in masks]
    if masks and not references:
        raise ConfigError(
            f"{name}.conditioning_data has only masks. Add references, because an edit starts from a picture."
        )
    taken = ", ".join(references[:max_references])
    section.note(
        "conditioning_data",
        f"references, in this order: {taken}." if references else "none, so the pictures are trained as text-to-image.",
    )
    cut = dict.fromkeys(references[max_references:], _too_many(name, max_references))
    cut |= dict.fromkeys(
        masks[1:], f"{name} refers to it, but only one set of masks is used, {masks[0]}" if masks else ""
    )
    return references[:max_references], masks[:1], cut


def _too_many(name: str, max_references: int) -> str:
    if max_references > 1:
        return f"{name} refers to it, but only the first {max_references} references are used"
    return (
        f"{name} refers to it, but this flavour uses only the first reference. With conditioning_multidataset_sampling "
        "random, each use of a pair draws one of up to three"
    )


def _folder(entry: dict[str, Any], name: str, root: Path) -> str:
    if entry.get("type", "local") != "local":
        raise ConfigError(f"{name}.type must be local, got {brief(entry['type'])}. Copy the pictures into a folder.")
    folder = entry.get("instance_data_dir", entry.get("instance_data_root"))
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{name}.instance_data_dir must be a folder of pictures, got {brief(folder)}.")
    return path_of(folder, root, f"{name}.instance_data_dir")


def _sizes(section: Section) -> dict[str, Any]:
    """The resolution and the settings of sizes and crops."""
    sizes: dict[str, Any] = {}
    encoding: dict[str, Any] = {}
    kind, resolution = section.text("resolution_type"), section.number("resolution")
    limits = {key: section.number(key) or 0.0 for key in ("minimum_image_size", *_SIZE_LIMITS)}
    edge = _area_edge(resolution) if resolution is not None else 0
    if kind == "area" and resolution and edge:
        _area_to_report(section, resolution, edge)
        kind, resolution = "pixel_area", edge
        limits = {key: 1000 * math.sqrt(max(0.0, size)) for key, size in limits.items()}
    if kind:
        sizes["resolution_type"] = kind
    if resolution is not None and kind == "area":
        sizes["megapixels"] = resolution
    elif resolution is not None:
        encoding["resolution"] = round(resolution)
        _rounding_to_report(section, resolution, kind)
    crop = section.truth("crop")
    sizes |= {} if crop is None else {"crop": crop}
    for key, spelt in (
        ("crop_style", {"centre": "center", "face": "center"}),
        ("crop_aspect", {"closest": "preserve", "random": "preserve"}),
    ):
        value = section.text(key)
        if key == "crop_style" and not value:
            value = "random"
            section.note(
                key,
                "not given, so random, SimpleTuner's default. But a target and its references share one crop here; "
                "SimpleTuner draws one for each.",
            )
        if value in spelt and value != "centre":
            section.note(key, f"{value} is not supported; {spelt[value]} is used.")
        sizes |= {key: spelt.get(value, value)} if value else {}
    minimum, largest, shrunk = limits.values()
    sizes |= {"minimum_image_size": minimum, "leave_out_small": True} if minimum else {}
    if crop and 0 < shrunk <= largest:
        sizes |= {key: limits[key] for key in _SIZE_LIMITS}
    elif largest or shrunk:
        section.note(
            "maximum_image_size",
            "left out with target_downsample_size, because they work only together and with crop.",
        )
    return {**encoding, "sizes": sizes} if sizes else encoding


def _area_edge(megapixels: float) -> int:
    """The side of SimpleTuner's square pictures for an area that it rounds to a usual one; 0 for other areas."""
    return next((edge for area, edge in _USUAL_AREAS.items() if abs(megapixels - area) < _SAME_AREA), 0)


def _area_to_report(section: Section, megapixels: float, edge: int) -> None:
    """SimpleTuner rounds the area of square pictures to `edge`² pixels, and rounds that of others down."""
    other = _ALIGNMENT * round(int(1000 * math.sqrt(megapixels)) / _ALIGNMENT)
    all_square = section.truth("crop") and section.text("crop_aspect") in (None, "square")
    more = "" if all_square or other == edge else f" Pictures of other shapes get about {other}² pixels there."
    section.note(
        "resolution",
        f"{megapixels:g} megapixels becomes {edge}, because SimpleTuner makes square pictures {edge} x {edge}.{more}",
    )


def _rounding_to_report(section: Section, resolution: float, kind: str | None) -> None:
    if resolution != round(resolution):
        section.note("resolution", f"{resolution:g} becomes {round(resolution)}, because it must be a whole number.")
    usual = _area_edge(resolution * resolution / 1e6)
    if kind in (None, "pixel_area") and usual and abs(usual - resolution) >= _ALIGNMENT / 2:
        section.note(
            "resolution",
            f"{round(resolution)} is kept. SimpleTuner rounds the area of square pictures and makes them {usual} x "
            f"{usual}.",
        )


def _other(
    backends: Backends, name: str, used: set[str], cut: dict[str, str], known: set[str], notes: list[str]
) -> None:
    """Report why an entry other than the main data sets, or one of its keys, is not used."""
    if name in used:
        _explain_linked(Section(backends.entries[name], name, notes), known)
        return
    kind, called = backends.kind(name), shown(name)
    if name in cut:
        notes.append(f"{called}: LEFT OUT. {cut[name]}.")
    elif kind in CACHES:
        place = (
            "in the cache folder, under this name"
            if name in backends.named_embeds()
            else "in one cache for all data sets"
        )
        notes.append(f"{called}: {kind} are stored {place}.")
    elif kind == "conditioning":
        notes.append(f"{called}: LEFT OUT. No data set refers to it in conditioning_data.")
    else:
        notes.append(f"{called}: LEFT OUT. Edits do not use data sets of type {kind}.")


def _explain_linked(section: Section, known: set[str]) -> None:
    """Report on the keys of references and masks. Most follow the settings of their targets."""
    section.settle("id", "type", "disabled", "disable", "dataset_type", "instance_data_dir", "instance_data_root")
    section.settle("source_dataset_id")
    what = section.text("conditioning_type")
    reasons = {
        "segmentation": "weighted by brightness: paint the parts that count white and the others black.",
    }
    if what in reasons:
        section.note("conditioning_type", f"{what}; {reasons[what]}")
    shared = [key for key in INHERITED if key in section and key not in ("caption_strategy", "instance_prompt")]
    if shared:
        section.note(", ".join(shared), "ignored; references follow their targets and encoding.match_target_res.")
    captions = [key for key in ("caption_strategy", "instance_prompt") if key in section]
    if captions:
        section.note(", ".join(captions), "ignored; the captions of the targets are used.")
    section.settle(*shared, "caption_strategy", "instance_prompt")
    section.explain(DATA_REASONS, known)
