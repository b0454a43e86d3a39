"""The input and output tables of a help page, generated from the node's entry in /object_info."""

from __future__ import annotations

import re
from typing import Any

DEPENDS_ON_FOLDERS = {"base_model", "lora_name", "init_lora", "transformer_file", "text_encoder_file", "vae_file"}
DEPENDS_ON_FOLDERS |= {"model", "text_encoder", "vae", "data_set"}
DEPENDS_ON_FOLDERS |= {"picture", "run_name"}
_SECTIONS = re.compile(r"## Inputs\n.*?(?=\n## Typical values\n)", re.DOTALL)


def tables(info: dict[str, Any]) -> str:
    """The sections Inputs and Outputs for a node's entry in /object_info, as Markdown."""
    rows = ["## Inputs", "", "| input | type | default | meaning |", "| --- | --- | --- | --- |"]
    for part in ("required", "optional"):
        for name, (kind, options) in info["input"].get(part, {}).items():
            label = options["display_name"] + (" (optional)" if part == "optional" else "")
            default = "" if name in ("base_model", "model") or "default" not in options else _shown(options["default"])
            shown_kind = "choice" if kind == "COMBO" else kind
            rows.append(
                f"| {label} | {shown_kind} | {default} | {_cell(options['tooltip'])}{_allowed(name, options)} |"
            )
    rows += ["", "## Outputs", "", "| output | type | meaning |", "| --- | --- | --- |"]
    described = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    rows += [f"| {name} | {kind} | {_cell(tooltip)} |" for name, kind, tooltip in described]
    return "\n".join(rows) + "\n"


def tables_in(page: str) -> str:
    """The sections Inputs and Outputs of a page; empty if it has none."""
    found = _SECTIONS.search(page)
    return found.group() if found else ""


def with_tables(page: str, info: dict[str, Any]) -> str:
    """The page with both sections regenerated."""
    return _SECTIONS.sub(lambda _: tables(info), page)


def _allowed(name: str, options: dict[str, Any]) -> str:
    if name in DEPENDS_ON_FOLDERS:
        return ""
    if "options" in options:
        return " Choices: " + ", ".join(f"`{choice}`" for choice in options["options"]) + "."
    return f" Range: {options['min']} to {options['max']}." if "min" in options else ""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) and not value.strip():
        return "(a blank)" if value else "(empty)"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
