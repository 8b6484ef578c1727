"""One reader per file format: from a file and a cursor to rows, in bounded memory."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import BinaryIO, Final

import numpy as np

from metaflow_hf.data.manifest import Cursor, Documents
from metaflow_hf.data.rows import (
    LINE_FEED,
    AfterLine,
    AfterRow,
    Ends,
    InputLines,
    InputRow,
    InputRows,
    Unreadable,
    line_ends,
)
from metaflow_hf.data.sources.about import is_about
from metaflow_hf.data.sources.archives import (
    ARCHIVES,
    TAR,
    ZIP,
    Member,
    opened_archive,
    opened_tar,
    webdataset_rows,
)
from metaflow_hf.data.sources.arrow_files import BATCH_ROWS, arrow_rows, record_batches, sliced
from metaflow_hf.data.sources.compression import (
    COMPRESSIONS,
    READ_BYTES,
    OpenableFile,
    damage_named,
    open_content,
    open_seekable,
    uncompressed_name,
)
from metaflow_hf.data.sources.csv_files import csv_rows
from metaflow_hf.data.sources.documents import PARSERS, document_format, read_document
from metaflow_hf.data.sources.json_files import JsonShape, array_elements, json_shape, object_rows
from metaflow_hf.data.sources.views import between, members_of, options_of, rows_of
from metaflow_hf.errors import SelectionError

_BOM: Final = b"\xef\xbb\xbf"
_CARRIAGE_RETURN: Final = 13
# Files that describe a dataset and hold none of its rows.
_METADATA: Final = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "block_manifest.json"}
)


Batch = InputRows | InputLines
Reader = Callable[[OpenableFile, Cursor], Iterator[Batch]]


def reader_for(name: str, *, documents: Documents = "whole") -> Reader:
    """The reader for a file's ending (below that of a compression), which keeps to the rows of a ``FileView``.

    ``documents`` says what a row of a PDF is.

    Raises ``SelectionError`` for other endings.
    """
    ending = file_format(name)
    if ending is None:
        raise SelectionError(f"{name}: rows are read from {READABLE}.")
    if ending in PARSERS:
        return partial(_read, partial(read_document, documents=documents))
    return partial(_read, READERS[ending])


def _read(reader: Reader, file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    rows = rows_of(file)
    yield from reader(file, cursor) if rows is None else between(reader(file, cursor), *rows)


def file_format(name: str) -> str | None:
    """The ending of a readable file without its compression, or ``None``."""
    lowered = uncompressed_name(name.lower())
    return next((ending for ending in READERS if lowered.endswith(ending)), None)


def holds_rows(path: str) -> bool:
    """Whether a file holds rows by its name: it is no document, no archive of whatever may be in it, and does not
    merely describe a dataset.
    """
    describes = path.rpartition("/")[2] in _METADATA or is_about(path)
    return not describes and file_format(path) not in (None, *ARCHIVES) and document_format(path) is None


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
    """One row per line, without its end, which is a line feed, a carriage return or both; else as ``read_jsonl``.

    These are the ends that ``datasets`` and Python's text files know; no other character ends a line.
    """
    row = cursor.row
    for lines in read_jsonl(file, cursor, stop):
        texts, ends, after = lines.rows, lines.ends, lines.after
        if b"\r" in lines.data:
            texts, ends = _universal_lines(lines.data)
        assert isinstance(after, AfterLine)
        after = AfterLine(cursor.file, row, after.offset, ends)
        yield InputRows(list(map(_text_row, texts)), lines.name, row, after)
        row += len(ends)


def _universal_lines(data: bytes) -> tuple[list[bytes], Ends]:
    """The lines of ``data``, which ends with a line feed, and where each ends."""
    codes = np.frombuffer(data, np.uint8)
    is_end = codes == LINE_FEED
    is_end[:-1] |= (codes[:-1] == _CARRIAGE_RETURN) & (codes[1:] != LINE_FEED)
    texts = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    return texts, np.flatnonzero(is_end) + 1


def read_json(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """A JSON array, element by element; objects that go over several lines, or one that wraps a list, as a whole; or
    JSON lines, which many files of this ending hold.
    """
    field = options_of(file).field
    with open_content(file) as stream:
        shape = JsonShape.OBJECTS if field else json_shape(stream)
    if shape is JsonShape.LINES:
        yield from read_jsonl(file, cursor)
    elif shape is JsonShape.ARRAY:
        yield from _read_rows(file, cursor, array_elements)
    else:
        yield from _read_rows(file, cursor, partial(object_rows, field=field))


def read_csv(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """Cells stay text; the first line names the columns."""
    options = options_of(file)
    delimiter = options.delimiter or ("\t" if ".tsv" in file.name.lower() else ",")
    yield from _read_rows(file, cursor, partial(csv_rows, delimiter=delimiter, columns=options.columns))


def read_parquet(file: OpenableFile, cursor: Cursor, stop: int | None = None) -> Iterator[Batch]:
    """Row group by row group; goes on in the cursor's row group. Row ``stop``, the end of one, is the end."""
    import pyarrow as pa
    import pyarrow.parquet

    with open_seekable(file) as stream, damage_named(file.name, pa.ArrowInvalid):
        parquet = pa.parquet.ParquetFile(stream)
        first = 0
        for group in range(parquet.num_row_groups):
            if stop is not None and first >= stop:
                return
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows > cursor.row:
                batches = parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], use_threads=False)
                yield from arrow_rows(batches, file.name, cursor, first)
            first += rows


