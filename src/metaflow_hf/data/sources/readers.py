"""One reader per file format: from a file and a cursor to rows, in bounded memory."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Final

from metaflow_hf.data.manifest import Cursor, Documents
from metaflow_hf.data.rows import AfterLine, AfterRow, InputLines, InputRow, InputRows, Unreadable, line_ends
from metaflow_hf.data.sources.archives import ARCHIVE, opened_archive
from metaflow_hf.data.sources.compression import (
    COMPRESSIONS,
    READ_BYTES,
    OpenableFile,
    damage_named,
    open_content,
)
from metaflow_hf.data.sources.documents import PARSERS, document_format, read_document
from metaflow_hf.errors import ConfigError, SelectionError

BATCH_ROWS: Final = 1000
_BOM: Final = b"\xef\xbb\xbf"
_ARROW_FILE: Final = b"ARROW1"
# Files that describe a dataset and hold none of its rows.
_METADATA: Final = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "block_manifest.json"}
)


Batch = InputRows | InputLines
Reader = Callable[[OpenableFile, Cursor], Iterator[Batch]]


def reader_for(name: str, *, documents: Documents = "whole") -> Reader:
    """The reader for a file's ending (below ``.gz`` or ``.zst``); ``documents`` says what a row of a PDF is.

    Raises ``SelectionError`` for other endings.
    """
    ending = file_format(name)
    if ending is None:
        raise SelectionError(f"{name}: rows are read from {READABLE}.")
    if ending in PARSERS:
        return partial(read_document, documents=documents)
    return READERS[ending]


def file_format(name: str) -> str | None:
    """The ending of a readable file without its compression, or ``None``."""
    lowered = name.lower()
    for compression in COMPRESSIONS:
        lowered = lowered.removesuffix(compression)
    return next((ending for ending in READERS if lowered.endswith(ending)), None)


def holds_rows(path: str) -> bool:
    """Whether a file holds rows by its name: it is no document, no archive of whatever may be in it, and does not
    merely describe a dataset.
    """
    is_metadata = path.rpartition("/")[2] in _METADATA
    return not is_metadata and file_format(path) not in (None, ARCHIVE) and document_format(path) is None


def read_jsonl(file: OpenableFile, cursor: Cursor, stop: int | None = None) -> Iterator[InputLines]:
    """JSON lines as they are; goes on at the cursor's byte. Byte ``stop``, behind a line feed, is the end."""
    row, offset = cursor.row, cursor.offset
    with open_content(file, offset) as stream:
        if offset == 0 and stream.peek(len(_BOM)).startswith(_BOM):
            offset = len(stream.read(len(_BOM)))
        for data in _whole_lines(stream, None if stop is None else stop - offset):
            ends = line_ends(data)
            yield InputLines(data, ends, file.name, row, AfterLine(cursor.file, row, offset, ends))
            row += len(ends)
            offset += len(data)


def read_text(file: OpenableFile, cursor: Cursor, stop: int | None = None) -> Iterator[Batch]:
    """One row per line, split at line feeds only, the text unchanged; otherwise as ``read_jsonl``."""
    for lines in read_jsonl(file, cursor, stop):
        yield InputRows(list(map(_text_row, lines.rows)), lines.name, lines.first_row, lines.after)


def read_json(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """A JSON array, element by element; or JSON lines, which many files of this ending hold."""
    with open_content(file) as stream:
        first = stream.read(READ_BYTES).removeprefix(_BOM).lstrip()[:1]
    if first == b"[":
        yield from _read_rows(file, cursor, _array_elements)
    else:
        yield from read_jsonl(file, cursor)


def read_csv(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """Cells stay text; the first line names the columns."""
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    yield from _read_rows(file, cursor, lambda stream, name: _csv_rows(stream, name, delimiter))


def read_parquet(file: OpenableFile, cursor: Cursor, stop: int | None = None) -> Iterator[Batch]:
    """Row group by row group; goes on in the cursor's row group. Row ``stop``, the end of one, is the end."""
    import pyarrow as pa
    import pyarrow.parquet

    with file.open() as stream, damage_named(file.name, pa.ArrowInvalid):
        parquet = pa.parquet.ParquetFile(stream)
        first = 0
        for group in range(parquet.num_row_groups):
            if stop is not None and first >= stop:
                return
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows > cursor.row:
                batches = parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], use_threads=False)
                yield from _arrow_rows(batches, file.name, cursor, first)
            first += rows


