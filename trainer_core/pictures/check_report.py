"""The pair checker's findings as a text and as a sheet of pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from ..config import PairCheckConfig
from ..data.images import open_picture, shown
from ..data.pair_check import PairCheck, alike_captions, measure_pair
from ..data.pairing import EditDataset, EditPair
from .rows import Look, PictureRow, draw_rows

_MARK = (235, 87, 87)
_HEADINGS = {
    "shift": "shifted",
    "zoom": "scaled",
    "colour": "of another colour outside the edit",
    "size": "of another size",
    "framing": "of another shape",
    "unmeasured": "not measurable",
    "equal": "hardly differing",
    "duplicate": "near-duplicates",
    "caption": "with a caption to look at",
}
_MOST_LINES = 200


def check_report(dataset: EditDataset, check: PairCheck) -> str:
    """Counts, then every finding with what to do."""
    counts = Counter(kind for _, kind in {(finding.key, finding.kind) for finding in check.findings})
    pairs = len({finding.key for finding in check.findings})
    if not check.findings:
        lines = [f"Pair check: nothing to mend in {check.num_pairs} pairs."]
    else:
        summary = ", ".join(f"{counts[kind]} {name}" for kind, name in _HEADINGS.items() if counts[kind])
        lines = [f"Pair check: {pairs} of {check.num_pairs} pairs are worth a look: {summary}."]
    if shifts := [max(map(abs, shift)) for shift in check.shifts.values()]:
        lines.append(f"Measured outside the edits: {len(shifts)} references.")
    if shared := alike_captions(dataset.pairs):
        lines.append(shared)
    lines += [f"  - {shown(finding.key)}: {finding.text}" for finding in check.findings[:_MOST_LINES]]
    if len(check.findings) > _MOST_LINES:
        lines.append(f"  - … and {len(check.findings) - _MOST_LINES} more; mend these and check again.")
    return "\n".join(lines)


def check_sheet(
    dataset: EditDataset, check: PairCheck, config: PairCheckConfig, *, max_pairs: int = 12, cell: int = 192
) -> Image.Image:
    """References, target and where they differ after alignment: pairs with findings first, in a red frame."""
    marked = {finding.key for finding in check.findings}
    chosen = sorted(dataset.pairs, key=lambda pair: pair.key not in marked)[:max_pairs]
    count = len(dataset.reference_dirs)
    names = ["reference"] if count == 1 else [f"reference {number + 1}" for number in range(count)]
    title = f"{len(marked)} of {check.num_pairs} pairs are worth a look" if marked else "Nothing to mend"
    look = Look(cell=cell, columns=0, title=title, footer="" if chosen else "There is no pair to show.")
    rows = [_row(pair, check, config, cell, count) for pair in chosen]
    return draw_rows([*names, "target", "difference"], rows, look)


def _row(pair: EditPair, check: PairCheck, config: PairCheckConfig, cell: int, num_references: int) -> PictureRow:
    findings, lacking = check.of(pair.key), num_references - len(pair.references)
    pictures: list[Image.Image | None] = []
    for path in (*pair.references, *[None] * lacking, pair.target):
        if path is None:
            pictures.append(None)
            continue
        picture = open_picture(path)
        picture.thumbnail((4 * cell, 2 * cell))
        pictures.append(_framed(picture) if findings else picture)
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
    """Black where nothing differs, through red and yellow to white at 128 of 255."""
    level = np.clip(difference / 128, 0, 1)
    channels = [np.clip(3 * level - number, 0, 1) for number in range(3)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).astype(np.uint8))
