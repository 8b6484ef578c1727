"""The rows of a PDF, read by PDFium.

PDFium keeps the order in which the document draws its text, which is the reading order for nearly all programs that
typeset text. It is not thread-safe, so one lock serves the whole process.
"""

import ctypes
import re
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import atan2, cos, degrees, hypot, radians, sin
from typing import Any, Final

from metaflow_hf.data.sources.pdf.geometry import Page, Row, Word

_LOCK: Final = threading.Lock()
_SPACES: Final = frozenset("\r\n\t\f\v \u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000")
_DROPPED: Final = frozenset("\u200b\ufeff\ufffe\uffff")
# What fonts draw under other names than people search for; PDFium takes ligatures apart by itself.
_REPLACED: Final = {
    "\x02": "-",  # PDFium's mark of a hyphen at a line end
    "\u00ad": "-",  # drawn, so it is a hyphen like any other
    "\uf0b7": "•",
    "\uf0a7": "▪",
    "\uf0d8": "‣",
}
_MONO_NAME: Final = re.compile(r"mono|courier|typewriter|consol|menlo|cmtt|sftt|fixed|code", re.IGNORECASE)
_DISTINCT_LETTERS: Final = 6
_WIDTH_SPREAD: Final = 0.02
_MOSTLY: Final = 0.8
_HIGH_SURROGATES: Final = range(0xD800, 0xDC00)


class PasswordNeededError(Exception):
    """The document can be read only with a password."""


class DamagedError(Exception):
    """PDFium cannot read the document, or one of its pages."""


@dataclass(frozen=True, slots=True)
class PdfPages:
    """The rows of all pages; in the place of a damaged page, why it cannot be read."""

    title: str
    pages: list[Page | str]


@dataclass(slots=True)
class _Glyph:
    text: str
    left: float
    right: float
    baseline: float
    style: "_Style"


@dataclass(frozen=True, slots=True)
class _Style:
    size: float
    font: str
    angle: int


def read_pages(data: bytes) -> PdfPages:
    """The rows of all pages, in the order in which the document draws them.

    Raises ``PasswordNeededError`` and ``DamagedError``, and ``ImportError`` without pypdfium2.
    """
    import pypdfium2

    with _LOCK:
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            if pypdfium2.raw.FPDF_GetLastError() == pypdfium2.raw.FPDF_ERR_PASSWORD:
                raise PasswordNeededError from error
            raise DamagedError(str(error)) from error
        try:
            widths: dict[str, dict[str, float]] = defaultdict(dict)
            pages = [_read_page(document, number, widths) for number in range(len(document))]
            title = document.get_metadata_value("Title")
        finally:
            document.close()
    _mark_mono([page for page in pages if isinstance(page, Page)], widths)
    return PdfPages(title, pages)


def _read_page(document: Any, number: int, widths: dict[str, dict[str, float]]) -> Page | str:
    import pypdfium2

    try:
        page = document[number]
        text_page = page.get_textpage()
        try:
            has_pictures = any(page.get_objects(filter=(pypdfium2.raw.FPDF_PAGEOBJ_IMAGE,)))
            width = page.get_width()
            rows = _rows(_glyphs(text_page, widths), width)
            return Page(number, rows, width, has_pictures)
        finally:
            text_page.close()
            page.close()
    except pypdfium2.PdfiumError as error:
        return str(error)


def _glyphs(text_page: Any, widths: dict[str, dict[str, float]]) -> Iterator[_Glyph | None]:
    """The characters in order, ``None`` for spaces; notes how wide the letters of each font are."""
    import pypdfium2.raw as pdfium

    x, y, box = ctypes.c_double(), ctypes.c_double(), pdfium.FS_RECTF()
    styles: dict[int, _Style] = {}
    high = 0
    handle = text_page.raw
    for index in range(pdfium.FPDFText_CountChars(handle)):
        code = pdfium.FPDFText_GetUnicode(handle, index)
        if code in _HIGH_SURROGATES:
            high = code
            continue
        text = _character(high, code)
        high = 0
        text = _REPLACED.get(text, text)
        if text in _SPACES:
            yield None
            continue
        if text in _DROPPED or text < " " or "\x7f" <= text < "\xa0":
            continue
        item = pdfium.FPDFText_GetTextObject(handle, index)
        address = ctypes.c_void_p.from_buffer(item).value or 0
        style = styles.get(address)
        if style is None:
            style = styles[address] = _style(item)
        pdfium.FPDFText_GetCharOrigin(handle, index, x, y)
        pdfium.FPDFText_GetLooseCharBox(handle, index, box)
        if style.angle == 0:
            left, baseline, width = x.value, y.value, box.right - box.left
        else:
            turn = radians(style.angle)
            left = x.value * cos(turn) + y.value * sin(turn)
            baseline = y.value * cos(turn) - x.value * sin(turn)
            is_upright = style.angle % 180 == 90
            width = box.top - box.bottom if is_upright else box.right - box.left
        if text.isalnum() and style.size:
            widths[style.font][text] = width / style.size
        yield _Glyph(text, left, left + width, baseline, style)


