"""Rows become blocks: paragraphs, list items, lines of a table, of a table of contents, and of code.

A line end within a paragraph is where the next word would not have fitted any more; where it would have, the line
ends for a reason and stays a line.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Final

from metaflow_hf.data.sources.pdf.columns import mark_tables
from metaflow_hf.data.sources.pdf.geometry import CELL_GAP, Page, Row
from metaflow_hf.data.sources.pdf.hyphens import HYPHENS, is_without_spaces

# More than so many times the usual distance of two lines separates paragraphs.
_GAP: Final = 1.25
# Two sizes are different when one is larger by so much.
_LARGER: Final = 1.08
_INDENT: Final = 0.8
_SPACE: Final = 0.25
_TOLERANCE: Final = 0.4
_SAME_EDGE: Final = 0.3
_JUSTIFIED: Final = 0.15
_SAME_COLUMN: Final = 1.5
_COMMON: Final = 0.15
_FEW_ROWS: Final = 5
_ENDS: Final = ".!?:;。！？"
_CLOSING: Final = "\"'”’)]»"


class Kind(Enum):
    """What a block is."""

    PROSE = "prose"
    ITEM = "item"
    TABLE = "table"
    CONTENTS = "contents"
    CODE = "code"


class Break(Enum):
    """What separates a block from the one before it."""

    PARAGRAPH = "\n\n"
    LINE = "\n"


@dataclass(slots=True)
class Block:
    """Rows that belong together; ``margin`` is where the lines of its column end."""

    kind: Kind
    rows: list[Row]
    page: Page
    margin: float
    is_margin_sure: bool
    separator: Break = Break.PARAGRAPH

    @property
    def size(self) -> float:
        return self.rows[0].size

    @property
    def is_open(self) -> bool:
        """Whether the last line is full, so that the text may go on elsewhere."""
        last = self.rows[-1]
        return is_cut(last) or (self.is_margin_sure and self.margin - last.right < 2.0 * last.size)

    @property
    def ends_sentence(self) -> bool:
        """Whether the text ends as a sentence does."""
        return self.rows[-1].text.rstrip(_CLOSING)[-1:] in _ENDS


@dataclass(slots=True)
class Column:
    """Rows of which each is below the one before; ``margin`` is where its lines end."""

    rows: list[Row]
    page: Page
    margin: float = 0.0
    is_sure: bool = False

    @property
    def left(self) -> float:
        """Where most lines begin."""
        return Counter(round(row.left) for row in self.rows).most_common(1)[0][0]


class Layout:
    """What is usual in a document: the distance of lines by size, and where the lines of each column end."""

    def __init__(self, pages: Sequence[Page]) -> None:
        sizes: Counter[float] = Counter()
        fonts: Counter[str] = Counter()
        for page in pages:
            mark_tables(page.rows)
            for row in page.rows:
                sizes[row.size] += row.fonts.total()
                fonts += row.fonts
        self.text_size = sizes.most_common(1)[0][0] if sizes else 0.0
        self.text_font = fonts.most_common(1)[0][0] if fonts else ""
        self._leading = _leading(pages)
        self._columns = {page.number: list(_columns(page)) for page in pages}
        self._set_margins()

    def leading_of(self, size: float) -> float:
        """The usual distance of two lines of one size."""
        known = self._leading.get(size)
        if known is None:
            usual = self._leading.get(self.text_size)
            known = size * (usual / self.text_size if usual else 1.2)
        return known

    def columns_of(self, page: Page) -> list[list[Block]]:
        """The blocks of each column of a page, in reading order."""
        return [_ColumnReader(column, self).blocks() for column in self._columns[page.number]]

    def _set_margins(self) -> None:
        """A column that does not show where its lines end has the margin of others that begin where it does."""
        columns = [column for columns in self._columns.values() for column in columns]
        for column in columns:
            column.margin, column.is_sure = _own_margin(column.rows)
        sure = [column for column in columns if column.is_sure]
        for column in columns:
            if column.is_sure:
                continue
            alike = [
                other.margin
                for other in sure
                if abs(other.left - column.left) <= _SAME_COLUMN * self.text_size
                and other.margin >= column.margin - _TOLERANCE * self.text_size
            ]
            if alike:
                column.margin, column.is_sure = Counter(alike).most_common(1)[0][0], True
            elif len(column.rows) < _FEW_ROWS and len(self._columns[column.page.number]) == 1:
                # So few lines do not show where lines end: as far from the edge of the page as they begin.
                column.margin = max(column.margin, column.page.width - column.left)


def _leading(pages: Sequence[Page]) -> dict[float, float]:
    distances: dict[float, Counter[float]] = defaultdict(Counter)
    for page in pages:
        for row, following in pairwise(page.rows):
            step = row.baseline - following.baseline
            if row.size == following.size and 0.8 * row.size < step < 2.2 * row.size:
                distances[row.size][round(step * 2) / 2] += 1
    # Of distances that are about as common the smallest is that of lines.
    return {
        size: min(step for step, count in counts.items() if count >= 0.6 * max(counts.values()))
        for size, counts in distances.items()
    }


def _columns(page: Page) -> Iterator[Column]:
    column = Column([], page)
    for row in page.rows:
        last = column.rows[-1] if column.rows else None
        if last is not None and not (
            row.angle == last.angle
            and row.baseline <= last.baseline + 0.3 * row.size
            and _is_over(column.rows[-_FEW_ROWS:], row)
        ):
            yield column
            column = Column([], page)
        column.rows.append(row)
    if column.rows:
        yield column


def _is_over(rows: Sequence[Row], row: Row) -> bool:
    return row.left < max(other.right for other in rows) and row.right > min(other.left for other in rows)


def _own_margin(rows: Sequence[Row]) -> tuple[float, bool]:
    """Where most lines of prose end, or the longest does; and whether there are enough to be sure."""
    prose = [row for row in rows if _kind(row) in (Kind.PROSE, Kind.ITEM)]
    rights = sorted((row.right for row in prose or rows), reverse=True)
    enough = max(3.0, _COMMON * len(rights))
    for right in rights:
        if sum(abs(other - right) <= 1.0 for other in rights) >= enough:
            return right, True
    return rights[0], False


def _kind(row: Row) -> Kind:
    if row.has_bullet:
        return Kind.ITEM
    if row.is_mono:
        return Kind.CODE
    if row.has_leader:
        return Kind.CONTENTS
    if row.is_table_row:
        return Kind.TABLE
    return Kind.ITEM if row.marker else Kind.PROSE


_LINES: Final = (Kind.TABLE, Kind.CONTENTS)


class _ColumnReader:
    """Cuts the rows of one column into blocks."""

    def __init__(self, column: Column, layout: Layout) -> None:
        self._column = column
        self._layout = layout
        self._places = {id(row): number for number, row in enumerate(column.rows)}

    def blocks(self) -> list[Block]:
        blocks: list[Block] = []
        rows = self._column.rows
        for number, row in enumerate(rows):
            following = rows[number + 1] if number + 1 < len(rows) else None
            separator = self._separator(blocks[-1], row, following) if blocks else Break.PARAGRAPH
            if separator is None:
                blocks[-1].rows.append(row)
            else:
                blocks.append(self._block(row, separator))
        return blocks

    def _block(self, row: Row, separator: Break) -> Block:
        column = self._column
        return Block(_kind(row), [row], column.page, column.margin, column.is_sure, separator)

    def _separator(self, block: Block, row: Row, following: Row | None) -> Break | None:
        """What stands between a block and the row after it; ``None`` if the row continues the block."""
        last, kind = block.rows[-1], _kind(row)
        is_gap = self._is_gap(last, row, _GAP)
        if max(last.size, row.size) > _LARGER * min(last.size, row.size):
            return Break.PARAGRAPH
        if (
            kind in (Kind.CODE, Kind.TABLE)
            and block.kind in (Kind.PROSE, Kind.ITEM)
            and row.cell_gap == CELL_GAP
            and self._is_within(block, row)
        ):
            return None
        if Kind.CODE in (kind, block.kind):
            return None if kind is block.kind else Break.PARAGRAPH
        if kind in _LINES or block.kind in _LINES:
            is_contents = kind is Kind.CONTENTS and block.kind in _LINES
            return Break.PARAGRAPH if is_gap and not is_contents else Break.LINE
        if kind is Kind.ITEM and self._begins_item(block, row, is_gap=is_gap):
            return Break.LINE if block.kind is Kind.ITEM or not is_gap else Break.PARAGRAPH
        if is_gap:
            return Break.PARAGRAPH
        if is_cut(last) and row.words[0].text[0].islower():
            return None
        is_centred = _is_centred(last, row)
        if is_centred and not self._column.is_sure:
            return Break.LINE
        if not is_centred and not self._is_aligned(block, row, following):
            return Break.PARAGRAPH
        if not self._would_fit(block, row):
            return None
        return Break.LINE if row.font == last.font else Break.PARAGRAPH

    def _is_within(self, block: Block, row: Row) -> bool:
        """Whether a row of code, or with a wide gap, is a line of the paragraph before it."""
        last = block.rows[-1]
        if self._is_gap(last, row, _GAP) or self._would_fit(block, row):
            return False
        return is_cut(last) or abs(row.left - last.left) <= _SAME_EDGE * row.size

    def _is_gap(self, row: Row, following: Row, times: float) -> bool:
        leading = self._layout.leading_of(min(row.size, following.size))
        return row.baseline - following.baseline > times * leading

    def _begins_item(self, block: Block, row: Row, *, is_gap: bool) -> bool:
        if row.has_bullet or is_gap or self._would_fit(block, row):
            return True
        return block.kind is Kind.ITEM and abs(block.rows[0].left - row.left) < _SAME_EDGE * row.size

    def _is_aligned(self, block: Block, row: Row, following: Row | None) -> bool:
        """Whether a row begins where the next line of the block would."""
        last, indent = block.rows[-1], _INDENT * row.size
        if len(block.rows) > 1:
            return abs(row.left - last.left) <= indent
        if block.kind is Kind.ITEM:
            return last.left - indent <= row.left <= last.words[1].left + indent
        if row.left <= last.left + indent:
            return True
        # A hanging indent: the lines after the first begin further right, and the first is full.
        if self._would_fit(block, row):
            return False
        if following is not None and not self._is_gap(row, following, _GAP):
            return abs(following.left - row.left) <= indent
        return row.words[0].text[0].islower() or row.font == last.font != self._layout.text_font

    def _would_fit(self, block: Block, row: Row) -> bool:
        """Whether the first word of ``row`` would have fitted into the line before it."""
        last, first = block.rows[-1], row.words[0]
        width = first.right - first.left
        if is_without_spaces(first.text[0]):
            # Any letter may end a line.
            width /= len(first.text)
        end = last.right + _SPACE * last.size + width
        if end > self._column.margin - _TOLERANCE * last.size:
            return False
        # Three lines that end at the same place are full, though others of the column are longer.
        rows = self._column.rows
        at = self._places[id(last)]
        near = [*rows[max(at - 2, 0) : at], *rows[at + 1 : at + 3]]
        return sum(abs(other.right - last.right) <= _JUSTIFIED * last.size for other in near) < 2


def is_cut(row: Row) -> bool:
    """Whether a word continues in the next line."""
    text = row.words[-1].text
    return len(text) > 1 and text[-1] in HYPHENS and text[-2].isalnum()


def _is_centred(row: Row, other: Row) -> bool:
    middle = abs((row.left + row.right) - (other.left + other.right)) / 2
    return middle <= row.size and abs(row.left - other.left) > _INDENT * row.size
