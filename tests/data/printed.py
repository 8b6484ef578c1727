"""PDF files as programs that typeset text make them: each line is drawn by itself, where the test says."""

import io
import re
from collections.abc import Sequence
from typing import Self

from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.pdfgen.canvas import Canvas

WIDTH, HEIGHT = 400.0, 600.0
LEFT, MEASURE = 50.0, 282.0
SERIF, BOLD, MONO = "Times-Roman", "Times-Bold", "Courier"


def wrapped(text: str, width: float = MEASURE, *, size: float = 10, first: float = 0) -> list[str]:
    """The lines of a paragraph; words are cut at soft hyphens and behind hyphens, as early as they do not fit.

    ``first`` is how much shorter the first line is.
    """
    lines, line = [], ""
    for word in text.split(" "):
        parts = re.findall(r"[^\u00ad-]+-?|-+", word)
        start = f"{line} " if line else ""
        for number in range(len(parts), -1, -1):
            rest = "".join(parts[number:])
            piece = "".join(parts[:number])
            cut = "-" if rest and piece and not piece.endswith("-") else ""
            room = width - (0 if lines else first)
            if stringWidth(start + piece + cut, SERIF, size) <= room:
                break
        if piece:
            line = start + piece + cut
        if rest:
            lines.append(line)
            line = rest
    return [*lines, line]


class Printed:
    """Draws pages from top to bottom; ``at`` is the baseline of the next line.

    Lines of ``paragraph`` are stretched to ``measure`` except the last, as books do.
    """

    def __init__(
        self, *, title: str = "", password: str | None = None, size: tuple[float, float] = (WIDTH, HEIGHT)
    ) -> None:
        self._out = io.BytesIO()
        self._canvas = Canvas(self._out, pagesize=size, invariant=1)
        if title:
            self._canvas.setTitle(title)
        if password is not None:
            self._canvas.setEncrypt(StandardEncryption(password, ownerPassword="owner"))
        self.left, self.measure, self.at = LEFT, MEASURE, HEIGHT - 80

    def page(self) -> Self:
        """Begins the next page."""
        self._canvas.showPage()
        self.at = HEIGHT - 80
        return self

    def line(
        self, text: str, *, indent: float = 0, font: str = SERIF, size: float = 10, leading: float = 12
    ) -> Self:
        """One line as wide as it comes."""
        self.put(self.left + indent, self.at, text, font=font, size=size)
        self.at -= leading
        return self

    def put(
        self, x: float, y: float, text: str, *, font: str = SERIF, size: float = 10, turned: float = 0
    ) -> Self:
        """A text at any place."""
        self._canvas.saveState()
        self._canvas.translate(x, y)
        self._canvas.rotate(turned)
        self._canvas.setFont(font, size)
        self._canvas.drawString(0, 0, text)
        self._canvas.restoreState()
        return self

    def paragraph(
        self, *lines: str, indent: float = 0, hanging: float = 0, size: float = 10, ends: bool = True
    ) -> Self:
        """Lines of prose; ``ends`` says that the last one is the last of the paragraph."""
        for number, text in enumerate(lines):
            shift = hanging if number else indent
            is_last = ends and number == len(lines) - 1
            self.stretched(self.left + shift, self.at, text, self.measure - shift, size=size, is_last=is_last)
            self.at -= 1.2 * size
        return self

    def prose(
        self, text: str, *, indent: float = 0, hanging: float = 0, size: float = 10, ends: bool = True
    ) -> list[str]:
        """A paragraph, wrapped; returns its lines."""
        lines = wrapped(text, self.measure - hanging, size=size, first=indent - hanging)
        self.paragraph(*lines, indent=indent, hanging=hanging, size=size, ends=ends)
        return lines

    def stretched(
        self, x: float, y: float, text: str, width: float, *, size: float = 10, is_last: bool = False
    ) -> Self:
        """A line of which the spaces are as wide as needed."""
        self._canvas.setFont(SERIF, size)
        room = width - stringWidth(text, SERIF, size)
        spaces = text.count(" ")
        space = 0.0 if is_last or not spaces else room / spaces
        assert room >= -0.1, f"{text!r} is {-room:.0f} points too long"
        assert is_last or space < 9, f"{text!r} is {room:.0f} points too short"
        self._canvas.drawString(x, y, text, wordSpace=space)
        return self

    def gap(self, points: float = 8) -> Self:
        """White space below the last line."""
        self.at -= points
        return self

    def picture(self) -> Self:
        """An image, as a scanned page is one."""
        from PIL import Image
        from reportlab.lib.utils import ImageReader

        self._canvas.drawImage(ImageReader(Image.new("L", (8, 8), 128)), 0, 0, 300, 300)
        return self

    def save(self) -> bytes:
        """The file."""
        self._canvas.showPage()
        self._canvas.save()
        return self._out.getvalue()


def plain_pdf(pages: Sequence[str], *, password: str | None = None, title: str = "Letters") -> bytes:
    """A PDF with one line of text a page; an empty one is a page without text."""
    printed = Printed(title=title, password=password, size=(300, 300))
    for number, text in enumerate(pages):
        if number:
            printed.page()
        if text:
            printed.put(20, 200, text, size=12)
    return printed.save()
