"""Check pairs before encoding: misaligned, differently coloured, nearly equal or duplicate pairs, and weak captions.

Nothing is changed.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import PairCheckConfig
from ..events import SILENT, Observer, raise_if_stopped
from ..geometry import Size, kept_share, same_framing
from .alignment import Alignment, Pixels, align
from .images import is_converted, open_picture, shown
from .pairing import EditDataset, EditPair, reference_kinds

_HASH_SIDE = 8
_GRAPH_SHAPE = 2.5  # more than the 1568 x 672 to which FluxKontextImageScale crops, with some tolerance
_FLAT = 4.0  # a thumbnail with a smaller standard deviation is too plain to compare
_THREADS = 2

FindingKind = Literal["shift", "zoom", "colour", "size", "framing", "unmeasured", "equal", "duplicate", "caption"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A possible problem of one pair. `text` says what it is and what to do."""

    key: str
    kind: FindingKind
    text: str


@dataclass(frozen=True, slots=True)
class MeasuredPair:
    """A pair's findings, the alignment of each reference (None if its framing differs), and its perceptual hash.

    `bits` holds the hash of the target and the first reference, 64 bits each.
    """

    key: str
    alignments: tuple[Alignment | None, ...]
    findings: tuple[Finding, ...]
    bits: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, repr=False)
class PairCheck:
    """All findings of a dataset. `shifts` are the measured shifts (right, down) by pair key and reference number."""

    num_pairs: int
    findings: tuple[Finding, ...]
    shifts: dict[tuple[str, int], tuple[float, float]]

    def of(self, key: str) -> tuple[Finding, ...]:
        """The findings of one pair."""
        return tuple(finding for finding in self.findings if finding.key == key)


def check_pairs(dataset: EditDataset, config: PairCheckConfig, observer: Observer = SILENT) -> PairCheck:
    """Check every pair. Keeps only a few numbers per pair in memory.

    Raises:
        DatasetError: a picture can't be read.
        Interrupted: the observer asked to stop.
    """
    findings: list[Finding] = []
    bits: list[NDArray[np.bool_]] = []
    shifts: dict[tuple[str, int], tuple[float, float]] = {}
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="check-pairs")
    try:
        for start in range(0, len(dataset.pairs), 16):
            some = dataset.pairs[start : start + 16]
            for pair in pool.map(lambda each: measure_pair(each, config), some):
                raise_if_stopped(observer)
                findings += pair.findings
                bits.append(pair.bits)
                for number, found in enumerate(pair.alignments):
                    if found is not None and found.measured:
                        shifts[pair.key, number] = found.shift
                observer.on_progress("Checking pairs", len(bits), len(dataset.pairs))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    findings += _duplicates(dataset.pairs, bits, config)
    findings += _captions(dataset.pairs)
    order = {pair.key: number for number, pair in enumerate(dataset.pairs)}
    findings.sort(key=lambda finding: order[finding.key])
    return PairCheck(len(dataset.pairs), tuple(findings), shifts)


def measure_pair(pair: EditPair, config: PairCheckConfig) -> MeasuredPair:
    """Decode one pair and compare each reference with its target."""
    target = open_picture(pair.target, convert=is_converted(pair.digests[0]))
    original = Size(*target.size)
    small = _at_side(target, config.check_side)
    wanted, alignments, findings = _pixels(small), [], [*_narrow(pair.key, "target", original)]
    bits = [_shape_bits(small)]
    for number, (path, kind) in enumerate(zip(pair.references, reference_kinds(pair), strict=True)):
        reference = open_picture(path, convert=is_converted(pair.digests[number + 1]))
        name = "reference" if len(pair.references) == 1 else f"reference {number + 1}"
        bits.append(_shape_bits(reference))
        found = None
        if kind == "reference_loose":  # declared to show another scene
            alignments.append(found)
            continue
        findings += _size_findings(pair.key, name, original, Size(*reference.size))
        findings += _narrow(pair.key, name, Size(*reference.size))
        if same_framing(original, Size(*reference.size)):
            found = align(wanted, _pixels(reference.resize(small.size, Image.Resampling.LANCZOS)))
            findings += _findings(pair.key, name, found, original.width / small.width, config, first=number == 0)
        alignments.append(found)
    return MeasuredPair(pair.key, tuple(alignments), tuple(findings), np.concatenate((bits * 2)[:2]))


