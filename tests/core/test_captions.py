"""Captions from text files and tables, with prefixes and suffixes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from trainer_core.config import CaptionConfig, DatasetConfig
from trainer_core.data.caption_edits import edited
from trainer_core.data.caption_table import key_of
from trainer_core.data.pairing import folder_state, pair_folders, scan_folders
from trainer_core.errors import ConfigError, DatasetError, MissingPackageError


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders `after` and `before` with the pairs a and b/c, without captions. Returns their parent."""
    for part in ("after", "before"):
        for key in ("a", "b/c"):
            path = tmp_path / part / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (len(part), len(key), 0)).save(path)
    return tmp_path


def config(root: Path, strategy: str, instance_prompt: str = "", **settings: object) -> DatasetConfig:
    return DatasetConfig(
        target_dir=str(root / "after"),
        reference_dirs=(str(root / "before"),),
        caption_strategy=strategy,
        instance_prompt=instance_prompt,
        captions=CaptionConfig(**settings),
    )


def captions(settings: DatasetConfig) -> dict[str, tuple[str, ...]]:
    return {pair.key: pair.captions for pair in pair_folders(settings).pairs}


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def test_lines_are_captions_unless_the_text_is_one(folders: Path) -> None:
    for key in ("a", "b/c"):
        write(folders / "after" / f"{key}.txt", " one\r\n\r\ntwo \n")
    assert captions(config(folders, "textfile"))["a"] == ("one", "two")
    assert captions(config(folders, "textfile", disable_multiline_split=True))["a"] == ("one\n\ntwo",)


def test_words_before_and_behind(folders: Path) -> None:
    settings = {"prepend_instance_prompt": True, "caption_prefix": "QWE: ", "caption_suffix": " now"}
    found = captions(config(folders, "filename", " make it ", **settings))
    assert found == {"a": ("QWE: make it a now",), "b/c": ("QWE: make it c now",)}
    assert captions(config(folders, "instanceprompt", "blue", **settings))["a"] == ("QWE: blue now",)


def test_shuffled_tags_are_further_captions(folders: Path) -> None:
    for key in ("a", "b/c"):
        write(folders / "after" / f"{key}.txt", "dog, running,park , sunny day\nonly, two")
    plain = ("dog, running,park , sunny day", "only, two")
    shuffle = {"caption_shuffle_count": 3, "caption_shuffle_position_start": 1, "caption_shuffle_seed": 5}
    settings = config(folders, "textfile", caption_prefix="X ", **shuffle)
    found = captions(settings)["a"]
    assert (found[0], found[-1]) == ("X dog, running,park , sunny day", "X only, two") and len(found) == 4
    tags = [each.removeprefix("X ").split(", ") for each in found[1:3]]
    assert all(each[0] == "dog" and sorted(each) == ["dog", "park", "running", "sunny day"] for each in tags)
    assert len({*found}) == 4, "two of the three variants are equal"
    assert captions(settings)["a"] == found, "the order is a function of seed and caption"
    other = captions(config(folders, "textfile", caption_prefix="X ", **{**shuffle, "caption_shuffle_seed": 6}))["a"]
    assert other != found
    alone = captions(config(folders, "textfile", **shuffle, caption_shuffle_include_original=False))["a"]
    assert plain[0] not in alone and plain[1] in alone, "one tag after the fixed one can't be shuffled"
    assert captions(config(folders, "textfile", caption_shuffle_count=0))["a"] == plain
    words = captions(
        config(folders, "instanceprompt", "a b", caption_shuffle_count=9, caption_shuffle_split_on="space")
    )
    assert set(words["a"]) == {"a b", "b a"}
    dots = captions(
        config(folders, "instanceprompt", "A. B.", caption_shuffle_count=9, caption_shuffle_split_on="period")
    )
    assert set(dots["a"]) == {"A. B.", "B. A."}


def test_several_instance_prompts(folders: Path) -> None:
    settings = config(folders, "instanceprompt", "one", more_instance_prompts=("two", " three "))
    assert captions(settings)["a"] == ("one", "two", "three")


@pytest.mark.parametrize(
    ("lines", "before", "after"),
    [
        (("arafed ",), "an arafed dog and arafed cat", "an dog and cat"),
        (("arafed",), "an arafed dog", "an dog"),
        (("this .* has a",), "so this old dog has a bone and has a tail", "so tail"),
        (("this .* has a",), "has a dog this", "has a dog this"),
        (("^there is ",), "there is a dog, there is a cat", "a dog, there is a cat"),
        (("^there is ",), "and there is a dog", "and there is a dog"),
        ((" dog$",), "dog and dog", "dog and"),
        (("^dog$",), "dog dog", "dog dog"),
        (("a.*b.*c$",), "x a-b-c-c", "x"),
        (("a.*b.*c$",), "x a-c-b", "x a-c-b"),
        ((", in.*",), "a dog, in a park", "a dog"),
        (("s/dog/cat/",), "dog dog", "cat dog"),
        (("s/dog/cat", "s/^cat/a bird/"), "dog dog", "a bird dog"),
        (("s/a/b/c/",), "s/a/b/c/x", "x"),
        (("(photo)", "c++"), "a (photo) of c++ code", "a of code"),
        (("$", "^"), "same  spaces", "same  spaces"),
        (("aba",), "ababa", "ba"),
    ],
)
def test_texts_that_are_taken_out(lines: tuple[str, ...], before: str, after: str) -> None:
    assert edited((before,), CaptionConfig(caption_filter_list=lines)) == (after,)


