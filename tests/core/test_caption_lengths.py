"""Captions above tokenizer_max_length are named with their number of tokens, and short ones need no tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.comfyui import comfyui_dir
from trainer_core.conditioning import caption_lengths
from trainer_core.conditioning.caption_lengths import too_long
from trainer_core.errors import Interrupted, ModelFileError
from trainer_core.events import SilentObserver, Stop
from trainer_core.qwen_image import prompt
from trainer_core.qwen_image.prompt import load_tokenizer

SENTENCE = "Turn the sky behind the old tower into a red sunset. "
NOWHERE = Path("there is no tokenizer here")


@pytest.fixture(scope="module")
def folder() -> Path:
    """ComfyUI's tokenizer, the real one."""
    return comfyui_dir() / "comfy" / "text_encoders" / "qwen25_tokenizer"


def test_the_count_is_the_tokenizers(folder: Path):
    tokens = len(load_tokenizer(folder)(SENTENCE * 100)["input_ids"])
    assert list(too_long([("a", SENTENCE * 100)], tokens, folder)) == []
    (problem,) = too_long([("a", SENTENCE * 100)], tokens - 1, folder)
    assert problem == (
        f"a: {SENTENCE[:53] + SENTENCE[:7]!r}… has {tokens:,} tokens; tokenizer_max_length allows {tokens - 1:,}. "
        "Shorten it."
    )


def test_prompts_with_no_more_bytes_than_tokens_need_no_tokenizer():
    assert list(too_long([("a", "x" * 1024), ("b", "")], 1024, NOWHERE)) == []
    with pytest.raises(ModelFileError, match="no tokenizer here"):
        list(too_long([("a", "x" * 1025)], 1024, NOWHERE))


def test_a_token_has_at_least_one_byte(folder: Path):
    """Otherwise a prompt could be too long though it has fewer bytes than tokens are allowed."""
    tokenizer = load_tokenizer(folder)
    for text in (
        "\u0958" * 50,
        "\ufb2c" * 50,
        "\U0001f468\u200d\U0001f469" * 20,
        "\x01\x02" * 30,
        "a" * 99,
        "  \n\t " * 9,
    ):
        assert len(tokenizer(text)["input_ids"]) <= caption_lengths._bytes(text)


def test_each_text_is_counted_once_and_all_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    tokenizer = load_tokenizer(folder)

    def counting(text: str) -> dict[str, list[int]]:
        asked.append(text)
        return tokenizer(text)

    monkeypatch.setattr(prompt, "load_tokenizer", lambda _folder: counting)
    problems = list(too_long([("a", SENTENCE * 9), ("b", SENTENCE * 9), ("c", SENTENCE)], 20, folder))
    assert [each[:2] for each in problems] == ["a:", "b:"]
    assert asked == [SENTENCE * 9, SENTENCE]


def test_a_stop_is_heard(folder: Path):
    class Stopping(SilentObserver):
        def should_stop(self) -> Stop:
            return Stop.PAUSE

    with pytest.raises(Interrupted):
        list(too_long([("a", SENTENCE)], 5, folder, Stopping()))
