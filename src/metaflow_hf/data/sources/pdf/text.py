"""Blocks become text: paragraphs reflowed, also over the end of a column or a page; code with its indentation."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import Final

from metaflow_hf.data.sources.pdf.blocks import Block, Break, Kind, Layout, is_cut
from metaflow_hf.data.sources.pdf.columns import separate_columns
from metaflow_hf.data.sources.pdf.furniture import remove_furniture
from metaflow_hf.data.sources.pdf.geometry import Page, Row
from metaflow_hf.data.sources.pdf.hyphens import Vocabulary

_SAME_SIZE: Final = 1.08
_INDENT: Final = 0.8
_FULL: Final = 0.4
_BLANK_LINE: Final = 1.6
_MAX_BLANK_LINES: Final = 2
# How many blocks may stand between two parts of a paragraph.
_LOOK_BACK: Final = 30


def page_texts(pages: Sequence[Page]) -> list[str]:
    """The text of each page; what a page end cuts stays cut."""
    writer = _Writer(pages)
    return [writer.text(writer.layout.columns_of(page)) for page in pages]


def document_text(pages: Sequence[Page]) -> str:
    """The text of all pages as one; a paragraph continues over a page end."""
    writer = _Writer(pages)
    return writer.text([column for page in pages for column in writer.layout.columns_of(page)])


class _Writer:
    """Writes the blocks of one document; cleans ``pages`` first."""

    def __init__(self, pages: Sequence[Page]) -> None:
        remove_furniture(pages)
        for page in pages:
            separate_columns(page)
        self.layout = Layout(pages)
        lines = [row for page in pages for row in page.rows if not row.is_mono]
        self._vocabulary = Vocabulary.of([word.text for word in row.words] for row in lines)

    def text(self, columns: Iterable[list[Block]]) -> str:
        blocks = self._connected(columns)
        parts = [part for block in blocks for part in (block.separator.value, self._block_text(block))]
        return "".join(parts[1:])

    def _connected(self, columns: Iterable[list[Block]]) -> list[Block]:
        """All blocks in order; one that continues in the next column is one block."""
        blocks: list[Block] = []
        for column in columns:
            blocks += self._continue(blocks, column) if blocks and column else column
        return blocks

    def _continue(self, blocks: Sequence[Block], column: list[Block]) -> list[Block]:
        """Adds the block of ``column`` that continues an earlier one to that; returns the other blocks."""
        last, first = blocks[-1], column[0]
        if not _goes_on(last, first, column):
            # Footnotes, figures and tables may stand between two parts of a paragraph.
            unfinished = self._unfinished(blocks)
            texts = [block for block in column if self._is_text(block)]
            if unfinished is None or not texts or not _begins_lower(texts[0]):
                return column
            last, first = unfinished, texts[0]
            if not _goes_on(last, first, column):
                return column
        if first.kind is Kind.CODE:
            _shift(first.rows, last.page.left - first.page.left)
        last.rows += first.rows
        last.margin, last.is_margin_sure = first.margin, first.is_margin_sure
        rest = [block for block in column if block is not first]
        if first is column[0] and rest and rest[0].separator is Break.LINE and blocks[-1] is not last:
            rest[0].separator = Break.PARAGRAPH
        return rest

    def _unfinished(self, blocks: Sequence[Block]) -> Block | None:
        """The last paragraph of text, if it stops within a sentence."""
        for block in reversed(blocks[-_LOOK_BACK:]):
            if not self._is_text(block):
                continue
            if block.is_open and not block.ends_sentence:
                return block
            if len(block.rows) > 1 or block.is_open:
                return None
        return None

    def _is_text(self, block: Block) -> bool:
        is_text_size = 1 / _SAME_SIZE < block.size / (self.layout.text_size or 1.0) < _SAME_SIZE
        return is_text_size and block.kind in (Kind.PROSE, Kind.ITEM)

    def _block_text(self, block: Block) -> str:
        if block.kind is Kind.CODE:
            return "\n".join(self._code_lines(block.rows))
        if block.kind is Kind.CONTENTS:
            return block.rows[0].without_leaders()
        if block.kind is Kind.TABLE:
            return "\t".join(block.rows[0].cells)
        return reduce(self._vocabulary.joined, (row.text for row in block.rows))

    def _code_lines(self, rows: Sequence[Row]) -> Iterator[str]:
        left = min(row.left for row in rows)
        yield _spaced(rows[0], left)
        for row, following in pairwise(rows):
            leading = self.layout.leading_of(row.size)
            step = row.baseline - following.baseline
            if step > _BLANK_LINE * leading:
                yield from [""] * min(round(step / leading) - 1, _MAX_BLANK_LINES)
            yield _spaced(following, left)


def _begins_lower(block: Block) -> bool:
    return block.rows[0].words[0].text[0].islower()


def _goes_on(block: Block, following: Block, column: Sequence[Block]) -> bool:
    """Whether a block continues in the next column with ``following``."""
    if not 1 / _SAME_SIZE < block.size / following.size < _SAME_SIZE:
        return False
    if block.kind is Kind.CODE or following.kind is Kind.CODE:
        return block.kind is following.kind
    if block.kind not in (Kind.PROSE, Kind.ITEM) or following.kind is not Kind.PROSE or not block.is_open:
        return False
    first = following.rows[0]
    is_lower = _begins_lower(following)
    if is_cut(block.rows[-1]) and is_lower:
        return True
    left = following.rows[1].left if len(following.rows) > 1 else min(b.rows[0].left for b in column)
    if first.left > left + _INDENT * first.size and not (is_lower and len(following.rows) == 1):
        return False
    is_full = block.margin - block.rows[-1].right < _FULL * block.size
    return is_lower or is_full or not block.ends_sentence


def _shift(rows: Iterable[Row], distance: float) -> None:
    for row in rows:
        for word in row.words:
            word.left += distance
            word.right += distance


def _spaced(row: Row, left: float) -> str:
    """A line of code with its words in the columns where they are printed."""
    letters = sum(len(word.text) for word in row.words)
    width = sum(word.right - word.left for word in row.words) / letters or row.size
    line = ""
    for word in row.words:
        at = round((word.left - left) / width)
        line += " " * max(at - len(line), 1 if line else 0) + word.text
    return line
