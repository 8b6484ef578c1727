"""The text of a page of HTML, with line ends where a reader sees them."""

import re
from typing import Any, Final

from lxml import etree, html

_HIDDEN: Final = frozenset(
    {"audio", "button", "canvas", "head", "iframe", "nav", "noscript", "script", "select", "style", "svg"}
    | {"template", "video"}
)
_PARAGRAPHS: Final = frozenset(
    {"article", "blockquote", "dl", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "main"}
    | {"ol", "p", "pre", "section", "table", "ul"}
)
_LINES: Final = frozenset(
    {"address", "aside", "br", "caption", "dd", "details", "div", "dt", "figcaption", "form", "hr", "legend"}
    | {"li", "option", "summary", "tr"}
)
_CELLS: Final = frozenset({"td", "th"})
_BLANKS: Final = re.compile(r"[ \t\r\n\f]+")


def html_text(data: bytes) -> tuple[str, str | None]:
    """Text and title. Scripts, styles and menus (``nav``) are left out, ``pre`` keeps its spaces, the cells of a
    table's row are apart by tabs. Bytes that are UTF-8 are taken as such, others as the page says they are.

    Raises ``lxml.etree.LxmlError`` for what is no markup at all.
    """
    if not data.strip():
        return "", None
    parser = html.HTMLParser(
        encoding="utf-8" if _is_utf8(data) else None, remove_comments=True, remove_pis=True
    )
    root = html.document_fromstring(data, parser=parser)
    lines = _Lines()
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        if event == "start":
            lines.enter(element)
            if element.tag in _HIDDEN:
                walk.skip_subtree()
            else:
                lines.write(element.text or "")
        else:
            lines.leave(element)
            if element is not root:
                lines.write(element.tail or "")
    return lines.text(), root.findtext(".//title")


class _Lines:
    """Text as it flows, cut into lines and paragraphs."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open = ""
        self._preformatted = 0

    def enter(self, element: Any) -> None:
        self._break(element.tag)
        self._preformatted += element.tag == "pre"

    def leave(self, element: Any) -> None:
        if element.tag in _CELLS:
            self._open = f"{self._open.rstrip(' ')}\t"
        elif element.tag != "br":
            self._break(element.tag)
        self._preformatted -= element.tag == "pre"

    def write(self, text: str) -> None:
        if not self._preformatted:
            text = _BLANKS.sub(" ", text)
            self._open += text.lstrip(" ") if self._open[-1:] in ("", " ", "\t") else text
            return
        *whole, rest = text.split("\n")
        for line in whole:
            self._lines.append((self._open + line).rstrip())
            self._open = ""
        self._open += rest

    def text(self) -> str:
        self._end_line()
        # One blank line between paragraphs, however deep the elements between them.
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip("\n")

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._end_line()
            self._lines.append("")
        elif tag in _LINES:
            self._end_line()

    def _end_line(self) -> None:
        if self._open.strip():
            self._lines.append(self._open.rstrip())
        self._open = ""


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
