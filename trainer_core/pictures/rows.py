"""Draw rows of pictures with headings and captions as one picture."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from ..data.images import is_converted, open_picture
from ..data.pairing import EditDataset, EditPair

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

BACKGROUND: Colour = (30, 32, 36)
CARD: Colour = (43, 46, 52)
TEXT: Colour = (236, 237, 240)
MUTED: Colour = (160, 165, 174)

CELL = 192  # default height of each picture in pixels
_GAP, _PAD, _MARGIN = 8, 10, 16
_MOST_DRAWN = 2000  # characters of a text; Pillow refuses a million, and more never fit
_WIDEST = 2.0  # largest width of a picture, in cell heights
# Pillow's built-in font covers little beyond ASCII. For other text these files are tried in order.
_CHART_FONT = "DejaVuSans.ttf"
_OTHER_FONTS = (
    _CHART_FONT,
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
)
_NO_LETTER = "\U0010ffff"  # assigned to no script, so every font draws its missing-glyph box for it


@dataclass(frozen=True, slots=True)
class PictureRow:
    """Pictures side by side (None leaves a gap) with a caption and a small label below."""

    pictures: tuple[Image.Image | None, ...]
    caption: str
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Layout. `cell` is the height of each picture in pixels. `columns` is the number of rows placed side by side; 0
    chooses it for a page-like shape."""

    cell: int = CELL
    columns: int = 1
    caption_lines: int = 3
    title: str = ""
    footer: str = ""


def font_for(text: str, size: int) -> Font:
    """The first font that has every character of `text`, or else the one that lacks the fewest."""
    letters = set(text) - set(" \t\n")
    best, fewest = _built_in(size), len(letters) + 1
    if text.isascii():
        return best
    for name in ("", *_OTHER_FONTS):
        font = _font(name, size) if name else best
        missing = sum(_mask(font, letter) == _mask(font, _NO_LETTER) for letter in letters) if font else fewest
        if font is not None and missing < fewest:
            best, fewest = font, missing
        if fewest == 0:
            break
    return best


@functools.lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    """A system font by file name, or DejaVu Sans from matplotlib, which bundles it; None if it is not found."""
    package = importlib.util.find_spec("matplotlib") if name == _CHART_FONT else None
    if package is not None and package.origin:
        name = str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / name)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@functools.lru_cache(maxsize=16)
def _built_in(size: int) -> Font:
    return ImageFont.load_default(size)


def _mask(font: Font, letter: str) -> bytes:
    drawn = Image.new("1", (64, 64))
    ImageDraw.Draw(drawn).text((0, 0), letter, 1, font)
    return drawn.tobytes()


def open_thumbnail(path: Path, *, convert: bool = True) -> Image.Image:
    """A picture file, shrunk to what a cell of the default size can use. `convert`: see `open_picture`.

    Raises:
        DatasetError: the picture can't be read.
    """
    return thumbnail(open_picture(path, convert=convert))


def pair_thumbnails(dataset: EditDataset, pair: EditPair) -> list[Image.Image | None]:
    """A pair's pictures as they are trained: for each reference folder its picture or None, then the target.

    Raises:
        DatasetError: a picture can't be read.
    """
    target, *references = [
        open_thumbnail(path, convert=is_converted(content))
        for path, content in zip((pair.target, *pair.references), pair.digests, strict=True)
    ]
    placed = (None if number is None else references[number] for number in dataset.references_by_folder(pair))
    return [*placed, target]


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture, shrunk in place to what a cell of the default size can use."""
    picture.thumbnail((4 * CELL, 2 * CELL))
    return picture


def wrapped(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Wrap `text` into at most `lines` lines of `width` pixels. Replaces the rest with three dots."""
    done: list[str] = []
    words = text.split()
    while words and len(done) < lines:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        fits = _fitting(line, font, width)
        if fits < len(line):  # one long word, or a script without spaces
            words.insert(0, line[fits:])
            line = line[:fits]
        done.append(line)
    if words:
        done[-1] = _cut(f"{done[-1]} {words[0]}", font, width)
    return done


def _cut(text: str, font: Font, width: int) -> str:
    """`text`, cut to `width` pixels with three dots at the end if it is longer."""
    if font.getlength(text) <= width:
        return text
    dots = "..."
    return text[: _fitting(text, font, width - round(font.getlength(dots)))].rstrip() + dots


