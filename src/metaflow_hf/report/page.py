"""A page of a report as plain values, and its HTML: what a card shows, without a word about cards.

All text given to the blocks is plain text from anywhere; ``fragment`` is the one place that makes HTML of it
and escapes every character that HTML or Markdown could take for its own. A fragment is one line without line
ends, so that a Markdown renderer passes it through as the block of HTML that it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

STYLE = (
    "<style>"
    ".hfr{font-size:14px;line-height:1.45;color:#222;margin:10px 0}"
    ".hfr h1{font-size:26px;margin:0 0 4px}.hfr h2{font-size:17px;margin:26px 0 2px}"
    ".hfr .sub,.hfr .note{color:#6b7280;font-size:13px;margin:0;overflow-wrap:anywhere}"
    ".hfr .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;margin-top:16px}"
    ".hfr .tile{border:1px solid #e5e7eb;border-radius:8px;padding:12px 14px;background:#fff}"
    ".hfr .tile b{display:block;font-size:24px;line-height:1.25;color:#111827;overflow-wrap:anywhere}"
    ".hfr .tile.good{background:#f0fdf4;border-color:#bbf7d0}.hfr .tile.good b{color:#065f46}"
    ".hfr .tile i{font-style:normal;color:#6b7280;font-size:12px}"
    ".hfr .scroll{overflow-x:auto}.hfr .scroll table{min-width:0;width:auto;border-collapse:collapse}"
    ".hfr .scroll td:first-child{overflow-wrap:normal;white-space:nowrap}"
    ".hfr .scroll th,.hfr .scroll td{padding:5px 16px 5px 0;text-align:left;background:none;"
    "border-bottom:1px solid #eef0f2;vertical-align:top;overflow-wrap:anywhere}"
    ".hfr .scroll th{color:#6b7280;font-size:12px;font-weight:500}"
    ".hfr .scroll .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}"
    ".hfr .strong td{font-weight:700}"
    ".hfr summary{cursor:pointer;color:#0c66de;margin:4px 0}"
    ".hfr pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.5 ui-monospace,Menlo,Consolas,"
    "monospace;background:#f6f7f9;border-radius:8px;padding:10px 12px;text-align:left}"
    ".hfr .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:12px;margin:6px 0 14px}"
    ".hfr .pair i{font-style:normal;color:#6b7280;font-size:12px;display:block;margin-bottom:3px}"
    ".hfr .after pre{background:#f0fdf4}"
    ".hfr .bar{height:10px;border-radius:5px;background:#e5e7eb;overflow:hidden;margin:14px 0 6px}"
    ".hfr .bar div{height:100%;border-radius:5px;background:#0072B2}"
    "@media(max-width:600px){.hfr h1{font-size:21px}.hfr .tiles{grid-template-columns:repeat(2,1fr);gap:8px}"
    ".hfr .tile{padding:9px 11px}.hfr .tile b{font-size:20px}"
    ".hfr .scroll th,.hfr .scroll td{padding:5px 9px 5px 0;font-size:13px}}"
    # Below 60 rem Metaflow's cards stack their parts as blocks, where a chart as wide as its container has none.
    ".vega-embed{display:block!important;width:100%!important}"
    "</style>"
)


@dataclass(frozen=True)
class Title:
    """The head of the page."""

    text: str
    subtitles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heading:
    """The head of a section, with a sentence that says what is seen."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure to see first: what it is, its value with unit, and what it is compared with."""

    label: str
    value: str
    note: str = ""
    is_good: bool = False


@dataclass(frozen=True)
class Tiles:
    """Figures side by side, wrapping on narrow screens."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Grid:
    """A table; ``numeric`` columns stand right. With ``folded`` it opens by a click on that text."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    strong_rows: frozenset[int] = frozenset()
    folded: str = ""


@dataclass(frozen=True)
class Code:
    """Text shown as it is, in a fixed-width font. With ``folded`` it opens by a click on that text."""

    text: str
    folded: str = ""


