"""An overview of a dataset: a contact sheet and a text report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from ..data.masks import checked_mask_grey
from ..data.pairing import EditDataset, EditPair, reference_kinds
from ..events import SILENT, Observer, watched
from ..geometry import Size, same_framing
from ..text import counted, shown, some_of
from .rows import Look, PictureRow, draw_rows, pair_thumbnails, thumbnail

_ASPECTS = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2))


def contact_sheet(dataset: EditDataset, *, max_pairs: int = 12, observer: Observer = SILENT) -> Image.Image:
    """References, target, mask and caption of up to `max_pairs` pairs, spread evenly over the dataset.

    Pictures are shown as they are trained: in sRGB unless color_profiles is ignore, and masks as they weight the loss.

    Raises:
        DatasetError: a picture can't be read.
        Interrupted: the observer asked to stop.
    """
    count = len(dataset.pairs)
    chosen = dataset.pairs
    if count > max_pairs:
        chosen = tuple(dataset.pairs[index * count // max_pairs] for index in range(max_pairs))
    num_references = len(dataset.reference_dirs)
    headings = [*(_numbered("reference", index, num_references) for index in range(num_references)), "target"]
    masked = any(pair.mask for pair in dataset.pairs)
    headings += ["mask: white counts"] if masked else []
    title = f"{len(chosen)} of {count} pairs" if count > len(chosen) else counted(count, "pair")
    look = Look(columns=0, title=title, footer="" if count else "There are no pairs to show.")
    rows = [_row(dataset, pair, masked=masked) for pair in watched(chosen, observer)]
    return draw_rows(headings, rows, look)


def report(dataset: EditDataset) -> str:
    """Number of pairs, sizes, captions, and the dataset's notes."""
    lines = [f"{counted(len(dataset.pairs), 'pair')} {_references(dataset)}."]
    if dataset.pairs:
        lines.append(_sizes("Targets", [pair.sizes[0] for pair in dataset.pairs]))
        numbers = [dataset.references_by_folder(pair) for pair in dataset.pairs]
        for index in range(len(dataset.reference_dirs)):
            name = _numbered("References", index, len(dataset.reference_dirs))
            found = ((pair, each[index]) for pair, each in zip(dataset.pairs, numbers, strict=True))
            sizes = [pair.sizes[number + 1] for pair, number in found if number is not None]
            lines += [_sizes(name, sizes)] if sizes else []
        lines.append(_captions(dataset.pairs))
        lines += _other_aspect(dataset.pairs)
    return "\n".join(lines + note_lines(dataset))


def note_lines(dataset: EditDataset) -> list[str]:
    """The dataset's notes as the last lines of a report; empty if there are none."""
    return ["", "Notes:", *(f"  - {note}" for note in dataset.notes)] if dataset.notes else []


def _row(dataset: EditDataset, pair: EditPair, *, masked: bool) -> PictureRow:
    caption, *others = pair.captions
    more = f" (+{len(others)} more)" if others else ""
    size = "".join(f"   {_pixels(size)}" for size in pair.sizes[:1])
    pictures = pair_thumbnails(dataset, pair)
    if masked:
        pictures.append(pair.mask and thumbnail(checked_mask_grey(pair.mask).convert("RGB")))
    return PictureRow(tuple(pictures), caption + more, shown(pair.key) + size)


def _references(dataset: EditDataset) -> str:
    counts = {len(pair.references) for pair in dataset.pairs} or {len(dataset.reference_dirs)}
    if counts == {0}:
        return "without references, which are trained as text-to-image"
    fewest = f"{min(counts)} to " if len(counts) > 1 else ""
    return f"with {fewest}{counted(max(counts), 'reference')} each"


def _sizes(name: str, sizes: Sequence[Size]) -> str:
    by_area = sorted(sizes, key=lambda size: size.width * size.height)
    smallest, largest = by_area[0], by_area[-1]
    aspect, often = Counter(map(aspect_name, sizes)).most_common(1)[0]
    spread = _pixels(smallest) if smallest == largest else f"{_pixels(smallest)} to {_pixels(largest)}"
    aspects = f"all {aspect}" if often == len(sizes) else f"mostly {aspect} ({often} of {len(sizes)})"
    return f"{name}: {spread}, {aspects}."


def aspect_name(size: Size) -> str:
    """The closest common aspect ratio, such as 16:9."""
    width, height = min(_ASPECTS, key=lambda aspect: abs(math.log(size.width / size.height * aspect[1] / aspect[0])))
    return f"{width}:{height}"


def _captions(pairs: Sequence[EditPair]) -> str:
    counts = [len(pair.captions) for pair in pairs]
    distinct = len({caption for pair in pairs for caption in pair.captions})
    per_pair = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"Captions: {per_pair} per pair, {sum(counts)} in total, {distinct} different."


def _other_aspect(pairs: Sequence[EditPair]) -> list[str]:
    keys = [pair.key for pair in pairs if _has_another_aspect(pair)]
    if not keys:
        return []
    return [
        f"Aspect ratios of reference and target differ in {counted(len(keys), 'pair')} ({some_of(keys)}). These "
        "references are not cropped like their targets: they are used whole, or with match_target_res cropped to the "
        "target's aspect ratio."
    ]


def _has_another_aspect(pair: EditPair) -> bool:
    kinds = zip(pair.sizes[1:], reference_kinds(pair), strict=True)
    return any(kind == "auto" and not same_framing(pair.sizes[0], size) for size, kind in kinds)


def _pixels(size: Size) -> str:
    return f"{size.width} x {size.height}"


def _numbered(noun: str, index: int, count: int) -> str:
    return noun if count == 1 else f"{noun} {index + 1}"
