"""Import the validation settings of SimpleTuner's config.json."""

from __future__ import annotations

import math
import re
from typing import Any

from ..text import shown
from .section import Section, put

_DEFAULT_COUNT = 4  # num_eval_images
_DEFAULT_INTERVAL = 100  # validation_step_interval
_THEIR_GUIDANCE = 4.0  # true classifier-free guidance without validation_guidance_real
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def read_validation(section: Section, values: dict[str, Any], seed: int | None) -> None:
    """Read guidance, number of validated pairs, sizes, seed and prompts into `values`. `seed`: of the training."""
    guidance, real = section.number("validation_guidance"), section.number("validation_guidance_real")
    if real is not None and real > 1:
        guidance = real
        section.note("validation_guidance_real", f"true guidance {real:g}, so validation_guidance is ignored.")
    elif guidance not in (None, _THEIR_GUIDANCE):
        section.note(
            "validation_guidance",
            f"{guidance:g} is used as true classifier-free guidance. SimpleTuner ignores it for Qwen-Image and uses "
            f"{_THEIR_GUIDANCE:g}.",
        )
    if guidance is not None:
        put(values, "validation.validation_guidance", max(1.0, guidance))
    interval = section.whole("validation_step_interval", "validation_steps", *_OTHER_INTERVALS)
    put(values, "validation.validation_step_interval", _DEFAULT_INTERVAL if interval is None else max(0, interval))
    drawn = section.whole("validation_seed")
    put(values, "validation.validation_seed", drawn if drawn is not None else seed or 0)
    _validated_pairs(section, values)
    if not values["encoding"].get("validation_negative_prompt", " "):
        values["encoding"]["validation_negative_prompt"] = " "
    if prompt := section.text("validation_prompt"):
        put(values, "encoding.validation_prompts", [prompt])
        section.note("validation_prompt", "sampled for every validated pair in addition to its caption.")
    _sizes(section, values)


_OTHER_INTERVALS = ("validation_steps_interval", "validation_step_interval_steps")


def _validated_pairs(section: Section, values: dict[str, Any]) -> None:
    """Take num_eval_images as SimpleTuner does, which samples so many pairs of each data set and also trains on them.

    With eval_dataset_id it samples pairs of those data sets alone, and does not train on them.
    """
    count = section.whole("num_eval_images")
    given = count is not None
    count = _DEFAULT_COUNT if count is None else max(0, count)
    if section.truth("validation_disable"):
        put(values, "validation.num_validation_images", 0)
        values["encoding"].setdefault("num_eval_images", 0)
        return
    evals = len(values.get("eval_dataset_id", ()))
    put(values, "validation.num_validation_images", count * (evals or len(values.get("datasets", [values]))))
    if evals:
        return
    values["encoding"].setdefault("num_eval_images", count)
    values["encoding"].setdefault("train_eval_images", True)
    if count:
        section.note(
            "num_eval_images",
            f"{'' if given else 'not given. '}Up to {count} pairs of each data set are sampled and also trained on, "
            "as in SimpleTuner. Their validation loss is therefore a loss on training pairs. To keep them out of "
            "training, set encoding.train_eval_images to false.",
        )


def _sizes(section: Section, values: dict[str, Any]) -> None:
    """SimpleTuner takes a size as the area, at the aspect ratio of the pair's first reference."""
    value = section.take("validation_resolution")
    if value is None or str(value).strip() == "":
        return
    sizes = str(value).lower().replace(" ", "") if isinstance(value, str | int) else value
    if isinstance(sizes, str) and _SIZE.search(sizes):
        areas = _SIZE.sub(lambda size: str(round(math.sqrt(int(size[1]) * int(size[2])))), sizes)
        section.note(
            "validation_resolution",
            f"{shown(sizes)} becomes {shown(areas)}: samples have about this area and the aspect ratio of their pair, "
            "as in SimpleTuner.",
        )
        sizes = areas
    put(values, "validation.validation_resolution", sizes)