@dataclass(frozen=True)
class Progress:
    """A bar that is full to ``fraction`` (0 to 1), and what it says."""

    fraction: float
    note: str


@dataclass(frozen=True)
class Comparison:
    """What two models wrote after the same prompt."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite spec with its data."""

    spec: dict[str, Any]


TextBlock = Title | Heading | Tiles | Grid | Code | Comparison | Progress
Block = TextBlock | Chart


@dataclass(frozen=True)
class Page:
    """The blocks of a page from top to bottom."""

    blocks: tuple[Block, ...]


def escape(text: str) -> str:
    """The text for HTML inside Markdown: nothing in it is markup, and it holds no line end.

    Line ends become character references; so do the characters that start Markdown, because a renderer may
    treat the inside of a block as inline text. Control characters, which HTML forbids, become U+FFFD.
    """
    pieces = []
    for char in text:
        if char in "\n\t" or char in "&<>\"'`*_[]()|\\#~!$:{}":
            pieces.append(f"&#{ord(char)};")
        elif char.isprintable():
            pieces.append(char)
        else:
            pieces.append("&#65533;")
    return "".join(pieces)


def fragment(block: TextBlock) -> str:
    """The HTML of one block, a single line."""
    return f'<div class="hfr">{_body(block)}</div>'


def _body(block: TextBlock) -> str:
    match block:
        case Title():
            subtitles = "".join(f'<p class="sub">{escape(text)}</p>' for text in block.subtitles)
            return f"<h1>{escape(block.text)}</h1>{subtitles}"
        case Heading():
            note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
            return f"<h2>{escape(block.text)}</h2>{note}"
        case Tiles():
            return f'<div class="tiles">{"".join(map(_tile, block.tiles))}</div>'
        case Grid():
            return _grid(block)
        case Code():
            return _folded(block.folded, f"<pre>{escape(block.text)}</pre>")
        case Progress():
            width = f"{100 * min(max(block.fraction, 0.0), 1.0):.1f}"
            return (
                f'<div class="bar"><div style="width:{width}%"></div></div>'
                f'<p class="note">{escape(block.note)}</p>'
            )
        case Comparison():
            return _comparison(block)


def _tile(tile: Tile) -> str:
    kind = "tile good" if tile.is_good else "tile"
    return f'<div class="{kind}"><i>{escape(tile.label)}</i><b>{escape(tile.value)}</b><i>{escape(tile.note)}</i></div>'


def _grid(grid: Grid) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{escape(cell)}</{tag}>'
            if column in grid.numeric
            else f"<{tag}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    head = f"<tr>{cells('th', grid.headers)}</tr>" if any(grid.headers) else ""
    rows = "".join(
        f'<tr class="strong">{cells("td", row)}</tr>'
        if number in grid.strong_rows
        else f"<tr>{cells('td', row)}</tr>"
        for number, row in enumerate(grid.rows)
    )
    table = f'<div class="scroll"><table>{head}{rows}</table></div>'
    return _folded(grid.folded, table)


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>" if title else inside


def _comparison(block: Comparison) -> str:
    sides = [
        f'<div class="{name}"><i>{name} training</i><pre>{escape(text)}</pre></div>'
        for name, text in (("before", block.before), ("after", block.after))
        if text is not None
    ]
    return f'<p class="note">prompt: {escape(block.prompt)}</p><div class="pair">{"".join(sides)}</div>'


def document(page: Page) -> list[str | dict[str, Any]]:
    """The page as what a renderer of Markdown and Vega-Lite needs: HTML and specs, in order.

    Neighbouring blocks of text are one piece of HTML, so that they stand close together.
    """
    parts: list[str | dict[str, Any]] = [STYLE]
    for is_chart, blocks in groupby(page.blocks, key=lambda block: isinstance(block, Chart)):
        if is_chart:
            parts += [block.spec for block in blocks if isinstance(block, Chart)]
        else:
            inside = "".join(fragment(block) for block in blocks if not isinstance(block, Chart))
            parts.append(f"<div>{inside}</div>")
    return parts
