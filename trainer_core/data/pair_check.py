"""Check pairs before encoding: misaligned, differently coloured, nearly equal or duplicate pairs, and weak captions.

Nothing is changed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from ..config import PairCheckConfig
from ..events import SILENT, Observer
from ..geometry import Size, kept_share, same_framing
from ..text import beginning, shown, some_of
from .alignment import MIN_UNEDITED_SHARE, Alignment, Pixels, align, estimate
from .duplicates import Bits, near_duplicates, shape_bits
from .images import is_converted, open_reduced
from .in_threads import in_threads
from .pair_memory import Measured, memory_file, memory_key, recall, remember
from .pairing import EditDataset, EditPair, reference_kinds

_GRAPH_SHAPE = 2.5  # more than the 1568 x 672 to which FluxKontextImageScale crops, with some tolerance
_QUICK_SIDE = 128  # pixels of the longer side of the small pictures that are measured first
_CLEARLY = 0.7  # share of a limit: small pictures are precise enough for values below it
_LANCZOS = Image.Resampling.LANCZOS
_ERRORS = 3  # standard errors by which the true shift may exceed the measured one

FindingKind = Literal["shift", "zoom", "colour", "size", "framing", "unmeasured", "equal", "duplicate", "caption"]

# What is usual in some sets: with an edit of the whole picture, or with targets of another size than the references. If
# most pairs have a finding of such a group, the set gets these sentences instead.
_USUAL: tuple[dict[FindingKind, str], ...] = (
    {
        "unmeasured": "reference and target have too little in common to be aligned. This is normal if the edit "
        "changes the whole picture, as a style does. Otherwise check that they show the same scene.",
        "colour": "reference and target differ in colour outside the edit. This is normal if the edit changes colour "
        "or light. Otherwise match the colours, or the LoRA learns the difference.",
    },
    {"size": "reference and target differ in size. Training resizes both. Equal sizes keep both equally sharp."},
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A possible problem of one pair. `text` says what it is and what to do."""

    key: str
    kind: FindingKind
    text: str


@dataclass(frozen=True, slots=True)
class MeasuredPair:
    """A pair's findings, and the alignment of each reference (None if its framing differs).

    `scale`: pixels of the target per pixel of the alignments. `bits`: the perceptual hashes of the target and the first
    reference, 64 bits each.
    """

    findings: tuple[Finding, ...]
    alignments: tuple[Alignment | None, ...]
    scale: float
    bits: Bits


@dataclass(frozen=True, slots=True, repr=False)
class PairCheck:
    """All findings of a dataset. `shifts`: (right, down) in pixels of the target, by pair key and reference number.

    `notes`: sentences about the whole set, on what most pairs have in common and what is therefore no finding.
    """

    num_pairs: int
    findings: tuple[Finding, ...]
    shifts: dict[tuple[str, int], tuple[float, float]]
    notes: tuple[str, ...] = ()

    def of(self, key: str) -> tuple[Finding, ...]:
        """The findings of one pair."""
        return tuple(finding for finding in self.findings if finding.key == key)


