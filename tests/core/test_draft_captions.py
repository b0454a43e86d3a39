"""Drafting captions: which pairs get one, what is kept of an answer, and that no file is ever replaced."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support.narrow import make_pairs
from tests.support.writers import make_writing_base
from trainer_core import draft_captions, files
from trainer_core.config import CaptionConfig, CaptionDraftConfig, DatasetConfig, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.draft_captions import DraftPlan, caption_from, plan_drafts, question_about, write_drafts
from trainer_core.errors import ConfigError, DatasetError, DiskError, Interrupted, JobError, ModelFileError
from trainer_core.events import SilentObserver, Stop
from trainer_core.qwen_image.writer import Answer

SETTINGS = CaptionDraftConfig()


@pytest.fixture(scope="module")
def base(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return make_writing_base(tmp_path_factory.mktemp("writing") / "base", model)


@pytest.fixture
def pairs(tmp_path: Path) -> DatasetConfig:
    """Four pairs. 000 has a caption, the others don't."""
    config = make_pairs(tmp_path / "pairs", 4)
    for key in ("001", "002", "003"):
        text(config, key).unlink()
    return config


def text(config: DatasetConfig, key: str) -> Path:
    return Path(config.target_dir) / f"{key}.txt"


class Told(SilentObserver):
    """Keeps notes, and stops after so many."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.notes: list[str] = []
        self.stop_after = stop_after

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def should_stop(self) -> Stop:
        return Stop.PAUSE if len(self.notes) >= self.stop_after else Stop.NO


class FakeWriter:
    """Answers what it is told, in place of the network."""

    def __init__(self, answer: Callable[[int], str]) -> None:
        self.asked: list[tuple[str, list[tuple[int, ...]]]] = []
        self._answer = answer

    def answer(self, question: str, pictures: Sequence[Tensor], max_tokens: int) -> Answer:
        self.asked.append((question, [tuple(each.shape) for each in pictures]))
        return Answer(self._answer(len(self.asked)), is_whole=True)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], str]], FakeWriter]:
    """Sets what the model answers to the first, second, ... question."""

    def use(answer: Callable[[int], str]) -> FakeWriter:
        made = FakeWriter(answer)
        monkeypatch.setattr(draft_captions, "load_writer", lambda *_: made)
        return made

    return use


def planned(config: DatasetConfig, base: ModelConfig, tmp_path: Path, **parts: DatasetConfig) -> DraftPlan:
    return plan_drafts({"dataset": config, **parts}, base, checked_dir=tmp_path / "checked")


def test_missing_captions_are_written_and_the_others_left(
    pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, answers: Any
) -> None:
    made = answers(lambda number: f'The edit: "Make the sky number {number}."\n')
    before = text(pairs, "000").read_text()
    plan, told = planned(pairs, base, tmp_path), Told()
    assert list(plan.missing) == ["001", "002", "003"]
    assert "3 pairs without a caption:\n  - 001\n  - 002\n  - 003\nLeft as they are" in plan.as_text()
    report = write_drafts(plan, SETTINGS, told)
    assert text(pairs, "000").read_text() == before
    assert [text(pairs, key).read_text() for key in ("001", "002", "003")] == [
        f"Make the sky number {number}.\n" for number in (1, 2, 3)
    ]
    assert "3 captions drafted" in report and "  - 002: Make the sky number 2." in report and "1 (000)" in report
    assert told.notes == [f"00{number}: Make the sky number {number}." for number in (1, 2, 3)]
    assert [sizes for _, sizes in made.asked] == [[(3, 84, 84)] * 2] * 3, "reference and target, in whole tokens"
    assert [pair.captions for pair in pair_folders(pairs).pairs][1] == ("Make the sky number 1.",)
    assert sorted(path.suffix for path in Path(pairs.target_dir).iterdir()) == [".png"] * 4 + [".txt"] * 4


def test_with_captions_for_all_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_captions, "load_writer", None)
    nowhere = ModelConfig(base="/nowhere")
    pairs = make_pairs(tmp_path / "pairs", 2)
    plan = planned(pairs, nowhere, tmp_path)
    assert "No pair lacks a caption, so nothing was loaded" in write_drafts(plan, SETTINGS)
    assert "No pair lacks a caption" in plan.as_text()
    text(pairs, "001").write_text("")
    assert "Nothing to draft, so nothing was loaded" in planned(pairs, nowhere, tmp_path).as_text()


def test_a_stop_keeps_what_is_written_and_the_next_call_goes_on(
    pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, answers: Any
) -> None:
    answers(lambda number: f"first {number}")
    with pytest.raises(Interrupted):
        write_drafts(planned(pairs, base, tmp_path), SETTINGS, Told(stop_after=1))
    assert text(pairs, "001").read_text() == "first 1\n" and not text(pairs, "002").exists()
    made = answers(lambda number: f"second {number}")
    write_drafts(planned(pairs, base, tmp_path), SETTINGS)
    assert len(made.asked) == 2
    assert text(pairs, "001").read_text() == "first 1\n" and text(pairs, "003").read_text() == "second 2\n"


def test_folders_that_look_swapped_are_told_before_the_first_draft(
    pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, answers: Any
) -> None:
    folders = tmp_path / "pairs"
    before, after = (folders / part for part in ("before", "after"))
    Path(pairs.target_dir).rename(before)
    Path(pairs.reference_dirs[0]).rename(after)
    answers(lambda _: "Make it blue.")
    told = Told()
    swapped = dataclasses.replace(pairs, target_dir=str(before), reference_dirs=(str(after),))
    report = write_drafts(planned(swapped, base, tmp_path), SETTINGS, told)
    assert "Are the two folders swapped?" in told.notes[0] and "Are the two folders swapped?" in report


@pytest.mark.parametrize("name", ["001.txt", "001.caption", "001.png.txt"])
def test_a_caption_that_appears_meanwhile_is_left_alone(
    name: str, pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, answers: Any
) -> None:
    theirs = Path(pairs.target_dir) / name

    def answer(number: int) -> str:
        if number == 1:
            theirs.write_text("theirs")
        return "ours"

    answers(answer)
    report = write_drafts(planned(pairs, base, tmp_path), SETTINGS)
    assert theirs.read_text() == "theirs" and "  - 001: it has a caption by now." in report
    assert text(pairs, "001").exists() == (name == "001.txt") and text(pairs, "002").read_text() == "ours\n"


def test_a_caption_that_was_there_before_the_pair_comes_is_not_asked_for(
    pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, answers: Any
) -> None:
    made, plan = answers(lambda _: "ours"), planned(pairs, base, tmp_path)
    text(pairs, "002").write_text("theirs")
    write_drafts(plan, SETTINGS)
    assert len(made.asked) == 2 and text(pairs, "002").read_text() == "theirs"


def test_pairs_that_can_not_be_drafted_are_in_the_report(
    pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, answers: Any
) -> None:
    answers(lambda number: " \n ** ** " if number == 1 else "Make it blue.")
    text(pairs, "000").write_text(" \n")
    plan = planned(pairs, base, tmp_path)
    (Path(pairs.target_dir) / "002.png").write_bytes((Path(pairs.target_dir) / "003.png").read_bytes())
    report = write_drafts(plan, SETTINGS)
    assert "  - 001: the model's answer is empty. Write the caption." in report
    assert "  - 002: " in report and "has changed since the folders were checked" in report
    assert "  - 000: " in report and "the caption file is empty" in report
    assert "  - 003: Make it blue." in report
    assert (
        not text(pairs, "001").exists() and not text(pairs, "002").exists() and text(pairs, "000").read_text() == " \n"
    )


def test_all_problems_are_told_at_once(pairs: DatasetConfig, model: ModelConfig, tmp_path: Path) -> None:
    (Path(pairs.reference_dirs[0]) / "001.png").unlink()
    (tmp_path / "pairs" / "captions").mkdir()
    (tmp_path / "pairs" / "captions" / "002.txt").write_text("make it red")
    wrong = dataclasses.replace(model, device="nonsense", tokenizer=str(tmp_path))  # and its head is tied
    with pytest.raises(JobError) as caught:
        planned(pairs, wrong, tmp_path)
    said = str(caught.value)
    assert "there is no reference" in said and "device is 'nonsense'" in said and "The tokenizer folder" in said
    assert "(002.txt)" in said and "If these are no captions, move them away." in said


def test_a_text_encoder_without_a_head_is_named(pairs: DatasetConfig, model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        planned(pairs, model, tmp_path)
    said = str(caught.value)
    assert "no language head, lm_head.weight" in said and "tie_word_embeddings" in said
    assert "qwen_2.5_vl_7b" in said


def test_the_demo_model_can_not_write(pairs: DatasetConfig, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The demo model can't write captions"):
        planned(pairs, ModelConfig(tokenizer=str(tokenizer_dir), device="cpu"), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"caption_strategy": "filename"},
        {"caption_strategy": "instanceprompt", "instance_prompt": "x"},
        {"caption_strategy": "csv", "captions": CaptionConfig(caption_file="none.csv")},
    ],
)
def test_no_drafts_that_nothing_reads(
    changes: dict[str, Any], pairs: DatasetConfig, base: ModelConfig, tmp_path: Path
) -> None:
    other = dataclasses.replace(pairs, **changes)
    report = write_drafts(planned(other, base, tmp_path), SETTINGS)
    assert "Nothing to draft" in report and "--set dataset.caption_strategy=textfile" in report
    assert not text(pairs, "001").exists()
    both = planned(pairs, base, tmp_path, second=other)
    assert list(both.missing) == ["dataset/001", "dataset/002", "dataset/003"]
    assert "--set datasets.second.dataset.caption_strategy=textfile" in both.as_text()


def test_a_target_without_references_has_no_edit(pairs: DatasetConfig, base: ModelConfig, tmp_path: Path) -> None:
    (Path(pairs.reference_dirs[0]) / "002.png").unlink()
    plan = planned(dataclasses.replace(pairs, references_optional=True), base, tmp_path)
    assert list(plan.missing) == ["001", "003"]
    assert "  - 002: it has no reference" in plan.as_text()


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("Make the sky orange.", "Make the sky orange."),
        ("  “Make the sky orange.”  ", "Make the sky orange."),
        ('The edit: "Make the sky orange."', "Make the sky orange."),
        ("**Edit instruction:** Make the sky\torange.", "Make the sky orange."),
        ("Here's the instruction:\n\n- Make the sky orange.\n- Make it blue.", "Make the sky orange."),
        ("1. Make the sky orange.", "Make the sky orange."),
        ("`Caption: Make the sky orange.`", "Make the sky orange."),
        ("编辑指令：把天空变成橙色。", "把天空变成橙色。"),
        ("“Open” becomes “Closed”", "“Open” becomes “Closed”"),
        ('Write "Open" on the "door"', 'Write "Open" on the "door"'),
        ("Make the sky orange.\x00\x07", "Make the sky orange."),
        ("Edit the sky.", "Edit the sky."),
    ],
)
def test_what_is_kept_of_an_answer(answer: str, caption: str) -> None:
    assert caption_from(Answer(answer, is_whole=True)) == (caption, "")


@pytest.mark.parametrize(
    ("answer", "caption", "why"),
    [
        ("Make the sky orange. Make the gro", "Make the sky orange.", ""),
        ("Make the sky 1.5 times as large and the gro", "", "no whole sentence within max_tokens"),
        ("把天空变成橙色。把", "把天空变成橙色。", ""),
        ("Make the sky orange\nThis is bec", "Make the sky orange", ""),
        ("", "", "the model's answer is empty"),
    ],
)
def test_an_answer_that_was_cut_off(answer: str, caption: str, why: str) -> None:
    found, said = caption_from(Answer(answer, is_whole=False))
    assert found == caption and (why in said if why else not said)


def test_the_question_names_the_pictures() -> None:
    one, three = question_about(1, SETTINGS), question_about(3, CaptionDraftConfig(hint=" It removes people. "))
    assert "turns Picture 1 into Picture 2" in one and "About this edit" not in one and "in English" in one
    assert "Picture 4 was made from Picture 1 and Picture 2 and Picture 3" in three
    assert "About this edit: It removes people. " in three
    assert "把天空变成橙色" in question_about(1, CaptionDraftConfig(language="Chinese"))
    with pytest.raises(ConfigError, match="hint must be a text without"):
        CaptionDraftConfig(hint="<|image_pad|>")


def test_a_new_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    assert files.write_new(path, b"first") and not files.write_new(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert not files.write_new(path, b"second") and files.write_new(tmp_path / "b.txt", b"third")
    assert path.read_bytes() == b"first" and (tmp_path / "b.txt").read_bytes() == b"third"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(DiskError):
        files.write_new(tmp_path / "nowhere" / "c.txt", b"")


def test_a_folder_that_can_not_be_written_to(
    pairs: DatasetConfig, base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(DiskError, match="can't be written to"):
        planned(pairs, base, tmp_path)


def test_large_pictures_are_scaled_down_and_small_ones_stay(tmp_path: Path) -> None:
    from PIL import Image

    for size, wanted in (((3000, 2000), (3, 616, 952)), ((60, 60), (3, 56, 56)), ((20, 500), (3, 504, 28))):
        found = tuple(draft_captions._as_seen(Image.new("RGB", size)).shape)
        assert found == wanted
        assert found[1] * found[2] <= draft_captions.LARGEST_AREA * 1.05


def test_a_missing_dataset_folder_is_an_error(base: ModelConfig, tmp_path: Path) -> None:
    config = DatasetConfig(target_dir=str(tmp_path / "none"), reference_dirs=(str(tmp_path / "nothing"),))
    with pytest.raises(DatasetError, match="the folder does not exist"):
        planned(config, base, tmp_path)
