"""The translations of the nodes and of the page: current, and complete where a beginner is."""

from __future__ import annotations

import json
from typing import Any

from tools.locales import LOCALES, catalogues, current, missing, unused
from tools.page_texts import page_texts

SHORT_PATH = ("ChooseModel", "EditPairs", "Train", "TryLora")
LANGUAGES = {"ja", "zh"}
_LEAST = 0.9  # of the texts; a text that was changed stays English until somebody translates it


def test_the_files_are_written_from_the_catalogues(all_nodes: dict[str, Any]):
    files = {path.relative_to(LOCALES).as_posix(): path for path in LOCALES.rglob("*.json")}
    wanted = current(all_nodes)
    assert files.keys() == wanted.keys()
    for name, path in files.items():
        assert json.loads(path.read_text(encoding="utf-8")) == wanted[name], name


def test_the_short_path_and_the_page_are_translated(all_nodes: dict[str, Any]):
    assert catalogues().keys() == LANGUAGES
    short = {f"QwenEdit_{name}": all_nodes[f"QwenEdit_{name}"] for name in SHORT_PATH}
    for language, words in catalogues().items():
        assert missing(short, words) == [], language
        lacking = missing(all_nodes, words)
        assert len(lacking) <= (1 - _LEAST) * len(words), lacking[:10]
        assert unused(all_nodes, words) == [], language


def test_a_translation_keeps_its_placeholders():
    for language, words in catalogues().items():
        for text in page_texts() & words.keys():
            assert placeholders(words[text]) == placeholders(text), (language, text)


def placeholders(text: str) -> set[str]:
    """The names in braces."""
    return {part.split("}")[0] for part in text.split("{")[1:]}
