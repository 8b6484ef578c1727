"""The files of a source in parts that several processes read at once.

Together, in order, the parts are the rows of the source. Local JSON Lines and text files are cut at line ends, local
parquet files between row groups, and local CSV files where records probably begin (``csv_ranges``). Any other file is one part, or a part together with its neighbours. So is a
file of a hub, because its checksum is compared only when it is read from its beginning to its end.
"""

import io
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Final, cast

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.rows import InputLines, InputRows
from metaflow_hf.data.sources.compression import damage_named
from metaflow_hf.data.sources.csv_ranges import CsvRange, csv_cuts
from metaflow_hf.data.sources.files import FileSource, SourceFile
from metaflow_hf.data.sources.local import LocalFile
from metaflow_hf.data.sources.readers import read_csv, read_jsonl, read_parquet, read_text
from metaflow_hf.errors import IntegrityError

# Large enough that a process has work while the builder commits a block.
PART_BYTES: Final = 8 * 1024 * 1024
# A byte of parquet, CSV or a compressed file takes at least this many times as long as one of JSON Lines.
_OTHER_WORK: Final = 3
_CSV: Final = (".csv", ".tsv")
_LINES: Final = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".txt": read_text, ".text": read_text}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows from ``begin`` to the end of file number ``last_file``, or to its byte or row ``stop``.

    The rows of a part with ``is_counted`` false are numbered from 0, because the rows before it are not counted yet.
    ``size_bytes`` is about the size of the part in the file. ``csv_start`` is the byte at which a range of a CSV file
    begins; its rows may be used only if all parts of the file before it were read without an error.
    """

    begin: Cursor
    last_file: int
    stop: int | None = None
    is_counted: bool = True
    size_bytes: int = 0
    csv_start: int | None = None


def remaining_work(source: FileSource, cursor: Cursor) -> int:
    """How many bytes of JSON Lines take about as long as everything from ``cursor`` on.

    Files that cannot be read count as empty.
    """
    sizes = (
        _size(file) * (1 if _ending(file) in _LINES else _OTHER_WORK) for file in source.files[cursor.file :]
    )
    return max(sum(sizes) - cursor.offset, 0)


def split(source: FileSource, cursor: Cursor) -> Iterator[Part]:
    """All parts from ``cursor`` on, in order; each of about ``PART_BYTES``, or more where a file cannot be cut."""
    begin, size = cursor, 0
    for number in range(cursor.file, len(source.files)):
        file = source.files[number]
        if number > begin.file and (size >= PART_BYTES or _is_divisible(file)):
            yield Part(begin, number - 1, size_bytes=size)
            begin, size = Cursor(file=number), 0
        if _is_divisible(file):
            yield from _split_file(file, begin)
            begin = Cursor(file=number + 1)
        else:
            size += _size(file)
    if begin.file < len(source.files):
        yield Part(begin, len(source.files) - 1, size_bytes=size)


def read_part(source: FileSource, part: Part) -> Generator[InputRows | InputLines]:
    """The rows of one part. Raises what the readers of the files raise."""
    if part.stop is None:
        yield from replace(source, files=source.files[: part.last_file + 1]).batches(part.begin)
        return
    file = source.files[part.last_file]
    if part.csv_start is not None:
        yield from read_csv(CsvRange(file, part.csv_start, part.stop), part.begin)
        return
    read = _LINES.get(_ending(file), read_parquet)
    yield from read(file, part.begin, part.stop)


def by_file(part: Part) -> Iterator[Part]:
    """The rows of ``part`` that each of its files holds."""
    for number in range(part.begin.file, part.last_file):
        yield Part(part.begin if number == part.begin.file else Cursor(file=number), number)
    begin = part.begin if part.begin.file == part.last_file else Cursor(file=part.last_file)
    yield replace(part, begin=begin)


def is_plain_copy(file: SourceFile) -> bool:
    """Whether the lines of a file are stored in it as they are read."""
    return isinstance(file, LocalFile) and _ending(file) in (".jsonl", ".ndjson")


def _size(file: SourceFile) -> int:
    try:
        return file.size
    except OSError:
        # The process that reads the file raises the error.
        return 0


def _ending(file: SourceFile) -> str:
    return "." + file.name.lower().rpartition(".")[2]


def _is_divisible(file: SourceFile) -> bool:
    return isinstance(file, LocalFile) and _ending(file) in (*_LINES, *_CSV, ".parquet")


def _split_file(file: SourceFile, begin: Cursor) -> Iterator[Part]:
    number = begin.file
    try:
        if _ending(file) == ".parquet":
            for row, size in _row_group_ends(file):
                if row > begin.row:
                    yield Part(begin, number, row, size_bytes=size)
                    begin = Cursor(file=number, row=row)
            return
        if _ending(file) in _CSV:
            yield from _split_csv(file, begin)
            return
        is_counted = begin.row > 0 or begin.offset == 0
        for offset in _line_ends(file, begin.offset):
            yield Part(begin, number, offset, is_counted, offset - begin.offset)
            begin, is_counted = Cursor(file=number, offset=offset), False
        yield Part(begin, number, is_counted=is_counted, size_bytes=file.size - begin.offset)
    except (OSError, IntegrityError):
        # The process that reads the part raises the error, behind the rows before it.
        yield Part(begin, number)


def _split_csv(file: SourceFile, begin: Cursor) -> Iterator[Part]:
    number, start = begin.file, 0
    # A row within the file is only found by counting from its beginning.
    cuts = csv_cuts(file, PART_BYTES // 2) if begin.row == 0 else ()
    size = file.size
    for cut in cuts:
        if cut < size:
            yield Part(Cursor(file=number), number, cut, start == 0, cut - start, csv_start=start)
            start = cut
    if start:
        yield Part(Cursor(file=number), number, size, False, size - start, csv_start=start)
    else:
        yield Part(begin, number, size_bytes=size)


def _line_ends(file: SourceFile, offset: int) -> Iterator[int]:
    size = file.size
    with io.BufferedReader(cast("io.RawIOBase", file.open())) as stream:
        while offset + PART_BYTES < size:
            stream.seek(offset + PART_BYTES - 1)
            stream.readline()
            offset = stream.tell()
            if offset < size:
                yield offset


def _row_group_ends(file: SourceFile) -> list[tuple[int, int]]:
    """The rows at which parts end, each with the part's size in bytes."""
    import pyarrow as pa
    import pyarrow.parquet

    ends, rows, size = [], 0, 0
    with file.open() as stream, damage_named(file.name, pa.ArrowInvalid):
        metadata = pa.parquet.ParquetFile(stream).metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            rows, size = rows + group.num_rows, size + group.total_byte_size
            # Rows of parquet take several times as long as lines of JSON.
            if size >= PART_BYTES // 2 or number == metadata.num_row_groups - 1:
                ends.append((rows, size))
                size = 0
    return ends