def _at_side(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(16, round(picture.width * scale)), max(16, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture, dtype=np.float32)


def _size_findings(key: str, name: str, target: Size, reference: Size) -> Iterator[Finding]:
    if target == reference:
        return
    sizes = f"{name} is {reference.width} x {reference.height}, the target {target.width} x {target.height}"
    if same_framing(target, reference):
        yield Finding(key, "size", f"{sizes}. Training scales {name}. Equal sizes would be sharper.")
    else:
        yield Finding(
            key,
            "framing",
            f"{sizes}. Aspect ratios differ, so {name} can't be cropped like the target, and match_target_res would "
            f"crop it to {kept_share(reference, target):.0%} of its area. Crop both alike if they show the same scene.",
        )


def _narrow(key: str, name: str, size: Size) -> Iterator[Finding]:
    longer = max(size) / min(size)
    if longer > _GRAPH_SHAPE:
        yield Finding(
            key,
            "framing",
            f"{name} is {size.width} x {size.height}, {longer:.1f} times as long as it is narrow. ComfyUI's edit "
            "graphs crop pictures to at most 2.3 times (FluxKontextImageScale). Crop it likewise.",
        )


def _findings(
    key: str, name: str, found: Alignment, scale: float, config: PairCheckConfig, *, first: bool
) -> Iterator[Finding]:
    """The values of an alignment beyond the limits. `scale` is the number of target pixels per measured pixel."""
    if (
        first
        and float(found.difference.max(initial=0)) < config.min_difference
        and max(map(abs, found.colour)) < config.min_difference
    ):
        yield Finding(
            key, "equal", f"target and {name} hardly differ. Use the edited picture as target or remove the pair."
        )
        return
    if not found.measured:
        text = (
            f"{name} can't be aligned with the target, as it is plain or too little is unedited ({found.unedited:.0%})"
        )
        yield Finding(key, "unmeasured", f"{text}. Fine if the edit changes all of it; otherwise check the pair.")
        return
    right, down = (part * scale for part in found.shift)
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


def _shape_bits(picture: Image.Image) -> NDArray[np.bool_]:
    """Difference hash of 64 bits: whether each cell of a 9 x 8 thumbnail is brighter than the one to its left.

    All False for a plain picture.
    """
    spots = np.asarray(picture.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    if spots.std() < _FLAT:
        return np.zeros(_HASH_SIDE**2, bool)
    return (spots[:, 1:] > spots[:, :-1]).ravel()


def _duplicates(
    pairs: Sequence[EditPair], bits: Sequence[NDArray[np.bool_]], config: PairCheckConfig
) -> Iterator[Finding]:
    """Pairs whose target and first reference both look like those of an earlier pair."""
    if not pairs:
        return
    signs = np.stack(bits).astype(np.float32) * 2 - 1
    plain = np.logical_not(np.any(np.stack(bits), axis=1))
    for number in range(1, len(pairs)):
        if plain[number]:
            continue
        distances = (signs.shape[1] - signs[:number] @ signs[number]) / 2
        distances[plain[:number]] = np.inf
        nearest = int(np.argmin(distances))
        if distances[nearest] <= config.duplicate_bits:
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
                text = f"the caption says little: {shown(caption[:60])!r}. Describe the edit in a sentence."
                yield Finding(pair.key, "caption", text)
        repeated = [caption for caption, count in Counter(pair.captions).items() if count > 1]
        if repeated:
            yield Finding(
                pair.key, "caption", f"the same caption occurs twice: {shown(repeated[0][:60])!r}. Remove one of them."
            )


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
        f"Captions shared by several pairs: {len(shared)}; {whole} have {shown(caption[:60])!r}. This is correct if "
        "these pairs show the same edit and wrong if their edits differ."
    )
