"""multidatabackend.json: which folders are targets, references and masks, and how their pictures are cut."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .section import Section, words
from .simpletuner_keys import DATA_KEYS, DATA_REASONS, TABLE_REASONS

_CACHES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
_MASKS = ("mask", "segmentation")
_SIZE_LIMITS = ("maximum_image_size", "target_downsample_size")
# Settings of all data sets may stand in config.json.
INHERITED = words(
    "resolution resolution_type caption_strategy instance_prompt crop crop_style crop_aspect minimum_image_size "
    "maximum_image_size target_downsample_size"
)


class Backends:
    """The entries by id, with what each of them is for."""

    def __init__(self, entries: object, eval_ids: list[str], notes: list[str]) -> None:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError("The data file is not a list of data sets, each an object with an `id`.")
        self.entries: dict[str, dict[str, Any]] = {}
        for number, entry in enumerate(entries):
            name = entry.get("id")
            if not isinstance(name, str) or not name:
                raise ConfigError(f"Data set {number + 1} of the data file has no `id`.")
            if name in self.entries:
                raise ConfigError(f"Two data sets have the id {name!r}. Give each its own.")
            if any(str(entry.get(word, False)).lower() == "true" for word in ("disabled", "disable")):
                notes.append(f"{name}: left out; it is disabled.")
            else:
                self.entries[name] = entry
        self.eval_ids = eval_ids
        for name in eval_ids:
            self.named(name, "eval_dataset_id", tuple(self.entries))

    def kind(self, name: str) -> str:
        """image, conditioning, or what else dataset_type says."""
        entry = self.entries[name]
        # as in the Kontext document, where references have a conditioning_type and no dataset_type
        return entry.get("dataset_type") or ("conditioning" if entry.get("conditioning_type") else "image")

    def of_kind(self, *kinds: str) -> tuple[str, ...]:
        """Their ids, in the file's order."""
        return tuple(name for name in self.entries if self.kind(name) in kinds)

    def named(self, name: object, key: str, known: tuple[str, ...]) -> str:
        """The name, if it is known.

        Raises:
            ConfigError: it is not; with those that are.
        """
        if isinstance(name, str) and name in known:
            return name
        near = difflib.get_close_matches(str(name), known, 1)
        there = f"Known are {', '.join(known)}." if known else "There is none of that kind in the data file."
        raise ConfigError(f"{key} names {name!r}. {there}" + (f" Did you mean {near[0]!r}?" if near else ""))

    def main(self) -> str:
        """The data set that is trained on: the first one with references."""
        candidates = [name for name in self.of_kind("image") if name not in self.eval_ids]
        linked = {self.entries[name].get("source_dataset_id") for name in self.of_kind("conditioning")}
        paired = [name for name in candidates if self.entries[name].get("conditioning_data") or name in linked]
        if paired:
            return paired[0]
        references = ", ".join(self.of_kind("conditioning")) or "none in this file"
        raise ConfigError(
            f"No data set to train on: one of {', '.join(candidates) or 'type image'} needs `conditioning_data` with "
            f"the ids of its references (data sets with dataset_type conditioning: {references})."
        )


def read_data(backends: Backends, inherited: dict[str, Any], root: Path, max_references: int, notes: list[str]) -> dict:
    """The parts `dataset`, `encoding` and `noise` of a job, as far as the data file decides them.

    Raises:
        ConfigError: ids that don't exist, data sets that are not local folders, references missing.
    """
    name = backends.main()
    entry = {**{key: value for key, value in inherited.items() if value is not None}, **backends.entries[name]}
    section = Section(entry, name, notes)
    references, masks = _linked(backends, section, name, notes)
    if len(references) > max_references:
        notes.append(f"{name}.conditioning_data: this flavour takes {max_references}; the first ones are used.")
    folders = [_folder(backends.entries[each], each, root) for each in references[:max_references]]
    dataset: dict[str, Any] = {"target_dir": _folder(entry, name, root), "reference_dirs": folders}
    if masks:
        dataset["mask_dir"] = _folder(backends.entries[masks[0]], masks[0], root)
        section.note("conditioning_data", f"masks from {masks[0]}: white counts in the loss, black does not.")
    section.take("id", "type", "disabled", "disable", "dataset_type", "instance_data_dir")
    _captions(section, dataset, root)
    encoding = _sizes(section)
    offset = section.number("timestep_sampling_offset")
    section.explain(DATA_REASONS, DATA_KEYS)
    for other in backends.entries:
        if other != name:
            _other(backends, other, other in (*references[:max_references], *masks[:1]), notes)
    return {"name": name, "dataset": dataset, "encoding": encoding, "offset": offset or 0.0}


def _linked(backends: Backends, section: Section, name: str, notes: list[str]) -> tuple[list[str], list[str]]:
    """Ids of references, in their order, and of masks."""
    value = section.take("conditioning_data")
    known = tuple(each for each in backends.of_kind("conditioning", "image") if each != name)
    ids = [value] if isinstance(value, str) else list(value or [])
    ids = [backends.named(each, f"{name}.conditioning_data", known) for each in ids]
    ids += [
        each
        for each in backends.of_kind("conditioning")
        if backends.entries[each].get("source_dataset_id") == name and each not in ids
    ]
    embeds = section.take("conditioning_image_embeds")
    if embeds is not None:
        backends.named(embeds, f"{name}.conditioning_image_embeds", backends.of_kind("conditioning_image_embeds"))
        notes.append(f"{name}.conditioning_image_embeds: references are encoded once into the one cache.")
    for each in ids:
        kind = backends.entries[each].get("conditioning_type")
        if kind not in (None, "reference_strict", "reference_loose", *_MASKS):
            raise ConfigError(
                f"{each}.conditioning_type is {kind!r}; allowed for edit models is reference_strict, reference_loose, "
                "mask, segmentation."
            )
    masks = [each for each in ids if backends.entries[each].get("conditioning_type") in _MASKS]
    references = [each for each in ids if each not in masks]
    if not references:
        raise ConfigError(f"{name}.conditioning_data names no references, only masks. An edit starts from a picture.")
    section.note("conditioning_data", f"references, in this order: {', '.join(references)}.")
    return references, masks


