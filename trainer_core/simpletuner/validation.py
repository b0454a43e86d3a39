"""Import the validation settings of SimpleTuner's config.json."""

from __future__ import annotations

from typing import Any

from ..config import ValidationConfig
from ..errors import ConfigError
from .section import Section, put


def read_validation(section: Section, values: dict[str, Any]) -> None:
    """Read guidance, number of held-out pairs, sizes and prompts into `values`."""
    guidance, real = section.number("validation_guidance"), section.number("validation_guidance_real")
    if real is not None and real > 1:
        guidance = real
        section.note("validation_guidance_real", f"true guidance {real:g}, so validation_guidance is ignored.")
    elif guidance is not None:
        section.note(
            "validation_guidance", f"true classifier-free guidance {guidance:g}, as in SimpleTuner's document."
        )
    if guidance is not None:
        put(values, "validation.validation_guidance", max(1.0, guidance))
    count = section.whole("num_eval_images")
    if count is not None:
        put(values, "validation.num_validation_images", max(0, count))
    if count is not None and not values.get("eval_dataset_id"):
        values["encoding"].setdefault("num_eval_images", count)
        section.note(
            "num_eval_images", f"{count} pairs of each data set are kept out of training. Use fewer for small ones."
        )
    if section.truth("validation_disable"):
        put(values, "validation.num_validation_images", 0)
    if not values["encoding"].get("validation_negative_prompt", " "):
        values["encoding"]["validation_negative_prompt"] = " "
    if prompt := section.text("validation_prompt"):
        put(values, "encoding.validation_prompts", [prompt])
        section.note("validation_prompt", "sampled for every held-out pair in addition to its caption.")
    _sizes(section, values)


def _sizes(section: Section, values: dict[str, Any]) -> None:
    value = section.take("validation_resolution")
    if value is None or str(value).strip() == "":
        return
    sizes = str(value).lower().replace(" ", "")
    try:
        ValidationConfig(validation_resolution=sizes)
    except ConfigError:
        rounded = ",".join("x".join(_near_sixteen(side) for side in size.split("x")) for size in sizes.split(","))
        section.note("validation_resolution", f"{value} becomes {rounded}, because sides must be multiples of 16.")
        sizes = rounded
    put(values, "validation.validation_resolution", sizes)


def _near_sixteen(side: str) -> str:
    """The side rounded to a multiple of 16. Keeps text that is no number, which the check of the settings refuses."""
    return str(max(64, round(int(side) / 16) * 16)) if side.isdigit() else side
