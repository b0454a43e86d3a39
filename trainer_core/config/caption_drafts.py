"""Settings of drafted captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import Limits, Settings, setting

CaptionLanguage = Literal["English", "Chinese"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionDraftConfig(Settings):
    """How the text encoder drafts the captions of pairs that have none."""

    hint: str = setting(
        "",
        "What you know about the edits, or how to word the captions. The model reads it with each pair. For example: "
        "The edit removes people.",
        Limits(valid=lambda text: "<|" not in text, allowed="a text without <|, which begins the model's own marks"),
    )
    max_tokens: int = setting(
        64,
        "Maximum length of a caption in tokens; a token is about four letters of English. Of a longer answer, whole "
        "sentences are kept. 32 to 128 is typical.",
        Limits(min=8, max=512, unit="tokens"),
    )
    language: CaptionLanguage = setting("English", "Language of the captions.")