def num_parquet_rows(file: OpenableFile) -> int:
    """What the footer of a parquet file says."""
    import pyarrow as pa
    import pyarrow.parquet

    with open_seekable(file) as stream, damage_named(file.name, pa.ArrowInvalid):
        return int(pa.parquet.ParquetFile(stream).metadata.num_rows)


def read_arrow(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """The record batches of an Arrow stream, as ``datasets`` saves them, or of an Arrow or Feather file."""
    import pyarrow as pa

    with open_seekable(file) as stream, damage_named(file.name, pa.ArrowInvalid):
        yield from arrow_rows(sliced(record_batches(stream)), file.name, cursor, 0)


def read_zip(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """The files with rows in an archive, in the order of their names.

    Raises ``SelectionError`` when there are none, or when they are encrypted.
    """
    with opened_archive(file) as members:
        yield from _read_members(_chosen(file, members), cursor)


def read_tar(file: OpenableFile, cursor: Cursor) -> Iterator[Batch]:
    """The files with rows in an archive, as of a zip; without such the samples of a webdataset archive."""
    with opened_tar(file) as members:
        if any(is_table(member.name) for member in members):
            yield from _read_members(_chosen(file, members), cursor)
            return
        rows = islice(webdataset_rows(members, file.name), cursor.row, None)
        yield from _in_batches(rows, file.name, cursor)


def is_table(name: str) -> bool:
    """Whether a member of a tar archive is a file of rows, not a part of one webdataset sample."""
    return holds_rows(name) and file_format(name) not in (".json", ".txt", ".text")


def _chosen(file: OpenableFile, members: list[Member]) -> list[Member]:
    names = members_of(file)
    chosen = [
        member for member in members if (holds_rows(member.name) if names is None else member.path in names)
    ]
    if not chosen:
        raise SelectionError(f"{file.name} holds no file with rows; readable are {READABLE}.")
    return chosen


def _read_members(members: list[Member], cursor: Cursor) -> Iterator[Batch]:
    first = 0
    for member in members:
        for batch in reader_for(member.name)(member, Cursor()):
            rows, skip = batch.rows, max(cursor.row - first, 0)
            if skip < len(rows):
                after = AfterRow(cursor.file, first + skip)
                yield InputRows(rows[skip:], batch.name, batch.first_row + skip, after)
            first += len(rows)


READERS: Final[dict[str, Reader]] = {
    ".jsonl": read_jsonl,
    ".jsonlines": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".text": read_text,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    **dict.fromkeys(PARSERS, read_document),
    ZIP: read_zip,
    TAR: read_tar,
}
# For people who gave something else.
READABLE: Final = f"{', '.join(READERS)}, also compressed ({', '.join(COMPRESSIONS)})"


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
        yield from _in_batches(islice(parse(stream, file.name), cursor.row, None), file.name, cursor)


def _in_batches(rows: Iterator[InputRow], name: str, cursor: Cursor) -> Iterator[InputRows]:
    first = cursor.row
    while batch := list(islice(rows, BATCH_ROWS)):
        yield InputRows(batch, name, first, AfterRow(cursor.file, first))
        first += len(batch)
