"""Settings of datasets and their encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..settings import check, check_at_least, check_choice, check_choices, is_plain_name, required, setting

CaptionStrategy = Literal["textfile", "filename", "instanceprompt", "csv", "parquet", "jsonl"]
CAPTION_TABLES: tuple[CaptionStrategy, ...] = ("csv", "parquet", "jsonl")
ResolutionType = Literal["pixel_area", "pixel", "area"]
CropAspect = Literal["square", "preserve"]
CropStyle = Literal["center", "random", "corner"]
Preprocessing = Literal["comfyui", "diffusers"]
ConditioningType = Literal["auto", "reference_strict", "reference_loose"]
MultidatasetSampling = Literal["combined", "random"]
ReferenceLatents = Literal["cached", "on_the_fly"]
LEAST_PROBABILITY = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    """What is made of captions, and the table they stand in."""

    disable_multiline_split: bool = setting(
        False, "A .txt beside a target is one caption, line breaks and all, instead of a caption a line."
    )
    prepend_instance_prompt: bool = setting(
        False, "Every caption begins with instance_prompt, so that trigger words stand in front of all of them."
    )
    caption_prefix: str = setting("", "Put before every caption as it is; end it with a blank or a comma.")
    caption_suffix: str = setting("", "Put behind every caption as it is; begin it with a blank or a comma.")
    caption_file: str = setting(
        "", "Table of captions for caption_strategy csv, parquet or jsonl; a relative path starts at target_dir."
    )
    caption_column: str = setting(
        "caption", "Column with the edit instruction; a list in a cell is several captions of that pair."
    )
    filename_column: str = setting(
        "filename",
        "Column with the target's path below target_dir, with or without extension; rows of a target add up.",
    )

    def __post_init__(self) -> None:
        for name in ("caption_column", "filename_column"):
            check(bool(getattr(self, name)), name, getattr(self, name), "the name of a column")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """Folders of pictures, matched by relative path without extension."""

    target_dir: str = required("Folder of the pictures the model should produce.")
    reference_dirs: tuple[str, ...] = required("One to three folders of the pictures it starts from.")
    caption_strategy: CaptionStrategy = setting(
        "textfile",
        "Where edit instructions come from: a .txt beside the target (a line is a caption), its file name, "
        "instance_prompt for all, or a table (csv, parquet, jsonl) named in the caption settings.",
    )
    instance_prompt: str = setting(
        "", "The one edit instruction of all pairs, for caption_strategy instanceprompt, or the words to prepend."
    )
    captions: CaptionConfig = setting(CaptionConfig(), "What is made of captions.")
    mask_dir: str = setting(
        "", "Folder of masks named as their targets: white counts in the loss, black does not; empty for no masks."
    )
    references_optional: bool = setting(
        False,
        "A target that has no reference in a folder is taken with those it has, or as text-to-image with none. Off: a "
        "missing reference is a problem.",
    )
    conditioning_type: tuple[ConditioningType, ...] = setting(
        ("auto",),
        "How references are cut, one for all folders or one per folder: reference_strict by the target's rectangle, "
        "and a reference of another shape is a problem; reference_loose not at all; auto strictly where the shape is "
        "the target's within 1 %.",
    )

    @staticmethod
    def prepare_json(values: dict[str, Any]) -> dict[str, Any]:
        """One conditioning_type is a list of one."""
        kind = values.get("conditioning_type")
        return {**values, "conditioning_type": [kind]} if isinstance(kind, str) else values

    def __post_init__(self) -> None:
        check_choice(self, "caption_strategy")
        check_choices(self, "conditioning_type")
        check(bool(self.target_dir), "target_dir", self.target_dir, "a folder of pictures")
        count = len(self.reference_dirs)
        check(1 <= count <= 3, "reference_dirs", self.reference_dirs, "one, two or three folders")
        given = len(self.conditioning_type)
        allowed = "one for all reference folders, or one for each"
        check(given in (1, count), "conditioning_type", self.conditioning_type, allowed)
        if self.caption_strategy == "instanceprompt" or self.captions.prepend_instance_prompt:
            check(bool(self.instance_prompt.strip()), "instance_prompt", self.instance_prompt, "a sentence")
        if self.caption_strategy in CAPTION_TABLES:
            allowed = f"the path of a {self.caption_strategy} file, for caption_strategy {self.caption_strategy}"
            check(bool(self.captions.caption_file), "caption_file", self.captions.caption_file, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeConfig:
    """How large targets are trained, and which part of them."""

    resolution_type: ResolutionType = setting(
        "pixel_area",
        "What resolution counts: pixel_area the side of a square of equal area, pixel the shorter edge; area takes "
        "megapixels instead.",
    )
    megapixels: float = setting(1.0, "Area of targets in million pixels, for resolution_type area.")
    aspect_bucket_alignment: int = setting(32, "Sides of targets are multiples of this many pixels: 32, or 16.")
    crop: bool = setting(
        False, "Cut targets to crop_aspect. Off: the aspect ratio stays, and only what rounding leaves over is cut off."
    )
    crop_aspect: CropAspect = setting("square", "Shape under crop: a square, or preserve for the picture's own.")
    crop_style: CropStyle = setting(
        "center",
        "Place of the cut: center, corner (top left), or random (by seed and pair). References follow targets.",
    )
    minimum_image_size: float = setting(
        0.0, "Smallest target that may be trained, in the unit of resolution_type (area: megapixels); 0 for any."
    )
    leave_out_small: bool = setting(
        False, "Leave targets below minimum_image_size out instead of refusing the dataset."
    )
    maximum_image_size: float = setting(
        0.0, "Under crop: a target above this is cut as if shrunk to target_downsample_size first; 0 for never."
    )
    target_downsample_size: float = setting(0.0, "What targets above maximum_image_size are shrunk to before the cut.")

    def __post_init__(self) -> None:
        check_choice(self, "resolution_type", "crop_aspect", "crop_style")
        check(0.01 <= self.megapixels <= 17, "megapixels", self.megapixels, "0.01 to 17 million pixels")
        step = self.aspect_bucket_alignment
        check(step in (16, 32), "aspect_bucket_alignment", step, "16 or 32 pixels")
        check_at_least(self, 0, "minimum_image_size", "maximum_image_size", "target_downsample_size")
        maximum, shrunk = self.maximum_image_size, self.target_downsample_size
        if maximum or shrunk:
            allowed = f"above 0 and at most maximum_image_size ({maximum:g}); set both or neither"
            check(0 < shrunk <= maximum, "target_downsample_size", shrunk, allowed)
            check(self.crop, "crop", self.crop, "true with maximum_image_size, which decides what is cut")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingConfig:
    """From pictures and captions to latents and prompt embeddings."""

    resolution: int = setting(
        1024, "Side in pixels of a square with the target's area; the aspect ratio is kept. Typical 512 to 1024."
    )
    preprocessing: Preprocessing = setting(
        "comfyui", "Resize and tokenise exactly as ComfyUI's TextEncodeQwenImageEdit nodes, or as diffusers' pipelines."
    )
    match_target_res: bool = setting(
        False, "References take the target's size instead of about one megapixel. Faster and smaller."
    )
    num_eval_images: int = setting(
        2, "Pairs kept out of training for validation pictures and loss. 0 for none, -1 for all pairs of this dataset."
    )
    validation_negative_prompt: str = setting(" ", "Negative prompt of validation pictures, seen with the references.")
    seed: int = setting(0, "Chooses the pairs that are kept out.")
    encode_empty_caption: bool = setting(
        False, "Also encode every pair without words, as caption_dropout_probability of the training needs it."
    )
    sizes: SizeConfig = setting(SizeConfig(), "Sizes and crops.")
    conditioning_multidataset_sampling: MultidatasetSampling = setting(
        "combined",
        "Several reference folders: combined shows all references of a pair together, random one of them a turn, with "
        "the prompt as encoded with that one.",
    )
    conditioning_image_embeds: str = setting(
        "",
        "Name of the cache of references' visual tokens, which all captions share; it must exist. Empty: a cache of "
        "the first reference folder's name, made if there is none.",
    )
    create_image_embeds: bool = setting(
        False, "Make the cache that conditioning_image_embeds names if there is none. Off: a wrong name is an error."
    )
    reference_latents: ReferenceLatents = setting(
        "cached",
        "cached encodes references once, onto the disk. on_the_fly encodes those that are trained on anew at every "
        "turn, with the VAE in memory all the time: for little disk.",
    )
    validation_prompts: tuple[str, ...] = setting(
        (), "Edit instructions to draw of every held-out pair besides its caption. They are seen with its references."
    )

    def __post_init__(self) -> None:
        check_choice(self, "preprocessing", "conditioning_multidataset_sampling", "reference_latents")
        name = self.conditioning_image_embeds
        check(not name or is_plain_name(name), "conditioning_image_embeds", name, "a name without folders")
        check(64 <= self.resolution <= 4096, "resolution", self.resolution, "64 to 4096 pixels")
        check_at_least(self, -1, "num_eval_images")
        prompts = self.validation_prompts
        check(all(prompt.strip() for prompt in prompts), "validation_prompts", prompts, "a list of edit instructions")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPartConfig:
    """One of several datasets in a run."""

    id: str = required("Its name, for eval_dataset_id and in reports.")
    dataset: DatasetConfig = required("The folders of pictures.")
    encoding: EncodingConfig = setting(EncodingConfig(), "What differs from the file's own `encoding`.")
    repeats: int = setting(0, "Extra turns of each pair in an epoch; 0 is one turn, 2 are three.")
    probability: float = setting(1.0, "Share of the pairs that an epoch draws, anew each time; 0 for none.")

    def __post_init__(self) -> None:
        check(bool(self.id.strip()), "id", self.id, "a name")
        check_turns(self.repeats, self.probability)


def check_turns(repeats: int, probability: float) -> None:
    """How often the pairs of one of several datasets have their turn."""
    check(0 <= repeats <= 10_000, "repeats", repeats, "0 to 10000")
    drawn = probability == 0 or LEAST_PROBABILITY <= probability <= 1
    check(drawn, "probability", probability, f"{LEAST_PROBABILITY} to 1, or 0 to leave the dataset out")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCheckConfig:
    """What the pair checker calls worth a look. All are limits; nothing is changed or left out by them."""

    max_shift: float = setting(
        0.75, "Pixels of the target by which a reference may lie beside it outside the edit. 0.5 to 1 is usual."
    )
    max_zoom_percent: float = setting(0.3, "Percent by which a reference may be larger or smaller than its target.")
    max_colour_offset: float = setting(
        3.0, "8-bit steps by which brightness or a colour may differ outside the edit. Higher if the edit is a colour."
    )
    min_difference: float = setting(
        6.0, "8-bit steps that some spot of target and reference should differ by; below, a pair teaches nothing."
    )
    duplicate_bits: int = setting(
        6, "Bits of 128 by which two pairs' pictures may differ and still be called near-duplicates; 0 for equal ones."
    )
    check_side: int = setting(512, "Pictures are measured at this longer side in pixels; 512 is quick, 1024 finer.")

    def __post_init__(self) -> None:
        check_at_least(self, 0, "max_shift", "max_zoom_percent", "max_colour_offset", "min_difference")
        check(0 <= self.duplicate_bits <= 40, "duplicate_bits", self.duplicate_bits, "0 to 40 bits")
        check(128 <= self.check_side <= 4096, "check_side", self.check_side, "128 to 4096 pixels")
