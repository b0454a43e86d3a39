"""Settings of datasets and their encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import If, Limits, Settings, check, check_setting, is_plain_name, required, setting
from ..text import LONGEST_PROMPT, is_blank

CaptionStrategy = Literal["textfile", "filename", "instanceprompt", "csv", "parquet", "jsonl"]
CAPTION_TABLES: tuple[CaptionStrategy, ...] = ("csv", "parquet", "jsonl")
ResolutionType = Literal["pixel_area", "pixel", "area"]
CropAspect = Literal["square", "preserve"]
CropStyle = Literal["center", "random", "corner"]
Preprocessing = Literal["comfyui", "diffusers"]
ConditioningType = Literal["auto", "reference_strict", "reference_loose"]
ShuffleSplit = Literal["comma", "space", "period"]
ColorProfiles = Literal["convert", "ignore"]
MultidatasetSampling = Literal["combined", "random"]
ReferenceLatents = Literal["cached", "on_the_fly"]
_CROPS = If("crop", (True,))
_SHUFFLES = If("caption_shuffle_count", differs=(0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig(Settings):
    """Where captions are read and what is added to them."""

    disable_multiline_split: bool = setting(
        False, "Take a caption .txt as one caption, with its line breaks. Off: each line is a caption of its own."
    )
    prepend_instance_prompt: bool = setting(
        False, "Put instance_prompt before every caption, for example trigger words."
    )
    caption_prefix: str = setting(
        "", "Text before every caption, added as it is. End it with a space or a comma.", Limits(longest=LONGEST_PROMPT)
    )
    caption_suffix: str = setting(
        "",
        "Text after every caption, added as it is. Start it with a space or a comma.",
        Limits(longest=LONGEST_PROMPT),
    )
    caption_file: str = setting(
        "", "Table of captions, for caption_strategy csv, parquet or jsonl. A relative path starts at target_dir."
    )
    caption_column: str = setting(
        "caption",
        "Column with the edit instructions. A list in a cell gives the pair several captions.",
        Limits(valid=bool, allowed="the name of a column"),
    )
    filename_column: str = setting(
        "filename",
        "Column with the path of the target relative to target_dir, with or without extension. Several rows for one "
        "target give it several captions.",
        Limits(valid=bool, allowed="the name of a column"),
    )
    caption_shuffle_count: int = setting(
        0,
        "How many variants of each caption to make with its tags in another order. Each is one more caption of the "
        "pair, and is encoded. 0 for none.",
        Limits(min=0, max=100),
    )
    caption_shuffle_seed: int = setting(
        0, "Seed of the order of tags.", Limits(soft_min=0, soft_max=2**32 - 1), used_if=(_SHUFFLES,)
    )
    caption_shuffle_split_on: ShuffleSplit = setting("comma", "What separates tags.", used_if=(_SHUFFLES,))
    caption_shuffle_position_start: int = setting(
        0,
        "How many tags at the start of a caption keep their places.",
        Limits(min=0, soft_max=1000),
        used_if=(_SHUFFLES,),
    )
    caption_shuffle_include_original: bool = setting(
        True, "Also use the caption as it was written.", used_if=(_SHUFFLES,)
    )
    more_instance_prompts: tuple[str, ...] = setting(
        (),
        "More edit instructions with caption_strategy instanceprompt, one per line. Each is one more caption of every "
        "pair.",
        Limits(
            longest=LONGEST_PROMPT,
            valid=lambda prompts: not any(map(is_blank, prompts)),
            allowed="a list of edit instructions",
        ),
    )
    fallback_caption_column: str = setting(
        "", "Column of a caption table that is used where caption_column is empty. Empty for none."
    )
    caption_filter_list: tuple[str, ...] = setting(
        (),
        "Texts to take out of every caption, one per line. ^ and $ stand for its start and end, .* for anything on a "
        "line. s/text/other/ replaces the first text by the other. instance_prompt, prefix and suffix stay.",
        Limits(valid=lambda lines: not any(map(is_blank, lines)), allowed="a list of texts"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig(Settings):
    """Folders of pictures, paired by relative path without extension."""

    target_dir: str = required(
        "Folder of the pictures that the model should produce.", Limits(valid=bool, allowed="a folder of pictures")
    )
    reference_dirs: tuple[str, ...] = required(
        "One to three folders of the pictures to edit. An empty list trains the targets as text-to-image.",
        Limits(valid=lambda folders: len(folders) <= 3, allowed="one, two or three folders, or an empty list"),
    )
    caption_strategy: CaptionStrategy = setting(
        "textfile",
        "Source of the edit instructions. textfile: a .txt beside the target, one caption per line. filename: the "
        "target's file name. instanceprompt: instance_prompt for all pairs. csv, parquet, jsonl: the table in the "
        "caption settings.",
    )
    instance_prompt: str = setting(
        "",
        "The edit instruction of all pairs with caption_strategy instanceprompt, or the words that "
        "prepend_instance_prompt puts before every caption.",
        Limits(longest=LONGEST_PROMPT),
    )
    captions: CaptionConfig = setting(CaptionConfig(), "Where captions are read and what is added to them.")
    mask_dir: str = setting(
        "",
        "Folder of masks with the same file names as their targets; extensions may differ. White counts in the loss, "
        "black does not. Empty for none.",
    )
    references_optional: bool = setting(
        False,
        "Use a target that lacks some references with those it has, and a target without any as text-to-image. Off: a "
        "missing reference is an error.",
    )
    conditioning_type: tuple[ConditioningType, ...] = setting(
        ("auto",),
        "How references are cropped; one value for all folders, or one per folder. reference_strict: like the target; "
        "a different aspect ratio is an error. reference_loose: never. auto: like the target if the aspect ratios "
        "differ by at most 1 %.",
    )
    color_profiles: ColorProfiles = setting(
        "convert",
        "convert: pictures with another colour profile than sRGB, such as Display P3, become sRGB. ignore: use the "
        "numbers in the file, as ComfyUI's LoadImage does.",
    )

    def check_combinations(self) -> None:
        """Checks that each folder has a conditioning_type, and that the source of the captions is given."""
        allowed = "one for all reference folders, or one for each"
        fits = len(self.conditioning_type) in (1, len(self.reference_dirs))
        check(fits, "conditioning_type", self.conditioning_type, allowed)
        if self.caption_strategy == "instanceprompt" or self.captions.prepend_instance_prompt:
            check(not is_blank(self.instance_prompt), "instance_prompt", self.instance_prompt, "a sentence")
        if self.caption_strategy in CAPTION_TABLES:
            allowed = f"the path of a {self.caption_strategy} file with caption_strategy {self.caption_strategy}"
            check(bool(self.captions.caption_file), "caption_file", self.captions.caption_file, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeConfig(Settings):
    """Sizes and crops of targets."""

    resolution_type: ResolutionType = setting(
        "pixel_area",
        "Meaning of resolution. pixel_area: side of a square of equal area. pixel: length of the shorter edge. area: "
        "not used; megapixels sets the area.",
    )
    megapixels: float = setting(
        1.0,
        "Area of targets in million pixels, for resolution_type area.",
        Limits(min=0.01, max=17, unit="million pixels", step=0.01),
        used_if=(If("resolution_type", ("area",)),),
    )
    aspect_bucket_alignment: int = setting(
        32,
        "The sides of targets are multiples of this many pixels: 16 or 32.",
        Limits(choices=(16, 32), unit="pixels", step=16),
    )
    crop: bool = setting(
        False, "Crop targets to crop_aspect. Off: keep the aspect ratio and crop only the remainder of rounding."
    )
    crop_aspect: CropAspect = setting(
        "square", "Aspect ratio of the crop: square, or preserve for that of the picture.", used_if=(_CROPS,)
    )
    crop_style: CropStyle = setting(
        "center",
        "Position of the crop: center, corner (top left), or random (fixed by seed and pair). References are cropped "
        "like their targets.",
    )
    minimum_image_size: float = setting(
        0.0,
        "Smallest allowed target, in the unit of resolution_type (area: megapixels). 0 allows any size.",
        Limits(min=0, soft_max=100_000, step=0.01),
    )
    leave_out_small: bool = setting(
        False,
        "Skip targets smaller than minimum_image_size. Off: they are an error.",
        used_if=(If("minimum_image_size", differs=(0.0,)),),
    )
    maximum_image_size: float = setting(
        0.0,
        "With crop: larger targets are cropped as if they had first been scaled down to target_downsample_size. 0 "
        "turns this off.",
        Limits(min=0, soft_max=100_000, step=0.01),
        used_if=(_CROPS,),
        unused=0.0,
    )
    target_downsample_size: float = setting(
        0.0,
        "Size to which targets above maximum_image_size are scaled down before the crop.",
        Limits(min=0, soft_max=100_000, step=0.01),
        used_if=(_CROPS,),
        unused=0.0,
    )

    def check_combinations(self) -> None:
        """Checks that maximum_image_size and target_downsample_size are set together, and only with crop."""
        maximum, shrunk = self.maximum_image_size, self.target_downsample_size
        if maximum or shrunk:
            allowed = f"above 0 and at most maximum_image_size ({maximum:g}); set both or neither"
            check(0 < shrunk <= maximum, "target_downsample_size", shrunk, allowed)
            check(self.crop, "crop", self.crop, "true with maximum_image_size, which decides what is cropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingConfig(Settings):
    """How pictures and captions become latents and prompt embeddings."""

    resolution: int = setting(
        1024,
        "Target area as the side of a square: 512 is about 512 x 512 pixels in the picture's own aspect ratio. 512 to "
        "1024 is typical.",
        Limits(min=64, max=4096, unit="pixels", step=32),
    )
    preprocessing: Preprocessing = setting(
        "comfyui",
        "Resize and tokenise exactly like ComfyUI's TextEncodeQwenImageEdit nodes, or like the diffusers pipelines.",
    )
    match_target_res: bool = setting(
        False,
        "Scale references to the size of the target instead of about one megapixel. Faster and needs less VRAM.",
    )
    num_eval_images: int = setting(
        2,
        "Number of pairs held out of training, for validation pictures and loss. 0 for none, -1 for all pairs of this "
        "dataset. If the dataset of Edit Pairs marks pairs as held out, these are used instead, except with -1.",
        Limits(min=-1, soft_max=1000),
    )
    train_eval_images: bool = setting(
        False,
        "Also train on the pairs that num_eval_images takes for validation, as SimpleTuner does. For small datasets. "
        "Their validation loss is then a loss on training pairs: it does not show overfitting.",
    )
    validation_negative_prompt: str = setting(
        " ",
        "Negative prompt of validation pictures. It is encoded together with the references.",
        Limits(longest=LONGEST_PROMPT),
    )
    seed: int = setting(0, "Seed of the choice of held-out pairs.", Limits(soft_min=0, soft_max=2**32 - 1))
    encode_empty_caption: bool = setting(
        False, "Also encode every pair with an empty caption. Needed for caption_dropout_probability in training."
    )
    sizes: SizeConfig = setting(SizeConfig(), "Sizes and crops.")
    conditioning_multidataset_sampling: MultidatasetSampling = setting(
        "combined",
        "How several reference folders are used. combined: all references of a pair together. random: one of them each "
        "time, with the prompt encoded for it.",
    )
    conditioning_image_embeds: str = setting(
        "",
        "Name of the cache of the references' visual tokens, which all captions share. It must exist. Empty: use the "
        "cache named after the first reference folder, and create it if needed.",
        Limits(valid=lambda name: not name or is_plain_name(name), allowed="a name without folders"),
    )
    create_image_embeds: bool = setting(
        False, "Create the cache that conditioning_image_embeds names if it does not exist. Off: that is an error."
    )
    reference_latents: ReferenceLatents = setting(
        "cached",
        "cached: encode references once and store them on disk. on_the_fly: encode them again each time they are used; "
        "needs less disk space, but keeps the VAE in VRAM.",
    )
    validation_prompts: tuple[str, ...] = setting(
        (),
        "Edit instructions to sample for every validation pair, in addition to its caption. They are encoded together "
        "with its references.",
        Limits(
            longest=LONGEST_PROMPT,
            valid=lambda prompts: not any(map(is_blank, prompts)),
            allowed="a list of edit instructions",
        ),
    )
    preservation_prompts: tuple[str, ...] = setting(
        (),
        "Instructions of other edits, which training with preservation_probability keeps. They are encoded together "
        "with the references of every trained pair. Empty in a job that preserves: a list of six common edits.",
        Limits(
            longest=LONGEST_PROMPT,
            valid=lambda prompts: not any(map(is_blank, prompts)),
            allowed="a list of edit instructions",
        ),
    )
    tokenizer_max_length: int = setting(
        1024,
        "Maximum length of a caption or prompt in tokens; a token is about four letters of English. A longer one is an "
        "error; it is never cut.",
        Limits(min=1, max=4096, unit="tokens"),
    )
    encode_pixel_difference: bool = setting(
        False,
        "Also store where the pixels of target and reference differ. Needed for edit_weight_from pixels in training.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPartConfig(Settings):
    """One of several datasets in a run."""

    id: str = required(
        "Name of the dataset, for eval_dataset_id and reports.",
        Limits(valid=lambda name: bool(name.strip()), allowed="a name"),
    )
    dataset: DatasetConfig = required("The folders of pictures.")
    encoding: EncodingConfig = setting(EncodingConfig(), "Settings that differ from `encoding` of the whole file.")
    repeats: int = setting(
        0, "How many more times each pair is used per epoch: 0 is once, 2 is three times.", Limits(min=0, max=10_000)
    )
    probability: float = setting(
        1.0,
        "Fraction of the pairs that each epoch draws at random. 1 for all, 0 for none.",
        Limits(min=0.01, max=1, also=0, step=0.01),
    )
    is_regularisation_data: bool = setting(
        False,
        "Train the pairs towards the base model's own prediction, not towards their targets, so that it keeps its "
        "abilities. None of them is held out, except in a dataset of eval_dataset_id.",
    )
    timestep_sampling_offset: float = setting(
        0.0,
        "Shift of this dataset's noise levels with sigma_distribution logit_normal: logit_mean is raised by this many "
        "times logit_std. Below 0 trains more on detail, above 0 more on composition. -1 to 1 is typical.",
        Limits(min=-10, max=10, step=0.05),
    )


def check_part(repeats: int, probability: float, timestep_sampling_offset: float) -> None:
    """Raises ConfigError if these are no valid values of the settings that a DatasetPartConfig has for a mix."""
    check_setting(DatasetPartConfig, "repeats", repeats)
    check_setting(DatasetPartConfig, "probability", probability)
    check_setting(DatasetPartConfig, "timestep_sampling_offset", timestep_sampling_offset)