def read_arrow(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """The record batches of an Arrow stream, as ``datasets`` saves them, or of an Arrow file."""
    import pyarrow as pa

    with file.open() as stream, damage_named(file.name, pa.ArrowInvalid):
        batches = (
            batch.slice(at, BATCH_ROWS)
            for batch in _record_batches(stream)
            for at in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _arrow_rows(batches, file.name, cursor, 0)


def read_zip(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """The files with rows in an archive, in the order of their names.

    Raises ``SelectionError`` when there are none, or when they are encrypted.
    """
    first = 0
    with opened_archive(file) as members:
        chosen = [member for member in members if holds_rows(member.name)]
        if not chosen:
            raise SelectionError(f"{file.name} holds no file with rows; readable are {READABLE}.")
        for member in chosen:
            for batch in reader_for(member.name)(member, Cursor()):
                rows, skip = batch.rows, max(cursor.row - first, 0)
                if skip < len(rows):
                    after = AfterRow(cursor.file, first + skip)
                    yield InputRows(rows[skip:], batch.name, batch.first_row + skip, after)
                first += len(rows)


READERS: Final[dict[str, Reader]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".text": read_text,
    ".arrow": read_arrow,
    **dict.fromkeys(PARSERS, read_document),
    ARCHIVE: read_zip,
}
# For people who gave something else.
READABLE: Final = f"{', '.join(READERS)}, also compressed ({', '.join(COMPRESSIONS)})"


def _record_batches(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.ipc

    magic = stream.read(len(_ARROW_FILE))
    stream.seek(0)
    if magic == _ARROW_FILE:
        with pyarrow.ipc.open_file(stream) as reader:
            yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        with pyarrow.ipc.open_stream(stream) as reader:
            yield from reader


def _whole_lines(stream: io.BufferedReader, left: int | None) -> Iterator[bytes]:
    """All of the stream, or its first ``left`` bytes, in pieces that end with a line feed."""
    while data := stream.read(READ_BYTES if left is None else min(READ_BYTES, left)):
        if not data.endswith(b"\n"):
            data = b"".join([data, stream.readline()])
        if not data.endswith(b"\n"):
            # The last line of the file lacks its line feed.
            data += b"\n"
        left = None if left is None else left - len(data)
        yield data


def _text_row(line: bytes) -> InputRow:
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError as error:
        return Unreadable(f"column 'text' is not UTF-8: {error.reason} at byte {error.start}")


def _read_rows(
    file: OpenableFile, cursor: Cursor, parse: Callable[[BinaryIO, str], Iterator[InputRow]]
) -> Iterator[InputRows]:
    """For formats without a place to go on at: rows before the cursor are read again and dropped."""
    with open_content(file) as stream:
        rows = islice(parse(stream, file.name), cursor.row, None)
        first = cursor.row
        while batch := list(islice(rows, BATCH_ROWS)):
            yield InputRows(batch, file.name, first, AfterRow(cursor.file, first))
            first += len(batch)


def _array_elements(stream: BinaryIO, name: str) -> Iterator[InputRow]:
    """The text of each element of a JSON array as a line of its own; read in pieces, each element whole."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _scan_array(text, name)


def _scan_array(text: io.TextIOWrapper, name: str) -> Iterator[InputRow]:
    scan = json.JSONDecoder().raw_decode
    buffer, size = text.read(READ_BYTES), READ_BYTES
    at = _skip_blanks(buffer, 0) + 1
    wants_comma = False
    while True:
        at = _skip_blanks(buffer, at)
        if buffer[at : at + 1] == "]":
            _check_nothing_follows(buffer[at + 1 :], text, name)
            return
        try:
            start = _skip_comma(buffer, at) if wants_comma else at
            _, end = scan(buffer, start)
        except RecursionError as error:
            raise SelectionError(
                f"{name}: an element nests too deep near {buffer[at : at + 40]!r}."
            ) from error
        except json.JSONDecodeError as error:
            more = text.read(size)
            if not more:
                raise SelectionError(
                    f"{name}: not a complete JSON array, or not JSON at all: {error.msg} near "
                    f"{buffer[at : at + 40]!r}."
                ) from error
            # An element larger than what was read: read as much again, so that large ones cost no more.
            buffer, at, size = buffer[at:] + more, 0, size * 2
            continue
        # Outside of strings, where none may stand, a line end is only white space.
        yield buffer[start:end].replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogateescape")
        at, size, wants_comma = end, READ_BYTES, True
        if at > READ_BYTES:
            buffer, at = buffer[at:] + text.read(READ_BYTES), 0


def _check_nothing_follows(rest: str, text: io.TextIOWrapper, name: str) -> None:
    while not rest.strip(" \t\r\n"):
        rest = text.read(READ_BYTES)
        if not rest:
            return
    raise SelectionError(f"{name}: more follows behind the array: {rest.lstrip()[:40]!r}.")


def _skip_comma(text: str, at: int) -> int:
    if text[at : at + 1] != ",":
        raise json.JSONDecodeError("',' or ']' expected", text, at)
    return _skip_blanks(text, at + 1)


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at


def _csv_rows(stream: BinaryIO, name: str, delimiter: str) -> Iterator[InputRow]:
    # The module's own limit of 128 KiB a cell guards nothing here, and texts are longer.
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if len(set(header)) != len(header):
                raise ConfigError(f"{name}: two columns have the same name: {', '.join(header)}.")
            for cells in lines:
                yield _csv_row(header, cells)
        except csv.Error as error:
            raise SelectionError(f"{name}, line {lines.line_num}: not CSV: {error}.") from error


def _csv_row(header: list[str], cells: list[str]) -> InputRow:
    if not cells:
        return {}
    if len(cells) != len(header):
        return Unreadable(f"{len(cells)} cells, but the header names {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _arrow_rows(batches: Iterator[Any], name: str, cursor: Cursor, first: int) -> Iterator[InputRows]:
    for batch in batches:
        skip = min(max(cursor.row - first, 0), batch.num_rows)
        if skip < batch.num_rows:
            rows = batch.slice(skip).to_pylist()
            yield InputRows(rows, name, first + skip, AfterRow(cursor.file, first + skip))
        first += batch.num_rows
