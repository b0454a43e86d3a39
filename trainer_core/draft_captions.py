"""Drafts captions with the base model's text encoder, for pairs that have none. No file is ever replaced."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .conditioning.pictures import to_tensor
from .config import CaptionConfig, CaptionDraftConfig, DatasetConfig, ModelConfig
from .config.caption_drafts import CaptionLanguage
from .data.captions import read_caption_file
from .data.folders import CAPTION_SUFFIXES, scan_folder
from .data.images import open_checked_picture
from .data.layouts import captions_elsewhere
from .data.pairing import EditPair, pair_folders
from .device import pick_device, release_memory
from .disk import disk_errors
from .errors import DatasetError, OutOfMemoryError, Problems
from .events import SILENT, Observer, watched
from .files import clean_leftovers, write_new
from .geometry import Size, area_size
from .planning.disk_space import DiskUse, check_disk
from .qwen_image.base_model import BaseModel
from .qwen_image.vision import MERGE, PATCH
from .qwen_image.writer import Answer, Writer, check_writer, load_writer
from .text import counted, is_blank, shown, text_problem, to_fix

LARGEST_AREA = 768 * 768
"""Pixels at which the model sees a picture; smaller ones keep their size. Four are 3,000 tokens, fewer than encoding
takes at a time, so the memory planned for encoding is enough, also for the cache of keys and values."""
_MOST_LINES = 1_000  # pairs of each kind in a report
_EXAMPLES: dict[CaptionLanguage, tuple[str, str]] = {  # for one reference, and for several
    "English": ("Make the sky orange.", "Put the hat from Picture 2 on the man in Picture 1."),
    "Chinese": ("把天空变成橙色。", "把Picture 2中的帽子戴到Picture 1中的男人头上。"),
}
_LABEL = re.compile(
    r"^(here(\s+is|['’]s)\s+)?(the\s+|an?\s+)?((edit(ing)?|picture|image)\s+)?"
    r"(instruction|prompt|caption|edit|answer|output|sentence|(编辑)?指令|编辑)\s*[:：]\s*",
    re.IGNORECASE,
)
_MARKS = re.compile(r"^([-*•#>]+|\d+[.)])\s+")  # of Markdown's lists and headings
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "「": "」", "『": "』", "《": "》"}
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")


class Draft(NamedTuple):
    """What became of a pair: the caption that was written, or else why none was. Both are empty if it has one."""

    key: str
    text: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """What `write_drafts` will do. `missing`: pairs without a caption, by the names that reports give them.

    `left`: pairs that are left as they are. `folders`: those of the targets.
    """

    model: ModelConfig
    missing: Mapping[str, EditPair]
    left: tuple[Draft, ...] = ()
    folders: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """The pairs that get a draft and those that don't, without writing anything."""
        if not self.missing:
            return _in_words((), self.left, self.notes)
        keys = "\n".join(_lines([f"  - {shown(key)}" for key in self.missing]))
        rest = "\n".join(_left(self.left, self.notes))
        return f"{counted(len(self.missing), 'pair')} without a caption:\n{keys}\n{rest}".strip()


def plan_drafts(
    parts: Mapping[str, DatasetConfig], model: ModelConfig, observer: Observer = SILENT, *, checked_dir: Path
) -> DraftPlan:
    """List the pairs of datasets, named by id, that lack a caption, and check all that writing drafts needs.

    Only caption_strategy textfile reads a text beside each target, so other datasets get no drafts. Without pairs that
    lack a caption, the model is not looked at. Reads no weights.

    Raises:
        DatasetError: pictures or references are missing or wrong, or captions seem to lie elsewhere.
        ConfigError, ModelFileError, MissingPackageError: see `check_writer`.
        DiskError: a folder can't be written to.
        JobError: several of these.
        Interrupted: the observer asked to stop.
    """
    problems = Problems()
    missing: dict[str, EditPair] = {}
    left: list[Draft] = []
    notes: list[str] = []
    for part_id, config in parts.items():
        before, where = (f"{part_id}/", part_id) if len(parts) > 1 else ("", "")
        if config.caption_strategy != "textfile":
            notes.append(_not_read(config, where))
            continue
        problems.attempt(partial(_check_no_captions_elsewhere, config, observer), where)
        listed = problems.attempt(partial(_listed, config, observer, checked_dir), where)
        if listed is not None:
            missing |= {before + pair.key: pair for pair in listed.missing}
            left += [draft._replace(key=before + draft.key) for draft in listed.left]
            notes += listed.notes
    folders = tuple(dict.fromkeys(pair.target.parent for pair in missing.values()))
    if missing or problems.errors:
        problems.attempt(lambda: pick_device(model.device))
        problems.attempt(lambda: check_writer(BaseModel(model)))
        for folder in folders:
            problems.attempt(partial(check_disk, [DiskUse(folder, "the captions", 0)]))
    problems.raise_all()
    return DraftPlan(model=model, missing=missing, left=tuple(left), folders=folders, notes=tuple(notes))


