"""Running heads, running feet and page numbers: rows at the edge of pages that repeat, or count the pages.

A row is left out only on evidence from other pages: the same text at the same place, or a number there that grows by
one from page to page. Rows at the edge go first; the next ones are looked at after them.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final

from metaflow_hf.data.sources.pdf.geometry import Page, Row

# How many rows deep the furniture of a page may be, at the top and at the bottom.
_DEPTH: Final = 4
# How many pages show a row before it counts as repeated; in shorter documents half of the pages, and two at least.
_PAGES: Final = 3
# Rows of two pages are at the same place when they are not further apart than so many points.
_SAME_PLACE: Final = 3.0
# More than so many times its size separates a running head from the text.
_APART: Final = 1.4
_NUMBER: Final = re.compile(r"\d{1,4}|[ivxlc]{1,7}", re.IGNORECASE)
_NUMBERING: Final = re.compile(
    r"(?:(?:page|slide|p\.|seite|blatt|página|pagina|strona|стр\.)\s*)?[-–—|·\[(]?\s*(\d{1,4}|[ivxlc]{1,7})\s*[-–—|·\])]?"
    r"(?:\s*(?:of|/|von|de|di|sur|из|z)\s*\d{1,4})?",
    re.IGNORECASE,
)
_ROMAN: Final = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}


def remove_furniture(pages: Sequence[Page]) -> None:
    """Takes running heads, running feet and page numbers out of ``pages``, unless nothing else would be left."""
    upright = _main_angle(pages)
    before = {page.number: list(page.rows) for page in pages}
    numbers: set[int] = set()
    for edge in (_top, _bottom):
        numbers |= _remove_at(edge, pages, upright)
    # Stamps along the side and marks across the page.
    turned = [(page, row) for page in pages for row in page.rows if row.angle != upright]
    for page, row in _on_several(turned, lambda _, row: row.text, num_pages=len(pages)):
        page.rows.remove(row)
    _restore(pages, before, numbers)


def _restore(pages: Sequence[Page], before: dict[int, list[Row]], numbers: set[int]) -> None:
    """Puts back what pages say that say nothing else: only what stands beside text elsewhere is furniture."""
    beside_text = {
        row.text for page in pages if page.rows for row in before[page.number] if row not in page.rows
    }
    for page in pages:
        if not page.rows:
            page.rows = [
                row for row in before[page.number] if id(row) not in numbers and row.text not in beside_text
            ]
    if not any(page.rows for page in pages):
        for page in pages:
            page.rows = before[page.number]


def _remove_at(edge: "Edge", pages: Sequence[Page], angle: int) -> set[int]:
    """Removes the furniture of one edge; returns the identities of the rows that number pages."""
    baselines = [row.baseline for page in pages for row in page.rows if row.angle == angle]
    middle = (max(baselines) + min(baselines)) / 2 if baselines else 0.0
    lanes: set[Hashable] = set()
    taken: dict[int, list[Row]] = {page.number: [] for page in pages}
    numbers: set[int] = set()
    for _ in range(_DEPTH):
        rest = [(page, [row for row in page.rows if row not in taken[page.number]]) for page in pages]
        outermost = [(page, row) for page, rows in rest if (row := edge(rows, angle, middle)) is not None]
        numbered = _numbered(outermost)
        found = _repeated(outermost) + numbered
        lanes |= _widespread(found, len(outermost))
        found += [(page, row) for page, row in outermost if _lane(row) in lanes]
        numbers |= {id(row) for _, row in numbered}
        for page, row in found:
            if row not in taken[page.number]:
                taken[page.number].append(row)
        if not found:
            break
    for page in pages:
        rows = taken[page.number]
        # What repeats as a part of the text, without a space between, is text.
        while rows and id(rows[-1]) not in numbers and not _is_apart(rows[-1], page.rows, rows):
            rows.pop()
        page.rows = [row for row in page.rows if row not in rows]
    return numbers


def _main_angle(pages: Sequence[Page]) -> int:
    angles: Counter[int] = Counter()
    for page in pages:
        for row in page.rows:
            angles[row.angle] += row.fonts.total()
    return angles.most_common(1)[0][0] if angles else 0


def _top(rows: Sequence[Row], angle: int, middle: float) -> Row | None:
    rows = [row for row in rows if row.angle == angle and row.baseline >= middle]
    return max(rows, key=lambda row: row.baseline, default=None)


def _bottom(rows: Sequence[Row], angle: int, middle: float) -> Row | None:
    rows = [row for row in rows if row.angle == angle and row.baseline < middle]
    return min(rows, key=lambda row: row.baseline, default=None)


Candidates = list[tuple[Page, Row]]
Edge = Callable[[Sequence[Row], int, float], Row | None]


def _repeated(outermost: Candidates) -> Candidates:
    """Rows whose text stands at the same place on several pages."""
    return _on_several(outermost, lambda _, row: row.text)


def _numbered(outermost: Candidates) -> Candidates:
    """Rows at the same place that number the pages, alone or beside a text."""
    found: Candidates = []
    for side in (0, -1):

        def offset(page: Page, row: Row, side: int = side) -> Hashable:
            numbers = _page_numbers(row, side)
            return None if numbers is None else (numbers[0] - page.number, numbers[1])

        found += _on_several(outermost, offset)
    largest = _largest_text(outermost)
    for side in (0, -1):

        def run(page: Page, row: Row, side: int = side) -> Hashable:
            words = [word.text for word in row.words]
            # One word and a number may be the heading of an exercise; so may larger letters.
            if len(words) < 3 or not words[side].isdecimal() or row.size > largest:
                return None
            rest = words[1:] if side == 0 else words[:-1]
            return (int(words[side]) - page.number, *rest)

        found += _on_several(outermost, run)
    return found


def _page_numbers(row: Row, side: int) -> tuple[int, bool] | None:
    """The number in the outer cell of a row, and whether it is Roman; ``None`` if there is no number of a page."""
    cells = row.cells
    match = _NUMBERING.fullmatch(cells[side])
    if match is None and len(cells) == 1:
        parts = re.split(r"\s[|·•–—-]\s", row.text)
        match = _NUMBERING.fullmatch(parts[side]) if len(parts) > 1 else None
    if match is None:
        return None
    number = match.group(1)
    return (int(number), False) if number.isdecimal() else (_roman(number.lower()), True)


def _roman(number: str) -> int:
    values = [_ROMAN[letter] for letter in number]
    return sum(
        -value if any(later > value for later in values[at + 1 :]) else value
        for at, value in enumerate(values)
    )


def _on_several(
    rows: Candidates, key_of: Callable[[Page, Row], Hashable], *, num_pages: int | None = None
) -> Candidates:
    """Rows that have one key, and one place, on enough of ``num_pages``; there is one row a page by default."""
    enough = max(2, min(_PAGES, -(-(num_pages or len(rows)) // 2)))
    groups: dict[Hashable, Candidates] = defaultdict(list)
    for page, row in rows:
        key = key_of(page, row)
        if key is not None:
            groups[key, row.angle].append((page, row))
    found: Candidates = []
    for group in groups.values():
        places = sorted(row.baseline for _, row in group)
        for page, row in group:
            first = bisect_left(places, row.baseline - _SAME_PLACE)
            if bisect_right(places, row.baseline + _SAME_PLACE) - first >= enough:
                found.append((page, row))
    return found


def _widespread(found: Candidates, num_pages: int) -> set[Hashable]:
    """Places where half of the pages have furniture: what the others have there is some too."""
    lanes = Counter(_lane(row) for _, row in found)
    return {lane for lane, count in lanes.items() if count >= max(_PAGES, num_pages // 2)}


def _lane(row: Row) -> Hashable:
    return (round(row.baseline), row.size, row.font, row.angle)


def _is_apart(row: Row, rows: Sequence[Row], furniture: Sequence[Row]) -> bool:
    """Whether more than the distance of two lines separates the row from the text."""
    text = [other for other in rows if other not in furniture and other.angle == row.angle]
    distance = min((abs(row.baseline - other.baseline) for other in text), default=float("inf"))
    return distance > _APART * row.size


def _largest_text(rows: Iterable[tuple[Page, Row]]) -> float:
    """The size that most text of these pages has; larger rows are headings."""
    sizes: Counter[float] = Counter()
    for page in {id(page): page for page, _ in rows}.values():
        for row in page.rows:
            sizes[row.size] += len(row.text)
    return sizes.most_common(1)[0][0] if sizes else 0.0
