"""The lists of inputs and outputs of a help page, generated from the node's entry in /object_info.

Lists, because ComfyUI shows the page in a panel that may be 250 pixels wide, and tables don't fit it.
"""

from __future__ import annotations

import re
from typing import Any

from tools.settings_reference import used_in_words
from trainer_core.settings import If

DEPENDS_ON_FOLDERS = {"base_model", "lora_name", "init_lora", "transformer_file", "text_encoder_file", "vae_file"}
DEPENDS_ON_FOLDERS |= {"model", "text_encoder", "vae", "data_set"}
DEPENDS_ON_FOLDERS |= {"picture", "run_name", "validation_lora", "few_step_lora"}
_SECTIONS = re.compile(r"## Inputs\n.*?(?=\n## Typical values\n)", re.DOTALL)
_WIDGETS = {"COMBO", "STRING", "INT", "FLOAT", "BOOLEAN"}


def lists(info: dict[str, Any]) -> str:
    """The sections Inputs and Outputs for a node's entry in /object_info, as Markdown."""
    lines = ["## Inputs", ""]
    for part in ("required", "optional"):
        for name, (kind, options) in info["input"].get(part, {}).items():
            optional = " (optional)" if part == "optional" else ""
            allowed = _allowed(name, options) if kind in _WIDGETS else _type(kind)
            conditions = [If(**each) for each in options.get("qwen_edit_used", {}).get("if", ())]
            allowed = f"{allowed} {used_in_words(conditions, _shown, lambda name: name.replace('_', ' '))}".strip()
            lines.append(_line(options["display_name"], optional, options["tooltip"], allowed))
    lines += ["", "## Outputs", ""]
    described = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    lines += [_line(name, "", tooltip, _type(kind)) for name, kind, tooltip in described]
    return "\n".join(lines) + "\n"


def lists_in(page: str) -> str:
    """The sections Inputs and Outputs of a page; empty if it has none."""
    found = _SECTIONS.search(page)
    return found.group() if found else ""


def with_lists(page: str, info: dict[str, Any]) -> str:
    """The page with both sections regenerated."""
    return _SECTIONS.sub(lambda _: lists(info), page)


def _line(name: str, optional: str, tooltip: str, allowed: str) -> str:
    text = " ".join(filter(None, (tooltip.replace("\n", " "), allowed)))
    return f"- **{name}**{optional}: {text}"


def _type(kind: str) -> str:
    """The type of a socket that nodes of others may have. Of ours, the text says the node."""
    return "" if kind.startswith("QWEN_EDIT_") else f"Type: `{kind}`."


def _allowed(name: str, options: dict[str, Any]) -> str:
    found = []
    if "options" in options and name not in DEPENDS_ON_FOLDERS:
        found.append("Choices: " + ", ".join(f"`{choice}`" for choice in options["options"]) + ".")
    if "min" in options:
        found.append(f"Range: {options['min']} to {options['max']}.")
    if options.get("default", "") != "" and name not in ("base_model", "model"):
        found.append(f"Default: {_shown(options['default'])}.")
    return " ".join(found)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) and not value.strip():
        return "a blank"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