def check_pairs(
    dataset: EditDataset, config: PairCheckConfig, observer: Observer = SILENT, *, checked_dir: Path | None = None
) -> PairCheck:
    """Check every pair, several at a time. Keeps only a few numbers per pair in memory.

    With `checked_dir`, measurements are kept there, and pairs whose pictures and limits are the same aren't opened
    again.

    Raises:
        DatasetError: a picture can't be read.
        Interrupted: the observer asked to stop; measurements so far are kept.
    """
    file = checked_dir and memory_file(checked_dir, dataset)
    keys = {pair.key: memory_key(pair, config) for pair in dataset.pairs}
    measured = recall(file, keys.values())
    known = len(measured)
    new = [pair for pair in dataset.pairs if keys[pair.key] not in measured]
    try:
        found = in_threads(lambda pair: _to_keep(pair, config), new, observer, "check-pairs")
        for done, (pair, result) in enumerate(found, 1):
            measured[keys[pair.key]] = result
            observer.on_progress("Checking pairs", done, len(new))
    finally:
        if file is not None and len(measured) > known:
            remember(file, measured)
    results = [measured[keys[pair.key]] for pair in dataset.pairs]
    findings = [
        Finding(pair.key, kind, text)
        for pair, result in zip(dataset.pairs, results, strict=True)
        for kind, text in result.findings
    ]
    findings += _duplicates(dataset.pairs, [result.bits for result in results], config)
    findings += _captions(dataset.pairs)
    order = {pair.key: number for number, pair in enumerate(dataset.pairs)}
    findings.sort(key=lambda finding: order[finding.key])
    notes, findings = _usual(findings, len(dataset.pairs))
    shifts = {
        (pair.key, number): shift
        for pair, result in zip(dataset.pairs, results, strict=True)
        for number, shift in result.shifts.items()
    }
    return PairCheck(len(dataset.pairs), tuple(findings), shifts, notes)


def _usual(findings: list[Finding], pairs: int) -> tuple[tuple[str, ...], list[Finding]]:
    """Notes on what is usual in this set, and the findings that are not."""
    notes: list[str] = []
    for group in _USUAL:
        keys = {kind: dict.fromkeys(each.key for each in findings if each.kind == kind) for kind in group}
        if 2 * len(set(chain(*keys.values()))) <= pairs:
            continue
        findings = [each for each in findings if each.kind not in group]
        for kind, text in group.items():
            found = list(keys[kind])
            names = "" if len(found) == pairs else f" ({some_of(found)})"
            notes += [f"In {len(found)} of {pairs} pairs{names}, {text}"] if found else []
    return tuple(notes), findings


def _to_keep(pair: EditPair, config: PairCheckConfig) -> Measured:
    """What is kept of a pair's measurement: of small pictures if they leave no doubt, otherwise of `measure_pair`."""
    found = _measure_small(pair, config) or measure_pair(pair, config)
    aligned = {number: each.shift for number, each in enumerate(found.alignments) if each and each.measured}
    shifts = {number: (right * found.scale, down * found.scale) for number, (right, down) in aligned.items()}
    return Measured(tuple((each.kind, each.text) for each in found.findings), shifts, found.bits)


def measure_pair(pair: EditPair, config: PairCheckConfig) -> MeasuredPair:
    """Decode one pair at check_side and compare each reference with its target.

    Raises:
        DatasetError: a picture can't be read.
    """
    opened = _open_pair(pair, config.check_side)
    alignments = {number: align(opened.target, each) for number, each in opened.references.items()}
    return _judged(pair, config, opened, alignments)


def _measure_small(pair: EditPair, config: PairCheckConfig) -> MeasuredPair | None:
    """`measure_pair` with small pictures, which is much faster; None if they leave a doubt."""
    opened = _open_pair(pair, _QUICK_SIDE)
    alignments: dict[int, Alignment] = {}
    for number, reference in opened.references.items():
        found = _quick_alignment(opened.target, reference, _Limits(config, opened.scale, number == 0))
        if found is None:
            return None
        alignments[number] = found
    return _judged(pair, config, opened, alignments)


class _Opened(NamedTuple):
    """Reduced pictures of a pair: the target, and by number the references that are framed like it, at its size.

    `scale`: pixels of the target's file per pixel. `bits` as in MeasuredPair.
    """

    target: Pixels
    references: dict[int, Pixels]
    scale: float
    bits: Bits


