"""Pictures and loss on held-out pairs, as SimpleTuner's config.json has them."""

from __future__ import annotations

from typing import Any

from ..config import ValidationConfig
from ..errors import ConfigError
from .section import Section, put


def read_validation(section: Section, values: dict[str, Any]) -> None:
    """Guidance, pairs held out, sizes and prompts."""
    guidance, real = section.number("validation_guidance"), section.number("validation_guidance_real")
    if real is not None and real > 1:
        guidance = real
        section.note("validation_guidance_real", f"true guidance {real:g}, so validation_guidance is not asked.")
    elif guidance is not None:
        section.note("validation_guidance", f"true classifier-free guidance {guidance:g}, as its document means it.")
    if guidance is not None:
        put(values, "validation.validation_guidance", max(1.0, guidance))
    count = section.whole("num_eval_images")
    if count is not None:
        put(values, "validation.num_validation_images", max(0, count))
    if count is not None and not values.get("eval_dataset_id"):
        values["encoding"].setdefault("num_eval_images", count)
        section.note(
            "num_eval_images", f"{count} pairs of each data set are kept out of training. Fewer for a small one."
        )
    if section.truth("validation_disable"):
        put(values, "validation.num_validation_images", 0)
    if not values["encoding"].get("validation_negative_prompt", " "):
        values["encoding"]["validation_negative_prompt"] = " "
    if prompt := section.text("validation_prompt"):
        put(values, "encoding.validation_prompts", [prompt])
        section.note("validation_prompt", "drawn of every held-out pair besides its caption.")
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
        section.note("validation_resolution", f"{value} becomes {rounded}; sides are multiples of 16.")
        sizes = rounded
    put(values, "validation.validation_resolution", sizes)


def _near_sixteen(side: str) -> str:
    """The side in whole tokens; what is no number stays, and is refused with all that is allowed."""
    return str(max(64, round(int(side) / 16) * 16)) if side.isdigit() else side
