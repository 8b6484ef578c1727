"""The text of a Word document: paragraphs, headings, lists with their numbers, and tables.

Headers and footers of pages are no part of the body, so they are left out. A blank line separates paragraphs; items of
a list, rows of a table and lines of code follow each other without one.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

_LINES: Final = re.compile(r"code|preformatted|source|plain text|no spacing|macro", re.IGNORECASE)
_LEVEL: Final = re.compile(r"%(\d)")
_ROMAN: Final = ((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))
_LETTERS: Final = 26


def word_text(document: Any) -> str:
    """The text of a ``docx.Document``."""
    numbering = _Numbering.of(document)
    parts: list[str] = []
    before = ""
    for group, text in _pieces(document, numbering):
        if not text.strip() and not (group and group == before):
            before = ""
            continue
        if parts:
            parts.append("\n" if group and group == before else "\n\n")
        parts.append(text)
        before = group
    return "".join(parts).strip("\n")


def _pieces(document: Any, numbering: "_Numbering") -> Iterator[tuple[str, str]]:
    """Texts in order, each with the group whose members follow each other line by line; "" for none."""
    from docx.table import Table

    for number, item in enumerate(document.iter_inner_content()):
        if isinstance(item, Table):
            for line in _table_lines(item):
                yield f"table {number}", line
            continue
        marker = numbering.marker(item)
        style = item.style.name if item.style is not None else ""
        if marker is not None:
            yield "list", f"{marker}{item.text}"
        elif _LINES.search(style or ""):
            yield f"style {style}", item.text
        else:
            yield "", item.text


def _table_lines(table: Any) -> Iterator[str]:
    """A line per row, its cells apart by tabs; a merged cell counts once."""
    for row in table.rows:
        cells = {cell._tc: " ".join(cell.text.split()) for cell in row.cells}  # noqa: SLF001
        yield "\t".join(cells.values())


@dataclass(frozen=True, slots=True)
class _Level:
    kind: str
    pattern: str
    start: int


@dataclass(slots=True)
class _Numbering:
    """The lists of a document: Word computes bullets and numbers, the text of a paragraph does not hold them.

    ``levels`` are known by list and level; ``shared`` names the counter that a list continues.
    """

    levels: dict[tuple[str, int], _Level] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counter[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Any) -> "_Numbering":
        """As the document defines them; empty for one without lists."""
        from docx.opc.constants import RELATIONSHIP_TYPE
        from docx.oxml.ns import qn

        numbering = cls()
        try:
            root = document.part.part_related_by(RELATIONSHIP_TYPE.NUMBERING).element
        except KeyError:
            return numbering

        def value(element: Any, name: str, default: str) -> str:
            child = element.find(qn(name))
            return default if child is None else str(child.get(qn("w:val"), default))

        kinds = {}
        for abstract in root.findall(qn("w:abstractNum")):
            for level in abstract.findall(qn("w:lvl")):
                at = (abstract.get(qn("w:abstractNumId")), int(level.get(qn("w:ilvl"))))
                start = int(value(level, "w:start", "1"))
                kinds[at] = _Level(value(level, "w:numFmt", "decimal"), value(level, "w:lvlText", ""), start)
        for number in root.findall(qn("w:num")):
            name, abstract_name = number.get(qn("w:numId")), value(number, "w:abstractNumId", "")
            restarts = number.find(f"{qn('w:lvlOverride')}/{qn('w:startOverride')}") is not None
            numbering.shared[name] = f"list {name}" if restarts else abstract_name
            for (owner, depth), level in kinds.items():
                if owner == abstract_name:
                    numbering.levels[name, depth] = level
        return numbering

    def marker(self, paragraph: Any) -> str | None:
        """What Word shows before a paragraph, indented by its level; ``None`` for one that is no item of a list."""
        name, depth = _list_of(paragraph)
        level = self.levels.get((name, depth))
        if level is None:
            return None
        indent = "  " * depth
        if level.kind in ("bullet", "none"):
            return f"{indent}• " if level.kind == "bullet" else indent
        counts = self.counts.setdefault(self.shared[name], Counter())
        counts[depth] = counts[depth] + 1 if counts[depth] else level.start
        for deeper in [other for other in counts if other > depth]:
            del counts[deeper]

        def number(match: re.Match[str]) -> str:
            other = int(match.group(1)) - 1
            known = self.levels.get((name, other), level)
            return _written(counts[other] or known.start, known.kind)

        return f"{indent}{_LEVEL.sub(number, level.pattern)} "


def _list_of(paragraph: Any) -> tuple[str, int]:
    """The list and level of a paragraph, by itself or by its style; no list has the name ""."""
    styles: list[Any] = []
    style = paragraph.style
    while style is not None and len(styles) < _LETTERS:
        styles.append(style.element.pPr)
        style = style.base_style
    depth: int | None = None
    for properties in (paragraph._p.pPr, *styles):  # noqa: SLF001
        found = properties.numPr if properties is not None else None
        if found is None:
            continue
        if depth is None and found.ilvl is not None:
            depth = int(found.ilvl.val)
        if found.numId is not None:
            return str(found.numId.val), depth or 0
    return "", 0


def _written(number: int, kind: str) -> str:
    if kind in ("lowerLetter", "upperLetter"):
        text = chr(ord("a") + (number - 1) % _LETTERS) * ((number - 1) // _LETTERS + 1)
    elif kind in ("lowerRoman", "upperRoman"):
        text, rest = "", number
        for value, letters in ((50, "l"), (40, "xl"), *_ROMAN):
            text, rest = text + letters * (rest // value), rest % value
    else:
        text = f"{number:02d}" if kind == "decimalZero" else str(number)
    return text.upper() if kind.startswith("upper") else text