def _open_pair(pair: EditPair, side: int) -> _Opened:
    """The pictures of a pair, reduced so that the longer side has at most `side` pixels."""
    target, *references = [
        open_reduced(path, side, convert=is_converted(content))
        for path, content in zip((pair.target, *pair.references), pair.digests, strict=True)
    ]
    kinds = zip(reference_kinds(pair), pair.sizes[1:], strict=True)
    alike = [kind != "reference_loose" and same_framing(pair.sizes[0], size) for kind, size in kinds]
    pixels = {
        number: _pixels(reference if reference.size == target.size else reference.resize(target.size, _LANCZOS))
        for number, reference in enumerate(references)
        if alike[number]
    }
    hashed = (target, *references[:1]) if references else (target, target)
    return _Opened(
        _pixels(target), pixels, pair.sizes[0].width / target.width, np.concatenate([*map(shape_bits, hashed)])
    )


class _Limits(NamedTuple):
    """The settings, target pixels per measured pixel, and whether this is the first reference."""

    config: PairCheckConfig
    scale: float
    first: bool


def _judged(
    pair: EditPair, config: PairCheckConfig, opened: _Opened, alignments: Mapping[int, Alignment]
) -> MeasuredPair:
    """The findings of these alignments and of the pair's sizes."""
    target, *sizes = pair.sizes
    findings = [*_narrow(pair.key, "the target", target)]
    for number, (size, kind) in enumerate(zip(sizes, reference_kinds(pair), strict=True)):
        if kind == "reference_loose":  # declared to show another scene
            continue
        name = "the reference" if len(sizes) == 1 else f"reference {number + 1}"
        findings += [*_size_findings(pair.key, name, target, size), *_narrow(pair.key, name, size)]
        if number in alignments:
            findings += _findings(pair.key, name, alignments[number], _Limits(config, opened.scale, number == 0))
    found = tuple(alignments.get(number) for number in range(len(sizes)))
    return MeasuredPair(tuple(findings), found, opened.scale, opened.bits)


def _quick_alignment(target: Pixels, reference: Pixels, limits: _Limits) -> Alignment | None:
    """The alignment of small pictures if it is clearly within all limits, or clearly can't be measured; else None."""
    found, error = estimate(target, reference)
    config = limits.config
    shift = (max(map(abs, found.shift)) + _ERRORS * error) * limits.scale
    if (
        found.measured
        and found.unedited > 2 * MIN_UNEDITED_SHARE
        and shift < _CLEARLY * config.max_shift
        and abs(found.zoom - 1) * 100 < _CLEARLY * config.max_zoom_percent
        and max(map(abs, found.colour)) < _CLEARLY * config.max_colour_offset
        and (not limits.first or _CLEARLY * float(found.difference.max(initial=0)) > config.min_difference)
    ):
        return found
    if found.unedited < MIN_UNEDITED_SHARE and not (limits.first and _hardly_differs(found, config)):
        aligned = align(target, reference)
        if aligned.unedited < MIN_UNEDITED_SHARE / 2:
            return aligned
    return None


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture, dtype=np.float32)


def _size_findings(key: str, name: str, target: Size, reference: Size) -> Iterator[Finding]:
    if target == reference:
        return
    sizes = f"{name} is {reference.width} x {reference.height}, the target {target.width} x {target.height}"
    if same_framing(target, reference):
        yield Finding(key, "size", f"{sizes}. Training resizes both. Equal sizes keep both equally sharp.")
    else:
        yield Finding(
            key,
            "framing",
            f"{sizes}. Aspect ratios differ, so training doesn't crop both alike: it uses {name} whole, or with "
            f"match_target_res {kept_share(reference, target):.0%} of its area. If they show the same scene, crop them "
            "alike.",
        )


def _narrow(key: str, name: str, size: Size) -> Iterator[Finding]:
    longer = max(size) / min(size)
    if longer > _GRAPH_SHAPE:
        yield Finding(
            key,
            "framing",
            f"{name} is {size.width} x {size.height}, {longer:.1f} times as long as it is narrow. ComfyUI's edit "
            "graphs crop pictures to at most 2.3 times (FluxKontextImageScale). Crop it in the same way.",
        )


def _hardly_differs(found: Alignment, config: PairCheckConfig) -> bool:
    least = config.min_difference
    return float(found.difference.max(initial=0)) < least and max(map(abs, found.colour)) < least


