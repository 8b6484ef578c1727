"""Reading order where a document draws the lines of two columns by turns.

Most documents draw one column after the other, and their order is kept. Where the two sides of the page alternate, a
white strip through many rows tells columns of prose from a table: its left side is filled to the strip.
"""

from collections.abc import Sequence
from typing import Final

from metaflow_hf.data.sources.pdf.geometry import COLUMN_GAP, Page, Row, Word

_ROWS: Final = 6
_WORDS: Final = 3.0
_FILLED: Final = 0.5


def separate_columns(page: Page) -> None:
    """Puts the rows of interleaved columns into the order in which they are read."""
    rows: list[Row] = []
    run: list[Row] = []
    for row in page.rows:
        if run and _is_below(run[-1], row):
            run.append(row)
        else:
            rows += _separated(run)
            run = [row]
    page.rows = rows + _separated(run)


def mark_tables(rows: Sequence[Row]) -> None:
    """Narrow gaps separate cells where three rows or more have them below each other."""
    for before, row, after in zip(rows, rows[1:], rows[2:], strict=False):
        if row.is_mono or not row.gaps or not _is_below(before, row) or not _is_below(row, after):
            continue
        strip = _overlaps(_overlaps(row.gaps, before.gaps, row.size), after.gaps, row.size)
        if strip:
            for other in (before, row, after):
                other.cell_gap = COLUMN_GAP


def _is_below(row: Row, following: Row) -> bool:
    step = row.baseline - following.baseline
    is_same_kind = row.angle == following.angle and not row.is_mono and not following.is_mono
    return is_same_kind and abs(row.size - following.size) < 0.5 and 0 < step < 2.5 * row.size


def _separated(run: list[Row]) -> list[Row]:
    """The rows of a run, the left side of each before the right side of all, where they are two columns."""
    for start in range(len(run) - _ROWS + 1):
        strip = run[start].gaps
        stop = start
        best: tuple[float, float] | None = None
        while strip and stop < len(run):
            narrowed = _overlaps(strip, _gaps(run[stop]), run[stop].size)
            if not narrowed:
                break
            strip = narrowed
            best = strip[0]
            stop += 1
        if best is None or stop - start < _ROWS:
            continue
        left, right = _halves(run[start:stop], best)
        if _is_prose(left, best[0]) and _is_prose(right, max(row.right for row in right)):
            return [*run[:start], *left, *right, *_separated(run[stop:])]
    return run


def _gaps(row: Row) -> list[tuple[float, float]]:
    """White space between the words of a row, and to the right of it."""
    return [*row.gaps, (row.right, float("inf"))]


def _overlaps(
    strips: Sequence[tuple[float, float]], gaps: Sequence[tuple[float, float]], size: float
) -> list[tuple[float, float]]:
    parts = [(max(left, gap[0]), min(right, gap[1])) for gap in gaps for left, right in strips]
    return [(left, right) for left, right in parts if right - left >= COLUMN_GAP * size]


def _halves(rows: list[Row], strip: tuple[float, float]) -> tuple[list[Row], list[Row]]:
    middle = (strip[0] + strip[1]) / 2
    left = [part for row in rows if (part := _part(row, [w for w in row.words if w.right <= middle]))]
    right = [part for row in rows if (part := _part(row, [w for w in row.words if w.left >= middle]))]
    return left, right


def _part(row: Row, words: list[Word]) -> Row | None:
    return Row(words, row.baseline, row.size, row.fonts, row.angle, row.is_mono) if words else None


def _is_prose(rows: list[Row], edge: float) -> bool:
    if len(rows) < _ROWS:
        return False
    mean = sum(len(row.words) for row in rows) / len(rows)
    filled = sum(edge - row.right < 2.5 * row.size for row in rows) / len(rows)
    return mean >= _WORDS and filled >= _FILLED