def _character(high: int, code: int) -> str:
    if high and 0xDC00 <= code < 0xE000:
        code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00)
    return chr(code)


def _style(item: Any) -> _Style:
    import pypdfium2.raw as pdfium

    size, matrix, name = ctypes.c_float(), pdfium.FS_MATRIX(), ctypes.create_string_buffer(128)
    pdfium.FPDFTextObj_GetFontSize(item, size)
    pdfium.FPDFPageObj_GetMatrix(item, matrix)
    font = pdfium.FPDFTextObj_GetFont(item)
    if font:
        pdfium.FPDFFont_GetBaseFontName(font, name, 128)
    scale = hypot(matrix.c, matrix.d) or 1.0
    angle = round(degrees(atan2(matrix.b, matrix.a))) % 360
    return _Style(round(size.value * scale, 1), name.value.decode("utf-8", "replace"), angle)


def _rows(glyphs: Iterator[_Glyph | None], width: float) -> list[Row]:
    rows: list[Row] = []
    row: list[list[_Glyph]] = []
    last: _Glyph | None = None
    base: _Glyph | None = None
    has_space = True
    for glyph in glyphs:
        if glyph is None:
            has_space = True
            continue
        if base is None or last is None or not _is_beside(glyph, base, row):
            if row:
                rows.append(_row(row, width))
            row, base = [[glyph]], glyph
        elif has_space or not _touch(last, glyph):
            row.append([glyph])
        else:
            row[-1].append(glyph)
        if glyph.style.size > base.style.size:
            base = glyph
        last, has_space = glyph, False
    if row:
        rows.append(_row(row, width))
    return rows


def _touch(last: _Glyph, glyph: _Glyph) -> bool:
    """Whether no white space lies between two characters of a row."""
    size = glyph.style.size or 1.0
    if _is_right_to_left(glyph.text) and _is_right_to_left(last.text):
        return -0.5 <= (last.left - glyph.right) / size <= 0.5
    return -1.0 <= (glyph.left - last.right) / size <= 0.5


def _is_right_to_left(text: str) -> bool:
    return unicodedata.bidirectional(text[0]) in ("R", "AL")


def _is_beside(glyph: _Glyph, base: _Glyph, row: list[list[_Glyph]]) -> bool:
    """Whether a character belongs to the row: raised and lowered ones do, what is printed over it does not."""
    if glyph.style.angle != base.style.angle:
        return False
    size = max(glyph.style.size, base.style.size)
    is_same_size = 0.85 < glyph.style.size / (base.style.size or 1.0) < 1.18
    if abs(glyph.baseline - base.baseline) > (0.3 if is_same_size else 0.5) * size:
        return False
    last = row[-1][-1]
    return glyph.left >= last.right - size or glyph.right <= row[0][0].left + 0.2 * size


def _row(words: list[list[_Glyph]], width: float) -> Row:
    glyphs = [glyph for word in words for glyph in word]
    sizes = Counter(glyph.style.size for glyph in glyphs)
    size = sizes.most_common(1)[0][0]
    fonts = Counter(glyph.style.font for glyph in glyphs)
    letters = [glyph for glyph in glyphs if glyph.text[0].isalpha()]
    if 2 * sum(_is_right_to_left(glyph.text) for glyph in letters) > len(letters):
        # Mirrored, so that such a row begins and ends where others do.
        for glyph in glyphs:
            glyph.left, glyph.right = width - glyph.right, width - glyph.left
    return Row(
        words=sorted(
            (
                Word("".join(g.text for g in word), min(g.left for g in word), max(g.right for g in word))
                for word in words
            ),
            key=lambda word: word.left,
        ),
        baseline=next(glyph.baseline for glyph in glyphs if glyph.style.size == size),
        size=size or 1.0,
        fonts=fonts,
        angle=glyphs[0].style.angle,
    )


def _mark_mono(pages: list[Page], widths: dict[str, dict[str, float]]) -> None:
    """Marks rows in fonts of one width, unless nearly the whole document is typed in one: then it is no code."""
    mono = {font for font, letters in widths.items() if _is_mono(font, letters)}
    rows = [row for page in pages for row in page.rows]
    marked = [row for row in rows if sum(row.fonts[font] for font in mono) >= _MOSTLY * row.fonts.total()]
    if sum(len(row.text) for row in marked) < _MOSTLY * sum(len(row.text) for row in rows):
        for row in marked:
            row.is_mono = True


def _is_mono(font: str, letters: dict[str, float]) -> bool:
    known = [width for letter, width in letters.items() if letter.isalpha() and width > 0]
    if len(known) < _DISTINCT_LETTERS:
        return _MONO_NAME.search(font) is not None
    return max(known) - min(known) <= _WIDTH_SPREAD