def test_filters_apply_to_each_line_before_the_prefix(folders: Path) -> None:
    for key in ("a", "b/c"):
        write(folders / "after" / f"{key}.txt", "^one\nend")
    settings = {"disable_multiline_split": True, "caption_prefix": "one: "}
    found = captions(config(folders, "textfile", **settings, caption_filter_list=("one.*end", "^^", "end$")))
    assert found["a"] == ("one: one",), "anything does not pass a line's end"
    gone = config(folders, "instanceprompt", "one", caption_filter_list=("^one",))
    with pytest.raises(DatasetError, match="takes out the whole caption"):
        pair_folders(gone)
    with pytest.raises(ConfigError, match="caption_filter_list"):
        CaptionConfig(caption_filter_list=(" ",))


def test_filters_take_linear_time() -> None:
    hard = CaptionConfig(caption_filter_list=("a.*" * 200 + "b", ".*".join("ab" * 300) + "$"))
    assert edited(("a" * 20_000,), hard) == ("a" * 20_000,)  # with backtracking, this would take years


def test_a_column_for_rows_without_a_caption(folders: Path) -> None:
    write(folders / "after" / "t.csv", "filename,caption,tags\na,,red\nb/c,blue,other\n")
    table = {"caption_file": "t.csv", "fallback_caption_column": "tags"}
    assert captions(config(folders, "csv", **table)) == {"a": ("red",), "b/c": ("blue",)}
    with pytest.raises(DatasetError, match=r"no column 'none'.*or fallback_caption_column"):
        pair_folders(config(folders, "csv", caption_file="t.csv", fallback_caption_column="none"))


def test_csv(folders: Path) -> None:
    table = '\ufeffpicture,words\r\na.PNG," one, ""two"" "\r\nb\\c,"[""x"", ""y""]"\r\n./a,three\r\nz,unused\r\n'
    write(folders / "after" / "table.csv", table)
    settings = config(folders, "csv", caption_file="table.csv", caption_column="words", filename_column="picture")
    assert captions(settings) == {"a": ('one, "two"', "three"), "b/c": ("x", "y")}
    assert [note for note in scan_folders(settings).notes if "without a target, not used: 1 (z)" in note]


def test_jsonl(folders: Path) -> None:
    rows = [{"filename": "a.png", "caption": ["eins", "größer"]}, {"filename": "b/c", "caption": "[sic] drei"}]
    write(folders / "t.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    found = captions(config(folders, "jsonl", caption_file=str(folders / "t.jsonl")))
    assert found == {"a": ("eins", "größer"), "b/c": ("[sic] drei",)}


def test_without_a_parquet_package_the_error_says_what_to_install(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders / "after" / "t.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"caption_strategy parquet needs the package pyarrow.*pip install"):
        pair_folders(config(folders, "parquet", caption_file="t.parquet"))


def test_parquet(folders: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = pyarrow.table({"filename": ["a.png", "b/c"], "caption": [["one", "two"], None], "tags": ["x", "y"]})
    parquet.write_table(table, folders / "after" / "t.parquet")
    found = captions(config(folders, "parquet", caption_file="t.parquet", fallback_caption_column="tags"))
    assert found == {"a": ("one", "two"), "b/c": ("y",)}


@pytest.mark.parametrize(
    ("strategy", "text", "words"),
    [
        ("csv", None, ["t.csv", "no such file", "caption_file"]),
        ("csv", "file,caption\na,b\n", ["row 1", "no column 'filename'", "file, caption"]),
        ("csv", "filename,caption\n,b\n", ["row 1", "file name must be text, got ''"]),
        ("jsonl", '{"filename": "a", "caption": "x"}\n{', ["line 2 is not JSON"]),
        ("jsonl", "[1]", ["row 1: each row must be a JSON object, got 1"]),
        ("jsonl", '{"filename": "a", "caption": {"x": 1}}', ["row 1", "text or a list of texts"]),
        ("csv", "filename,caption\na,b\n", ["c.png: no caption in t.csv", "'filename'"]),
        ("csv", "filename,caption\na,b\nb/c, \n", ["c.png: no caption in t.csv"]),
    ],
)
def test_what_is_wrong_with_a_table(folders: Path, strategy: str, text: str | None, words: list[str]) -> None:
    (folders / "before" / "a.png").unlink()  # a second problem, which must be reported too
    if text is not None:
        write(folders / "after" / f"t.{strategy}", text)
    with pytest.raises(DatasetError) as caught:
        pair_folders(config(folders, strategy, caption_file=f"t.{strategy}"))
    assert len(caught.value.problems) == 2
    assert any(all(word in problem for word in words) for problem in caught.value.problems), caught.value
    assert any(
        "there is no reference (picture before the edit) for it in" in problem for problem in caught.value.problems
    )


def test_a_table_that_is_no_text(folders: Path) -> None:
    (folders / "after" / "t.csv").write_bytes("filename,caption\na,größer\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        pair_folders(config(folders, "csv", caption_file="t.csv"))


def test_a_changed_table_changes_the_state(folders: Path) -> None:
    settings = config(folders, "csv", caption_file="t.csv")
    states = {folder_state(settings)}
    for text in ("filename,caption\na,b\n", "filename,caption\na,bb\n"):
        write(folders / "after" / "t.csv", text)
        states.add(folder_state(settings))
    assert len(states) == 3


def test_settings_that_need_others() -> None:
    with pytest.raises(ConfigError, match="caption_file"):
        config(Path("x"), "csv")
    with pytest.raises(ConfigError, match="instance_prompt"):
        config(Path("x"), "filename", prepend_instance_prompt=True)
    with pytest.raises(ConfigError, match="caption_column"):
        CaptionConfig(caption_column="")


def test_keys_of_names() -> None:
    assert [key_of(name) for name in ("./a/b.JPG", "a\\b", "a/b.c", "a.b.png")] == ["a/b", "a/b", "a/b.c", "a.b"]