def _folder(entry: dict[str, Any], name: str, root: Path) -> str:
    if entry.get("type", "local") != "local":
        raise ConfigError(f"{name}.type is {entry['type']!r}; allowed is local. Copy the pictures into a folder.")
    folder = entry.get("instance_data_dir")
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{name}.instance_data_dir is {folder!r}; allowed is a folder of pictures.")
    return str(root / Path(folder).expanduser())


def _captions(section: Section, dataset: dict[str, Any], root: Path) -> None:
    """caption_strategy and what goes with it."""
    strategy = section.text("caption_strategy")
    captions: dict[str, Any] = {}
    prompt = section.take("instance_prompt")
    if isinstance(prompt, list):
        section.note("instance_prompt", "a list; the first one is used.")
        prompt = prompt[0] if prompt else None
    if section.truth("only_instance_prompt"):
        strategy = "instanceprompt"
    table = section.inside("parquet") if strategy == "parquet" else None
    if table is not None:
        columns = {key: table.text(key) for key in ("caption_column", "filename_column")}
        captions = {"caption_file": table.text("path") or "", **{key: name for key, name in columns.items() if name}}
        strategy = "jsonl" if captions["caption_file"].endswith((".jsonl", ".json")) else "parquet"
        section.note("parquet.path", "a relative path starts at the targets' folder.")
        table.explain(TABLE_REASONS, ("path", *columns))
    if strategy == "csv":
        file, column = section.text("csv_file"), section.text("csv_caption_column")
        captions = {"caption_file": str(root / Path(file).expanduser()) if file else ""}
        captions |= {"caption_column": column} if column else {}
    for key in ("disable_multiline_split", "prepend_instance_prompt"):
        if section.truth(key):
            captions[key] = True
    dataset |= {"caption_strategy": strategy} if strategy else {}
    if prompt and (strategy == "instanceprompt" or captions.get("prepend_instance_prompt")):
        dataset["instance_prompt"] = prompt
    if captions:
        dataset["captions"] = captions


def _sizes(section: Section) -> dict[str, Any]:
    """resolution, and the settings of sizes and crops."""
    sizes: dict[str, Any] = {}
    encoding: dict[str, Any] = {}
    kind, resolution = section.text("resolution_type"), section.number("resolution")
    if kind:
        sizes["resolution_type"] = kind
    if resolution is not None and kind == "area":
        sizes["megapixels"] = resolution
    elif resolution is not None:
        encoding["resolution"] = round(resolution)
    crop = section.truth("crop")
    sizes |= {} if crop is None else {"crop": crop}
    for key, spelt in (
        ("crop_style", {"centre": "center", "face": "center"}),
        ("crop_aspect", {"closest": "preserve", "random": "preserve"}),
    ):
        value = section.text(key)
        if value in spelt and value != "centre":
            section.note(key, f"{value} is not built; {spelt[value]} is used.")
        sizes |= {key: spelt.get(value, value)} if value else {}
    minimum = section.number("minimum_image_size")
    sizes |= {"minimum_image_size": minimum, "leave_out_small": True} if minimum else {}
    limits = [section.number(key) or 0.0 for key in _SIZE_LIMITS]
    if crop and 0 < limits[1] <= limits[0]:
        sizes |= dict(zip(_SIZE_LIMITS, limits, strict=True))
    elif any(limits):
        section.note(
            "maximum_image_size", "left out with target_downsample_size; both are needed, and crop, to change anything."
        )
    return {**encoding, "sizes": sizes} if sizes else encoding


def _other(backends: Backends, name: str, used: bool, notes: list[str]) -> None:  # noqa: FBT001
    """Why an entry that is not the main one, or one of its keys, is not taken."""
    section, kind = Section(backends.entries[name], name, notes), backends.kind(name)
    if not used and kind in _CACHES:
        notes.append(f"{name}: a cache of {kind}; here is one cache for everything, keyed by content.")
    elif not used and (name in backends.eval_ids or kind == "eval"):
        notes.append(
            f"{name}: for validation, so not trained on. In ComfyUI give it a Pair Edit Folders and an Encode Edit "
            "Pairs of its own with num_eval_images -1, into validation_encoded; on the command line pairs are held out "
            "instead."
        )
    elif not used:
        notes.append(f"{name}: LEFT OUT; several data sets in one run are not supported yet.")
    if not used:
        return
    section.take("id", "type", "disabled", "disable", "dataset_type", "instance_data_dir", "source_dataset_id")
    what = section.text("conditioning_type")
    reasons = {
        "reference_strict": "cut by the targets' rectangle wherever the shape is the same.",
        "reference_loose": "a reference of another shape than its target's is used whole.",
        "segmentation": "counts by brightness: paint white what counts and black what doesn't.",
    }
    if what in reasons:
        section.note("conditioning_type", f"{what}; {reasons[what]}")
    shared = [key for key in INHERITED if key in section and key not in ("caption_strategy", "instance_prompt")]
    if shared:
        section.note(", ".join(shared), "as the targets and match_target_res say.")
    section.take(*shared)
    if section.take("caption_strategy", "instance_prompt") is not None:
        section.note("caption_strategy", "captions are those of the targets.")
    section.explain(DATA_REASONS, DATA_KEYS)
