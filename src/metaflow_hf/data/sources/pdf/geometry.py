"""Words and rows of a page, with the places where they are printed.

All lengths are in points. A row lies on one baseline; ``left`` and ``right`` run along the direction of its text,
``baseline`` grows towards the top of the page, whatever way the page is turned.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

# A gap between words of at least so many times the font size separates the cells of a table.
CELL_GAP: Final = 2.0
# Less is enough where the gaps of several rows are below each other.
COLUMN_GAP: Final = 0.8
# Dots, also with spaces between them, that lead from an entry of a table of contents to the number of its page.
_LEADER: Final = re.compile(
    r"\s*(?:[.·․‥…]\s?){4,}(?=(?:[A-Z]+[-.‑–]?)?\d{1,4}(?:\s|$)|[ivxlc]{1,7}$)", re.IGNORECASE
)
_BULLET: Final = re.compile(r"[•◦▪▫‣⁃·●○■□–—*-]")
_ENUMERATION: Final = re.compile(r"\(?(?:\d{1,2}|[a-z]|[ivx]{1,5})[.)]|\[\d{1,3}\]")
_SECTION: Final = re.compile(r"(?:[A-Z]|\d{1,2})(?:\.\d{1,2}){0,4}\.?")


@dataclass(slots=True)
class Word:
    """Characters without a space between them."""

    text: str
    left: float
    right: float


@dataclass(slots=True, eq=False)
class Row:
    """Words on one baseline in reading order; ``angle`` is the direction of the text in degrees.

    ``fonts`` counts the characters in each font. Gaps of ``cell_gap`` times the size separate cells.
    """

    words: list[Word]
    baseline: float
    size: float
    fonts: Counter[str]
    angle: int = 0
    is_mono: bool = False
    cell_gap: float = CELL_GAP

    @property
    def font(self) -> str:
        """The font of most characters."""
        return self.fonts.most_common(1)[0][0]

    @property
    def left(self) -> float:
        return self.words[0].left

    @property
    def right(self) -> float:
        return self.words[-1].right

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def cells(self) -> list[str]:
        """The texts of groups of words with wide gaps between them."""
        return [" ".join(word.text for word in cell) for cell in self.word_cells]

    @property
    def word_cells(self) -> list[list[Word]]:
        """Groups of words with wide gaps between them."""
        cells = [[self.words[0]]]
        for before, word in pairwise(self.words):
            if word.left - before.right >= self.cell_gap * self.size:
                cells.append([])
            cells[-1].append(word)
        return cells

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """The white space between words, where it is wider than between the words of prose."""
        words = self.words[1 if self.marker else 0 :]
        return [
            (before.right, after.left)
            for before, after in pairwise(words)
            if after.left - before.right >= COLUMN_GAP * self.size
        ]

    @property
    def has_leader(self) -> bool:
        """Whether dots lead from one part of the row to another, or to its end."""
        return not self.is_mono and _LEADER.search(self.text) is not None

    @property
    def is_table_row(self) -> bool:
        """Whether the row has cells: more than the number of a heading or a list item, and what follows it."""
        cells = self.cells
        return len(cells) > 2 or (
            len(cells) == 2 and self.marker is None and not _SECTION.fullmatch(cells[0])
        )

    @property
    def marker(self) -> str | None:
        """The bullet or number of a list item with which the row begins."""
        if len(self.words) < 2:
            return None
        first = self.words[0].text
        return first if _BULLET.fullmatch(first) or _ENUMERATION.fullmatch(first) else None

    @property
    def has_bullet(self) -> bool:
        """Whether the row begins with a sign that stands for nothing but a list item."""
        return self.marker is not None and self.marker in "•◦▪▫‣⁃●○■□"

    def without_leaders(self) -> str:
        """The text with a tab in place of each leader."""
        return _LEADER.sub("\t", self.text).strip("\t ")


@dataclass(slots=True)
class Page:
    """Rows in reading order; ``has_pictures`` says that the page shows images."""

    number: int
    rows: list[Row] = field(default_factory=list)
    width: float = 0.0
    has_pictures: bool = False

    @property
    def left(self) -> float:
        """The left margin of the text."""
        return min((row.left for row in self.rows), default=0.0)
