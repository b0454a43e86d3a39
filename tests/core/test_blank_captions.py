"""A caption of which nothing is seen counts as empty, wherever captions come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.pair_files import config, pair, problems_of, text
from trainer_core.config import CaptionConfig, EncodingConfig
from trainer_core.data.captions import read_caption_file
from trainer_core.data.graph_pairs import pair_pictures
from trainer_core.errors import ConfigError, DatasetError
from trainer_core.text import is_blank

BLANK = ["", "  ", "\u200b", "\ufeff\u200d \u2060", "\u00ad", "\u3164", "\u2800\u2800", "\ufe0f", "\u00a0\t"]


@pytest.mark.parametrize("blank", BLANK)
def test_blank_texts(blank: str) -> None:
    assert is_blank(blank)
    assert not is_blank(f"{blank}a{blank}")
    assert not is_blank(f"{blank}变{blank}")
    assert not is_blank(f"{blank}🙂{blank}")


@pytest.mark.parametrize("blank", BLANK[2:])
def test_a_blank_caption_is_empty_wherever_it_comes_from(tmp_path: Path, blank: str) -> None:
    with pytest.raises(DatasetError, match="the caption file is empty"):
        read_caption_file(text(tmp_path / "a.txt", blank))
    assert read_caption_file(text(tmp_path / "b.txt", f"{blank}\nMake it blue.\n{blank}")) == ("Make it blue.",)

    pair(tmp_path, "a")
    text(tmp_path / "captions.jsonl", json.dumps({"filename": "a.png", "caption": blank}))
    table = CaptionConfig(caption_file=str(tmp_path / "captions.jsonl"))
    assert any("no caption" in each for each in problems_of(config(tmp_path, caption_strategy="jsonl", captions=table)))

    picture = Image.new("RGB", (16, 16))
    with pytest.raises(DatasetError, match="captions are empty: 1"):
        pair_pictures([picture] * 2, [[picture] * 2], ["Make it blue.", blank], tmp_path / "graph")
    with pytest.raises(ConfigError, match="instance_prompt"):
        config(tmp_path, caption_strategy="instanceprompt", instance_prompt=blank)
    with pytest.raises(ConfigError, match="validation_prompts"):
        EncodingConfig(validation_prompts=(blank,))


def test_a_blank_file_name_is_no_caption(tmp_path: Path) -> None:
    pair(tmp_path, "\u3164_")
    (problem,) = problems_of(config(tmp_path, caption_strategy="filename"))
    assert "its name contains no words" in problem
