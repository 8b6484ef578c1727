"""Documents (pdf, docx, html, markdown) as rows of text, each with where it came from.

A document is one row; with ``documents="pages"`` each page of a PDF is one. The columns are ``text``, ``source`` (the
file, relative to the directory or repository), ``format``, ``title`` (where the document says one), and ``part`` of
``parts``, or ``page`` of ``pages``. A document or page without text, such as a scan, is a row without text: counted
and skipped.

The libraries that read them are the extra ``metaflow-hf[documents]``; markdown needs none.
"""

import io
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Final

from metaflow_hf.data.encoding import InputRow, InputRows, Unreadable
from metaflow_hf.data.manifest import Cursor, Documents
from metaflow_hf.data.sources.compression import OpenableFile, open_content, uncompressed_name
from metaflow_hf.errors import ConfigError

logger = logging.getLogger("metaflow_hf.data")

BATCH_PAGES: Final = 50
# Grows when the same documents give another text than before: it is part of a dataset's key.
DOCUMENT_RULES: Final = 1
# What parsers of foreign bytes are known to raise besides their own errors.
_DAMAGE: Final[tuple[type[Exception], ...]] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    UnicodeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

Parse = Callable[[str, bytes, Documents], Iterator[dict[str, Any] | Unreadable]]


def document_format(name: str) -> str | None:
    """The ending of a document that can be read, or ``None``."""
    lowered = uncompressed_name(name.lower())
    return next((ending for ending in PARSERS if lowered.endswith(ending)), None)


def only_documents(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are documents, in order; a repository's own description is none."""
    return [
        name for name in names if document_format(name) and name.rpartition("/")[2].upper() != "README.MD"
    ]


def read_document(
    file: OpenableFile, cursor: Cursor, *, documents: Documents = "whole"
) -> Iterator[InputRows]:
    """The rows of one document from the cursor's on; one that cannot be read is an ``Unreadable`` row.

    Raises ``ConfigError`` when the extra that reads documents is not installed.
    """
    if cursor.row and (documents == "whole" or not _has_pages(file.name)):
        # The one row that there is was read before.
        return
    with open_content(file) as stream:
        data = stream.read()
    rows = islice(_rows(file.name, data, documents), cursor.row, None)
    first = cursor.row
    while batch := list(islice(rows, BATCH_PAGES)):
        yield InputRows(batch, file.name, first, partial(_after, cursor.file, first))
        first += len(batch)


def _after(file: int, first: int, count: int) -> Cursor:
    return Cursor(file=file, row=first + count)


def _has_pages(name: str) -> bool:
    return document_format(name) == ".pdf"


def _rows(name: str, data: bytes, documents: Documents) -> Generator[InputRow]:
    ending = document_format(name) or ""
    kind, parse = PARSERS[ending]
    has_text = False
    try:
        for row in parse(name, data, documents):
            if isinstance(row, Unreadable):
                yield row
                continue
            has_text = has_text or bool(row["text"])
            yield {"text": row.pop("text"), "source": name, "format": kind, **row}
    except ImportError as error:
        raise ConfigError(
            f"{name}: reading {kind} needs the extra for documents, {error.name} is not installed: "
            "pip install 'metaflow-hf[documents]'."
        ) from error
    except _Unreadable as error:
        yield Unreadable(str(error))
    else:
        if not has_text:
            logger.warning("%s holds no text; pages that are pictures need OCR first", name)


class _Unreadable(Exception):  # noqa: N818  never leaves this module
    """Why a document cannot be read."""


@contextmanager
def _damage_named(kind: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (*kinds, *_DAMAGE) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _Unreadable(f"not a readable {kind} document: {reason}") from error


def _pdf_rows(name: str, data: bytes, documents: Documents) -> Iterator[dict[str, Any] | Unreadable]:
    """One row, or a row for each page; with a damaged page the whole document is unreadable, or that page."""
    from metaflow_hf.data.sources.pdf.extraction import DamagedError, PasswordNeededError, read_pages
    from metaflow_hf.data.sources.pdf.geometry import Page
    from metaflow_hf.data.sources.pdf.text import document_text, page_texts

    try:
        pdf = read_pages(data)
    except PasswordNeededError as error:
        raise _Unreadable("the PDF is encrypted and needs a password") from error
    except DamagedError as error:
        raise _Unreadable(f"not a readable PDF document: {error}") from error
    title, number_of_pages = _title(pdf.title), len(pdf.pages)
    pages = [page for page in pdf.pages if isinstance(page, Page)]
    damaged = {
        number: f"page {number + 1} of the PDF is damaged: {page}"
        for number, page in enumerate(pdf.pages)
        if not isinstance(page, Page)
    }
    pictures = [page.number + 1 for page in pages if page.has_pictures and not page.rows]
    if pictures and len(pictures) < number_of_pages:
        shown = ", ".join(map(str, pictures[:5])) + (", …" if len(pictures) > 5 else "")
        logger.warning(
            "%s: %d of %d pages are pictures without text and need OCR first: %s",
            name,
            len(pictures),
            number_of_pages,
            shown,
        )
    if documents == "whole":
        if damaged:
            raise _Unreadable("; ".join(damaged.values()))
        yield {"text": _storable(document_text(pages)), "title": title, "pages": number_of_pages, **_WHOLE}
        return
    texts = dict(zip((page.number for page in pages), page_texts(pages), strict=True))
    for number in range(number_of_pages):
        if number in damaged:
            yield Unreadable(damaged[number])
        else:
            text = _storable(texts[number])
            yield {"text": text, "title": title, "page": number + 1, "pages": number_of_pages}


def _docx_rows(_name: str, data: bytes, _documents: Documents) -> Iterator[dict[str, Any]]:
    import docx
    from docx.opc.exceptions import OpcError
    from lxml import etree

    from metaflow_hf.data.sources.word import word_text

    with _damage_named("Word (.docx)", OpcError, etree.LxmlError):
        document = docx.Document(io.BytesIO(data))
        text = word_text(document)
        title = _title(document.core_properties.title)
    yield {"text": _storable(text), "title": title, **_WHOLE}


def _html_rows(_name: str, data: bytes, _documents: Documents) -> Iterator[dict[str, Any]]:
    from lxml import etree

    from metaflow_hf.data.sources.markup import html_text

    with _damage_named("HTML", etree.LxmlError):
        text, title = html_text(data)
    yield {"text": _storable(text), "title": _title(title), **_WHOLE}


def _markdown_rows(_name: str, data: bytes, _documents: Documents) -> Iterator[dict[str, Any]]:
    """The source unchanged: models read and write it."""
    with _damage_named("Markdown"):
        text = data.decode("utf-8-sig")
    heading = next((line[2:] for line in text.splitlines() if line.startswith("# ")), None)
    yield {"text": text, "title": _title(heading), **_WHOLE}


def _title(text: str | None) -> str | None:
    return _storable(" ".join(str(text or "").split())) or None


def _storable(text: str) -> str:
    """Without the halves of characters that broken fonts map to: they have no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()


_WHOLE: Final[Mapping[str, int]] = {"part": 1, "parts": 1}
# By ending: what people call it, and what reads it.
PARSERS: Final[Mapping[str, tuple[str, Parse]]] = {
    ".pdf": ("pdf", _pdf_rows),
    ".docx": ("docx", _docx_rows),
    ".html": ("html", _html_rows),
    ".htm": ("html", _html_rows),
    ".xhtml": ("html", _html_rows),
    ".md": ("markdown", _markdown_rows),
    ".markdown": ("markdown", _markdown_rows),
}
