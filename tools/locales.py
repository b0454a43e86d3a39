"""Writes locales/ from the catalogues in tools/translations/ (`make locales`).

A catalogue, such as tools/translations/zh.json, has a translation for each English text of the nodes (names,
descriptions, tooltips) and of the page (the texts that web/ passes to `t`). ComfyUI reads the result: `nodeDefs.json`
by node and input, `main.json` with the texts of the page. A text that a catalogue lacks stays English. English has a
file too, with the inputs' names: ComfyUI 0.3.75 shows the ids of inputs that no locale names.

    python tools/locales.py          writes the files and prints what each catalogue lacks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.comfyui import REPO, all_nodes
from tools.page_texts import page_texts

CATALOGUES = Path(__file__).parent / "translations"
LOCALES = REPO / "locales"
PAGE = "qwenEditTrainer"  # the key of the page's texts in main.json; see web/trainer/words.js

Info = dict[str, Any]
Catalogue = dict[str, str]


def node_texts(all_nodes: dict[str, Info]) -> Iterator[str]:
    """The English texts of this pack's nodes, some more than once."""
    for info in _ours(all_nodes).values():
        yield from (info["display_name"], info["description"])
        for _, spec in _inputs(info):
            yield from (spec[1].get(key, "") for key in ("display_name", "tooltip") if len(spec) > 1)
        yield from info["output_name"]
        yield from info.get("output_tooltips") or ()


def definitions(all_nodes: dict[str, Info], words: Catalogue) -> dict[str, Any]:
    """nodeDefs.json. Leaves out what the catalogue lacks."""

    def known(**texts: str | None) -> dict[str, str]:
        return {key: words[text] for key, text in texts.items() if text in words}

    found: dict[str, Any] = {}
    for node_id, info in _ours(all_nodes).items():
        inputs = {
            name: known(name=spec[1].get("display_name", name), tooltip=spec[1].get("tooltip"))
            for name, spec in _inputs(info)
            if len(spec) > 1
        }
        tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
        outputs = {
            str(index): known(name=name, tooltip=tooltip)
            for index, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
        }
        found[node_id] = {
            **known(display_name=info["display_name"], description=info["description"]),
            "inputs": {name: each for name, each in inputs.items() if each},
            "outputs": {index: each for index, each in outputs.items() if each},
        }
    return found


def english_names(all_nodes: dict[str, Info]) -> dict[str, Any]:
    """nodeDefs.json for English: the names of inputs that differ from their ids."""
    found: dict[str, Any] = {}
    for node_id, info in _ours(all_nodes).items():
        named = {name: spec[1].get("display_name", name) for name, spec in _inputs(info) if len(spec) > 1}
        inputs = {name: {"name": shown} for name, shown in named.items() if shown != name}
        if inputs:
            found[node_id] = {"inputs": inputs}
    return found


def files_of(all_nodes: dict[str, Info], words: Catalogue) -> dict[str, Any]:
    """The two files of a language by name."""
    page = {text: words[text] for text in sorted(page_texts()) if text in words}
    return {"nodeDefs.json": definitions(all_nodes, words), "main.json": {PAGE: page}}


def missing(all_nodes: dict[str, Info], words: Catalogue) -> list[str]:
    """The texts that a catalogue lacks, in the order of the nodes and then of the page."""
    return [
        text for text in dict.fromkeys([*node_texts(all_nodes), *sorted(page_texts())]) if text and text not in words
    ]


def unused(all_nodes: dict[str, Info], words: Catalogue) -> list[str]:
    """Translations of texts that don't exist any more."""
    return sorted(words.keys() - {*node_texts(all_nodes), *page_texts()})


def _ours(all_nodes: dict[str, Info]) -> dict[str, Info]:
    return {name: info for name, info in sorted(all_nodes.items()) if name.startswith("QwenEdit_")}


def _inputs(info: Info) -> list[tuple[str, list[Any]]]:
    return [item for part in ("required", "optional") for item in info["input"].get(part, {}).items()]


def catalogues() -> dict[str, Catalogue]:
    """The catalogues by language."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(CATALOGUES.glob("*.json"))}


def current(all_nodes: dict[str, Info]) -> dict[str, Any]:
    """What the folder `locales` should contain: each file by its path in it."""
    files = {"en/nodeDefs.json": english_names(all_nodes)}
    for language, words in catalogues().items():
        files |= {f"{language}/{name}": value for name, value in files_of(all_nodes, words).items()}
    return files


def main() -> int:
    """Write the files, and print what is missing as JSON."""
    found = all_nodes()
    for name, value in current(found).items():
        path = LOCALES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for language, words in catalogues().items():
        report = {"missing": missing(found, words), "unused": unused(found, words)}
        sys.stdout.write(f"{language}: {json.dumps(report, ensure_ascii=False, indent=1)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
