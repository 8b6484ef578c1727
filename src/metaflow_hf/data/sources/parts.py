"""A list of files in parts that several processes read at once; together, in order, they are the rows of the source.

Local JSON lines and texts are cut at line ends, parquet between row groups; any other file is read by one process
from its beginning to its end, and a hub's file too, because only then its checksum is compared.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, cast

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.rows import InputLines, InputRows
from metaflow_hf.data.sources.compression import damage_named
from metaflow_hf.data.sources.files import FileSource, SourceFile
from metaflow_hf.data.sources.local import LocalFile
from metaflow_hf.data.sources.readers import read_jsonl, read_parquet, read_text, reader_for
from metaflow_hf.errors import IntegrityError

PART_BYTES: Final = 8 * 1024 * 1024
_LINES: Final = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".txt": read_text, ".text": read_text}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows from ``begin`` on, to the end of file number ``last_file``, or up to its byte or row ``stop``.

    The rows of a part with ``is_counted`` false are numbered from 0: nobody has counted those before them.
    """

    begin: Cursor
    last_file: int
    stop: int | None = None
    is_counted: bool = True


def split(source: FileSource, cursor: Cursor) -> Iterator[Part]:
    """All parts from ``cursor`` on, in order; each of about ``PART_BYTES``, or more where a file cannot be cut."""
    begin, size = cursor, 0
    for number in range(cursor.file, len(source.files)):
        file = source.files[number]
        if number > begin.file and (size >= PART_BYTES or _is_divisible(file)):
            yield Part(begin, number - 1)
            begin, size = Cursor(file=number), 0
        if _is_divisible(file):
            yield from _split_file(file, begin)
            begin = Cursor(file=number + 1)
        else:
            size += file.size
    if begin.file < len(source.files):
        yield Part(begin, len(source.files) - 1)


def read_part(source: FileSource, part: Part) -> Iterator[InputRows | InputLines]:
    """The rows of one part."""
    for number in range(part.begin.file, part.last_file + 1):
        file = source.files[number]
        begin = part.begin if number == part.begin.file else Cursor(file=number)
        if part.stop is None or number < part.last_file:
            yield from reader_for(file.name, documents=source.documents)(file, begin)
        elif file.name.lower().endswith(".parquet"):
            yield from read_parquet(file, begin, part.stop)
        else:
            yield from _LINES[_ending(file)](file, begin, part.stop)


def is_plain_copy(file: SourceFile) -> bool:
    """Whether the lines of a file lie in it as they are read."""
    return isinstance(file, LocalFile) and _ending(file) in (".jsonl", ".ndjson")


def _ending(file: SourceFile) -> str:
    return "." + file.name.lower().rpartition(".")[2]


def _is_divisible(file: SourceFile) -> bool:
    return isinstance(file, LocalFile) and (_ending(file) in _LINES or _ending(file) == ".parquet")


def _split_file(file: SourceFile, begin: Cursor) -> Iterator[Part]:
    number = begin.file
    try:
        if _ending(file) == ".parquet":
            for row in _row_group_ends(file):
                if row > begin.row:
                    yield Part(begin, number, row)
                    begin = Cursor(file=number, row=row)
            return
        is_counted = begin.row > 0 or begin.offset == 0
        for offset in _line_ends(file, begin.offset):
            yield Part(begin, number, offset, is_counted)
            begin, is_counted = Cursor(file=number, offset=offset), False
        yield Part(begin, number, is_counted=is_counted)
    except (OSError, IntegrityError):
        # Whoever reads the part says what is wrong, when its turn comes.
        yield Part(begin, number)


def _line_ends(file: SourceFile, offset: int) -> Iterator[int]:
    size = file.size
    with io.BufferedReader(cast("io.RawIOBase", file.open())) as stream:
        while offset + PART_BYTES < size:
            stream.seek(offset + PART_BYTES - 1)
            stream.readline()
            offset = stream.tell()
            if offset < size:
                yield offset


def _row_group_ends(file: SourceFile) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet

    ends, rows, size = [], 0, 0
    with file.open() as stream, damage_named(file.name, pa.ArrowInvalid):
        metadata = pa.parquet.ParquetFile(stream).metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            rows, size = rows + group.num_rows, size + group.total_byte_size
            if size >= PART_BYTES or number == metadata.num_row_groups - 1:
                ends.append(rows)
                size = 0
    return ends
