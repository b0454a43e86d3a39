"""Every text of the page can be translated: it goes through `t`, with a literal as its key."""

from __future__ import annotations

import re

from tools.page_texts import calls, page_texts, untranslated


def test_each_text_is_a_literal():
    assert [f"{name}: {source[:60]}" for name, source, text in calls() if text is None] == []


def test_each_placeholder_gets_a_value():
    assert "step {step} of {count}" in page_texts()
    lacking = [
        f"{name}: {text}"
        for name, source, text in calls()
        for placeholder in re.findall(r"\{(\w+)\}", text or "")
        if not re.search(rf"[{{,]\s*{placeholder}\s*[:,}}]", source.removeprefix(f'"{text}"'))
    ]
    assert lacking == []


def test_no_text_is_shown_without_a_translation():
    assert untranslated() == []
