"""Import the base model's files and precisions from SimpleTuner's config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import DEMO_MODEL
from ..config.model import EIGHT_BITS
from ..qwen_image.flavours import Flavour
from .section import Section, path_of

# SimpleTuner's precisions that have another name here, or the nearest one that is not less precise
_PRECISIONS = {
    "no_change": "none",
    **dict.fromkeys(("int16-sdnq", "uint16-sdnq", "fp16-sdnq"), "none"),
    **dict.fromkeys(("int8-torchao", "int8dq-torchao", "int8-sdnq", "uint8-sdnq"), "int8-quanto"),
    **dict.fromkeys(("int6-sdnq", "int5-sdnq", "uint5-sdnq"), "int8-quanto"),
    **dict.fromkeys(("fp8uz-quanto", "fp8-torchao", "fp8wo-torchao", "fp8-sdnq"), "fp8-quanto"),
    **dict.fromkeys(("fp8-native", "fp8-transformerengine"), "fp8-quanto"),
    **dict.fromkeys(("int4-torchao", "int8dq-int4-torchao", "fp8-int4-torchao"), "int4-quanto"),
    **dict.fromkeys(("uint4-sdnq", "uint3-sdnq"), "int4-quanto"),
    "uint2-sdnq": "int2-quanto",
}


def read_model(section: Section, flavour: Flavour, base: str, root: Path) -> dict[str, Any]:
    """The section `model` of the job's JSON. `base` replaces the model that the configuration names.

    Raises:
        ConfigError: a value has the wrong type, or a path can't be used.
    """
    model: dict[str, Any] = {"flavour": flavour.name}
    named = section.text("pretrained_model_name_or_path")
    local = section.path(root, "pretrained_model_name_or_path")
    if base:
        model["base"] = base if base == DEMO_MODEL else path_of(base, root, "base")
    elif local and _is_folder(local):
        model["base"] = local
    else:
        model["base"] = str(root / "models" / (named or flavour.released_as).split("/")[-1])
        section.note(
            "pretrained_model_name_or_path",
            f"nothing is downloaded. Put {named or flavour.released_as} into the folder {model['base']}, or set "
            "model.base to where it is.",
        )
    for part in ("transformer", "vae"):
        key = f"pretrained_{part}_model_name_or_path"
        file = section.text(key)
        if file and file.endswith((".safetensors", ".gguf")):
            model[f"{part}_file"] = section.path(root, key)
        elif file:
            section.note(
                key, f"left out; the {part} of model.base is used. Set model.{part}_file to use a single file."
            )
    precision = _precision(section, "base_model_precision")
    via = section.text("quantize_via")
    if via == "pipeline":
        section.note("quantize_via", "pipeline becomes accelerator: weights are quantised while they are loaded.")
    mixed = section.text("mixed_precision")
    if mixed not in (None, "bf16", "no"):
        section.note("mixed_precision", f"{mixed} is not supported; bf16 is used.")
        mixed = "bf16"
    model |= {"base_model_precision": precision} if precision else {}
    model |= {"quantize_via": "accelerator" if via == "pipeline" else via} if via else {}
    model |= _other_precisions(section, str(model.get("base_model_precision", "none")))
    return model | ({"mixed_precision": mixed} if mixed else {})


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # too long, or no path at all
        return False


def _other_precisions(section: Section, precision: str) -> dict[str, Any]:
    """The precisions of the activations and of the text encoder."""
    found: dict[str, Any] = {}
    if section.truth("quantize_activations"):
        if precision in EIGHT_BITS:
            found["quantize_activations"] = True
        else:
            section.note("quantize_activations", f"left out, because it works only with {' and '.join(EIGHT_BITS)}.")
    text_encoder = _precision(section, "text_encoder_1_precision", "text_encoder_precision")
    return found | ({"text_encoder_precision": text_encoder} if text_encoder else {})


def _precision(section: Section, *names: str) -> str | None:
    """Our name of a precision, with a line if it is not the same."""
    theirs = section.text(*names)
    ours = _PRECISIONS.get(theirs, theirs) if theirs else None
    if ours != theirs and theirs != "no_change":
        section.note(names[0], f"{theirs} is not supported; {ours} is used.")
    return ours
