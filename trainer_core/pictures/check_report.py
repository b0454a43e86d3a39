"""The findings of the pair check as a text and as a contact sheet."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from ..config import PairCheckConfig
from ..data.pair_check import PairCheck, alike_captions, measure_pair
from ..data.pairing import EditDataset, EditPair
from ..events import SILENT, Observer, watched
from ..text import shown
from .rows import Look, PictureRow, draw_rows, pair_thumbnails

_MARK = (235, 87, 87)
_HEADINGS = {
    "shift": "shifted",
    "zoom": "scaled",
    "colour": "with different colours outside the edit",
    "size": "with different sizes",
    "framing": "with different aspect ratios",
    "unmeasured": "that can't be aligned",
    "equal": "that hardly differ",
    "duplicate": "near-duplicate",
    "caption": "with a weak caption",
}
_MOST_LINES = 200


def check_report(dataset: EditDataset, check: PairCheck) -> str:
    """Counts of the findings, then one line per finding with what to do."""
    counts = Counter(kind for _, kind in {(finding.key, finding.kind) for finding in check.findings})
    pairs = len({finding.key for finding in check.findings})
    if not check.findings:
        lines = [f"Pair check: no problems in {check.num_pairs} pairs."]
    else:
        summary = ", ".join(f"{counts[kind]} {name}" for kind, name in _HEADINGS.items() if counts[kind])
        lines = [f"Pair check: {pairs} of {check.num_pairs} pairs may have problems: {summary}."]
    if check.shifts:
        lines.append(f"References aligned with their targets: {len(check.shifts)}.")
    lines += check.notes
    if shared := alike_captions(dataset.pairs):
        lines.append(shared)
    lines += [f"  - {shown(finding.key)}: {finding.text}" for finding in check.findings[:_MOST_LINES]]
    if len(check.findings) > _MOST_LINES:
        lines.append(f"  - … and {len(check.findings) - _MOST_LINES} more. Fix these and check again.")
    return "\n".join(lines)


def check_sheet(
    dataset: EditDataset,
    check: PairCheck,
    config: PairCheckConfig,
    *,
    max_pairs: int = 12,
    observer: Observer = SILENT,
) -> Image.Image:
    """References, target and their difference after alignment. Pairs with findings come first, in a red frame.

    Raises:
        DatasetError: a picture can't be read.
        Interrupted: the observer asked to stop.
    """
    marked = {finding.key for finding in check.findings}
    chosen = sorted(dataset.pairs, key=lambda pair: pair.key not in marked)[:max_pairs]
    count = len(dataset.reference_dirs)
    names = ["reference"] if count == 1 else [f"reference {number + 1}" for number in range(count)]
    title = f"{len(marked)} of {check.num_pairs} pairs may have problems" if marked else "No problems"
    look = Look(columns=0, title=title, footer="" if chosen else "There are no pairs to show.")
    rows = [_row(dataset, pair, check, config) for pair in watched(chosen, observer)]
    return draw_rows([*names, "target", "difference"], rows, look)


def _row(dataset: EditDataset, pair: EditPair, check: PairCheck, config: PairCheckConfig) -> PictureRow:
    findings, pictures = check.of(pair.key), pair_thumbnails(dataset, pair)
    if findings:
        pictures = [picture and _framed(picture) for picture in pictures]
    alignment = measure_pair(pair, config).alignments[:1]
    pictures.append(_heat(alignment[0].difference) if alignment and alignment[0] is not None else None)
    text = "; ".join(f"{finding.kind}: {finding.text.split('. ')[0]}" for finding in findings)
    return PictureRow(tuple(pictures), text or "no finding", shown(pair.key))


def _framed(picture: Image.Image) -> Image.Image:
    framed = picture.copy()
    width = max(3, round(max(picture.size) / 60))
    ImageDraw.Draw(framed).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_MARK, width=width)
    return framed


def _heat(difference: np.ndarray) -> Image.Image:
    """A heat map of the difference: black for none, then red and yellow, and white from 128 of 255."""
    level = np.clip(difference / 128, 0, 1)
    channels = [np.clip(3 * level - number, 0, 1) for number in range(3)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).astype(np.uint8))