def write_drafts(plan: DraftPlan, config: CaptionDraftConfig, observer: Observer = SILENT) -> str:
    """Draft the missing captions and write each into a .txt beside its target. Returns a report on all pairs.

    A caption file that appears meanwhile is left alone. Each draft is also a note to the observer, so that it is told
    even if the observer stops the call.

    Raises:
        ModelFileError: the text encoder can't be read.
        OutOfMemoryError: the text encoder or the pictures don't fit; drafts that are written stay.
        DiskError: a draft can't be written.
        Interrupted: the observer asked to stop; drafts that are written stay.
    """
    drafts: list[Draft] = []
    if plan.missing:
        for note in plan.notes:  # such as that the sides look swapped
            observer.on_note(note)
        for folder in plan.folders:
            clean_leftovers(folder)
        with _memory_errors_explained():
            writer = load_writer(BaseModel(plan.model), pick_device(plan.model.device), observer)
            observer.on_progress("Drafting captions", 0, len(plan.missing))
            for key, pair in watched(plan.missing.items(), observer):
                drafts.append(_drafted(key, pair, writer, config))
                observer.on_note(f"{shown(key)}: {drafts[-1].text or drafts[-1].why}")
                observer.on_progress("Drafting captions", len(drafts), len(plan.missing))
            del writer
        release_memory()
    return _in_words(drafts, plan.left, plan.notes)


@dataclass(frozen=True, slots=True)
class _Listed:
    """A dataset's pairs without a caption, and those that are left as they are."""

    missing: list[EditPair]
    left: list[Draft]
    notes: tuple[str, ...]


def _listed(config: DatasetConfig, observer: Observer, checked_dir: Path) -> _Listed:
    """Pair the folders as if all pairs had a caption, and look which of them have one."""
    any_caption = dataclasses.replace(
        config, caption_strategy="instanceprompt", instance_prompt="-", captions=CaptionConfig()
    )
    dataset = pair_folders(any_caption, observer, checked_dir=checked_dir)
    texts = scan_folder(dataset.target_dir, observer=observer).texts
    found = _Listed([], [], dataset.notes)
    for pair in watched(dataset.pairs, observer):
        if pair.key in texts:
            found.left.append(Draft(pair.key, why=_unusable(texts[pair.key])))
        elif not pair.references:
            found.left.append(Draft(pair.key, why="it has no reference, so there is no edit to describe."))
        else:
            found.missing.append(pair)
    return found


def _check_no_captions_elsewhere(config: DatasetConfig, observer: Observer) -> None:
    """Refuse to draft what is probably written already: with a draft beside the target, nothing would tell so later."""
    with disk_errors(Path(config.target_dir)):
        target, *references = (
            scan_folder(Path(root), observer=observer) for root in (config.target_dir, *config.reference_dirs)
        )
        problems = captions_elsewhere(target, references)
    if problems:
        summary = f"Captions seem to be there already, {to_fix(len(problems))}"
        raise DatasetError(summary, [f"{each} If these are no captions, move them away." for each in problems])


def _unusable(path: Path) -> str:
    """Why training would refuse a caption file; empty if it would not."""
    try:
        read_caption_file(path)
    except DatasetError as error:
        return f"{error} Or delete it, and it gets a draft."
    return ""


def _not_read(config: DatasetConfig, where: str) -> str:
    name = f"datasets.{where}.dataset" if where else "dataset"
    return (
        f"{where or shown(config.target_dir)}: no drafts, because caption_strategy is {config.caption_strategy}, which "
        f"reads no .txt beside a target. To write them all the same, add --set {name}.caption_strategy=textfile."
    )


def _drafted(key: str, pair: EditPair, writer: Writer, config: CaptionDraftConfig) -> Draft:
    """Draft the caption of a pair and write it."""
    if _has_caption(pair.target):
        return Draft(key, why="it has a caption by now.")
    before, after = zip(pair.references, pair.digests[1:], strict=True), (pair.target, pair.digests[0])
    try:
        pictures = [_as_seen(open_checked_picture(path, content)) for path, content in (*before, after)]
    except DatasetError as error:
        return Draft(key, why=str(error))
    question = question_about(len(pair.references), config)
    text, why = caption_from(writer.answer(question, pictures, config.max_tokens))
    if why:
        return Draft(key, why=why)
    if _has_caption(pair.target) or not write_new(pair.target.with_suffix(".txt"), f"{text}\n".encode()):
        return Draft(key, why="it has a caption by now.")
    return Draft(key, text)