def _findings(key: str, name: str, found: Alignment, limits: _Limits) -> Iterator[Finding]:
    """The values of an alignment beyond the limits."""
    config = limits.config
    if limits.first and _hardly_differs(found, config):
        yield Finding(
            key, "equal", f"the target and {name} hardly differ. Use the edited picture as target or remove the pair."
        )
        return
    if not found.measured:
        text = (
            f"{name} can't be aligned with the target, as it is plain or too little is unedited ({found.unedited:.0%})"
        )
        yield Finding(key, "unmeasured", f"{text}. Fine if the edit changes all of it; otherwise check the pair.")
        return
    right, down = (part * limits.scale for part in found.shift)
    if max(abs(right), abs(down)) > config.max_shift:
        yield Finding(
            key,
            "shift",
            f"{name} is shifted {_toward(right, 'right', 'left')} and {_toward(down, 'down', 'up')} against the "
            "target. Align them, or the LoRA learns to move the picture.",
        )
    percent = 100 * (found.zoom - 1)
    if abs(percent) > config.max_zoom_percent:
        larger = "larger" if percent > 0 else "smaller"
        yield Finding(
            key,
            "zoom",
            f"{name} is {abs(percent):.2f} % {larger} in scale than the target. Scale and crop both alike.",
        )
    offset = max(found.colour, key=abs)
    if abs(offset) > config.max_colour_offset:
        channels = ", ".join(f"{c} {-v:+.1f}" for c, v in zip(("red", "green", "blue"), found.colour, strict=True))
        yield Finding(
            key,
            "colour",
            f"{name} differs in colour from the target outside the edit ({channels} of 255). Match the colours, unless "
            "that is the edit, or the LoRA learns the difference.",
        )


def _toward(pixels: float, positive: str, negative: str) -> str:
    return f"{abs(pixels):.1f} px {positive if pixels >= 0 else negative}"


def _duplicates(pairs: Sequence[EditPair], bits: Sequence[Bits], config: PairCheckConfig) -> Iterator[Finding]:
    """Pairs whose target and first reference both look like those of an earlier pair."""
    for number, nearest in near_duplicates(bits, config.duplicate_bits).items():
        yield Finding(
            pairs[number].key,
            "duplicate",
            f"is nearly identical to the pair {shown(pairs[nearest].key)}. Keep only one unless both are intended.",
        )


def _captions(pairs: Sequence[EditPair]) -> Iterator[Finding]:
    for pair in pairs:
        for caption in pair.captions:
            words = [word for word in caption.replace("_", " ").split() if sum(c.isalpha() for c in word) > 1]
            spaced = not any(ord(letter) > 0x2E7F for letter in caption)  # CJK scripts put no spaces between words
            if len(words) < 2 and spaced:
                text = f"the caption says little: {beginning(caption)}. Describe the edit in a sentence."
                yield Finding(pair.key, "caption", text)
        repeated = [caption for caption, count in Counter(pair.captions).items() if count > 1]
        if repeated:
            text = f"the same caption occurs twice: {beginning(repeated[0])}. Remove one of them."
            yield Finding(pair.key, "caption", text)


def alike_captions(pairs: Sequence[EditPair]) -> str:
    """A sentence about captions that several pairs share; empty if no caption is shared."""
    owners: dict[str, int] = defaultdict(int)
    for pair in pairs:
        for caption in set(pair.captions):
            owners[caption] += 1
    shared = {caption: count for caption, count in owners.items() if count > 1}
    if not shared:
        return ""
    caption, count = max(shared.items(), key=lambda item: item[1])
    whole = "all pairs" if count == len(pairs) else f"{count} pairs"
    return (
        f"Captions shared by several pairs: {len(shared)}; {whole} have {beginning(caption)}. This is correct if "
        "these pairs show the same edit and wrong if their edits differ."
    )