def draw_rows(headings: Sequence[str], rows: Sequence[PictureRow], look: Look) -> Image.Image:
    """Draw all rows as one picture. Scales every picture, also small ones, to the height of a cell."""
    widths = [_column_width([row.pictures[index] for row in rows], look.cell) for index in range(len(headings))]
    card_width = sum(widths) + _GAP * (len(widths) - 1) + 2 * _PAD
    cards = [_card(row, widths, card_width, look) for row in rows]
    columns = min(look.columns or _page_columns(cards), max(1, len(cards)))
    lines = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    text_size = _text_size(look)
    top = _MARGIN + (text_size * 2 + _GAP if look.title else 0)
    heights = [max(card.height for card in line) for line in lines]
    width = columns * card_width + (columns - 1) * _GAP + 2 * _MARGIN
    body = sum(heights) + _GAP * len(heights)
    bottom = text_size * 2 if look.footer else 0
    sheet = Image.new("RGB", (width, top + text_size + _GAP + body + bottom + _MARGIN - _GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if look.title:
        _line(draw, (_MARGIN, _MARGIN), look.title, round(text_size * 1.4), TEXT, width - 2 * _MARGIN)
    for column in range(columns):
        x = _MARGIN + column * (card_width + _GAP) + _PAD
        for heading, place in zip(headings, widths, strict=True):
            indent = max(0, round(place - font_for(heading, text_size).getlength(heading))) // 2
            _line(draw, (x + indent, top), heading, text_size, MUTED, place)
            x += place + _GAP
    y = top + text_size + _GAP
    for line, height in zip(lines, heights, strict=True):
        for column, card in enumerate(line):
            x = _MARGIN + column * (card_width + _GAP)
            draw.rounded_rectangle((x, y, x + card_width - 1, y + height - 1), 6, CARD)
            sheet.paste(card, (x, y), _rounded_mask(card.size))
        y += height + _GAP
    if look.footer:
        _line(draw, (_MARGIN, y), look.footer, text_size, MUTED, width - 2 * _MARGIN)
    return sheet


def _fitting(text: str, font: Font, width: int) -> int:
    """How many characters fit into `width` pixels, at least one."""
    fits = len(text)
    while fits > 1 and font.getlength(text[:fits]) > width:
        fits = min(fits - 1, max(1, int(fits * width / font.getlength(text[:fits])) + 1))
    return fits


def _text_size(look: Look) -> int:
    return max(13, round(look.cell / 15))


def _scaled(picture: Image.Image, cell: int) -> tuple[int, int]:
    scale = min(cell / picture.height, cell * _WIDEST / picture.width)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _column_width(pictures: Sequence[Image.Image | None], cell: int) -> int:
    return max([cell // 2, *(_scaled(picture, cell)[0] for picture in pictures if picture is not None)])


def _card(row: PictureRow, widths: Sequence[int], card_width: int, look: Look) -> Image.Image:
    """A card with the pictures of one row, its caption and its label."""
    text_size, caption = _text_size(look), row.caption[:_MOST_DRAWN]
    caption_font = font_for(caption, text_size)
    lines = wrapped(caption, caption_font, card_width - 2 * _PAD, look.caption_lines)
    line_height = round(text_size * 1.35)
    text_height = line_height * len(lines) + (line_height if row.label else 0)
    card = Image.new("RGB", (card_width, look.cell + 2 * _PAD + text_height), CARD)
    draw = ImageDraw.Draw(card)
    x = _PAD
    for picture, width in zip(row.pictures, widths, strict=True):
        if picture is not None:
            small = picture.convert("RGB").resize(_scaled(picture, look.cell), Image.Resampling.LANCZOS)
            card.paste(small, (x + (width - small.width) // 2, _PAD + (look.cell - small.height) // 2))
        x += width + _GAP
    y = look.cell + _PAD + _PAD // 2
    for line in lines:
        draw.text((_PAD, y), line, TEXT, caption_font)
        y += line_height
    if row.label:
        _line(draw, (_PAD, y), row.label, round(text_size * 0.85), MUTED, card_width - 2 * _PAD)
    return card


def _line(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, size: int, colour: Colour, width: int
) -> None:
    text = text[:_MOST_DRAWN]
    font = font_for(text, size)
    draw.text(position, _cut(text, font, width), colour, font)


def _page_columns(cards: Sequence[Image.Image]) -> int:
    """The number of cards side by side that makes the page slightly wider than high."""
    if not cards:
        return 1
    height = sum(card.height for card in cards)
    return max(1, round(math.sqrt(1.3 * height / cards[0].width)))


def _rounded_mask(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 6, 255)
    return mask