def _has_caption(target: Path) -> bool:
    """Whether a text lies beside a target, under one of the names that pairing reads."""
    return any(
        target.with_name(f"{name}{suffix}").exists()
        for name in (target.stem, target.name)
        for suffix in CAPTION_SUFFIXES
    )


def _as_seen(picture: Image.Image) -> Tensor:
    """A picture [3, H, W] in the size at which the model sees it: whole vision tokens, at most LARGEST_AREA."""
    size = Size(*picture.size)
    seen = area_size(size, min(LARGEST_AREA, size.width * size.height), PATCH * MERGE)
    return to_tensor(picture.resize(seen, Image.Resampling.LANCZOS, reducing_gap=3.0) if seen != size else picture)


def question_about(num_references: int, config: CaptionDraftConfig) -> str:
    """What the model is asked about a pair. It sees the references as the first pictures and the target as the last."""
    last, example = num_references + 1, _EXAMPLES[config.language][num_references > 1]
    what = (
        f"Picture 1 was taken before an edit, and Picture {last} after it. Write the instruction that turns Picture 1 "
        f"into Picture {last}."
    )
    also = "Don't mention the pictures themselves."
    if num_references > 1:
        given = " and ".join(f"Picture {number}" for number in range(1, last))
        what = f"Picture {last} was made from {given} by an edit. Write the instruction that makes Picture {last}."
        also = f"Don't mention Picture {last}."
    hint = f"About this edit: {config.hint.strip()}" if config.hint.strip() else ""
    how = (
        f"Write one short sentence in {config.language}, in the imperative, such as: {example} Say what changes and "
        f"what it becomes. Don't describe what stays the same. {also} Write nothing but the sentence."
    )
    return " ".join(filter(None, (what, hint, how)))


def caption_from(answer: Answer) -> tuple[str, str]:
    """The caption in an answer: one line without quotes, a label or Markdown. Or "" and why there is none."""
    lines = [line for line in map(_bare, answer.text.splitlines()) if line]
    text = lines[0] if lines else ""
    if text and not answer.is_whole and len(lines) == 1:
        ends = [found.end() for found in _SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
        if not text:
            return "", "the answer has no whole sentence within max_tokens. Raise max_tokens, or write the caption."
    if is_blank(text):
        return "", "the model's answer is empty. Write the caption."
    if problem := text_problem(text):
        return "", f"the model's answer {problem}. Write the caption."
    return text, ""


def _bare(line: str) -> str:
    """A line of an answer without what surrounds the caption; empty if nothing else is there."""
    line, before = " ".join("".join(c if c.isprintable() else " " for c in line).replace("\ufffd", " ").split()), ""
    while line != before:
        before = line
        line = _LABEL.sub("", _MARKS.sub("", line)).strip("* ")
        end = _QUOTES.get(line[:1])
        if end and len(line) > 1 and line.endswith(end) and end not in line[1:-1] and line[0] not in line[1:-1]:
            line = line[1:-1].strip()
    return line


def _in_words(drafts: Sequence[Draft], left: Sequence[Draft], notes: Sequence[str]) -> str:
    """The report on all pairs."""
    written = [draft for draft in drafts if draft.text]
    unwritten = [draft for draft in drafts if not draft.text]
    head = f"{counted(len(written), 'caption')} drafted. Read and correct them before you train."
    if not written:
        nothing = "Nothing to draft" if any(draft.why for draft in left) or not left else "No pair lacks a caption"
        head = "No captions written." if unwritten else f"{nothing}, so nothing was loaded or written."
    return "\n".join(
        [
            head,
            *_lines([f"  - {shown(draft.key)}: {draft.text}" for draft in written]),
            *(["Without a draft:"] if unwritten else []),
            *_lines([f"  - {shown(draft.key)}: {draft.why}" for draft in unwritten]),
            *_left(left, notes),
        ]
    )


def _left(left: Sequence[Draft], notes: Sequence[str]) -> Iterator[str]:
    """Lines about the pairs that are left as they are."""
    had = [shown(draft.key) for draft in left if not draft.why]
    if had:
        listed = ", ".join(had[:_MOST_LINES]) + (", …" if len(had) > _MOST_LINES else "")
        yield f"Left as they are, because they have a caption: {len(had):,} ({listed})."
    if others := [f"  - {shown(draft.key)}: {draft.why}" for draft in left if draft.why]:
        yield "Left as they are:"
        yield from _lines(others)
    if notes:
        yield "Notes:"
        yield from (f"  - {note}" for note in notes)


def _lines(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"  … and {more:,} more."] if more > 0 else [])]


@contextmanager
def _memory_errors_explained() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # the frames keep the network alive
        release_memory()
        raise OutOfMemoryError(
            "Out of memory while drafting captions. Drafts that are written stay. Set text_encoder_precision to "
            "int8-quanto or nf4-bnb, or close other programs that use the device. Then run again."
        ) from error
