"""The rows of a slice such as `train[:10%]`, found in files by counting as `datasets` counts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.sources.compression import uncompressed_name
from metaflow_hf.data.sources.readers import num_parquet_rows, reader_for
from metaflow_hf.data.sources.splits import SplitPart, bounds
from metaflow_hf.data.sources.views import Batch, FileView, SizedFile, is_row
from metaflow_hf.errors import SelectionError


def cut(files: Sequence[SizedFile], part: SplitPart, *, where: str) -> list[SizedFile]:
    """Those files of a split, and those rows of them, that the part asks for.

    Blank lines are no rows. All files are read once to count them, unless they are parquet, whose footer says it.
    Raises ``SelectionError`` for a slice without rows.
    """
    if part.instruction is None:
        return list(files)
    counts = list(map(_num_rows, files))
    first, stop = bounds(part, sum(counts))
    chosen: list[SizedFile] = []
    before = 0
    for file, count in zip(files, counts, strict=True):
        begin, end = max(first - before, 0), min(stop - before, count)
        if begin < end:
            chosen.append(file if (begin, end) == (0, count) else _view(file, begin, end, count))
        before += count
    if not chosen:
        raise SelectionError(
            f"{where}: {part.instruction} holds no rows; split {part.split!r} has {before:,}."
        )
    return chosen


def _num_rows(file: SizedFile) -> int:
    if uncompressed_name(file.name).lower().endswith(".parquet"):
        return num_parquet_rows(file)
    return sum(sum(map(is_row, batch.rows)) for batch in _batches(file))


def _view(file: SizedFile, begin: int, end: int, count: int) -> FileView:
    view = file if isinstance(file, FileView) else FileView(file)
    return replace(view, rows=(_place(file, begin), _place(file, end)), share=(end - begin) / count)


def _place(file: SizedFile, row: int) -> int:
    """The number of a row where blank ones are counted too."""
    if uncompressed_name(file.name).lower().endswith(".parquet"):
        return row
    at = 0
    for batch in _batches(file):
        for item in batch.rows:
            if is_row(item):
                if row == 0:
                    return at
                row -= 1
            at += 1
    return at


def _batches(file: SizedFile) -> Iterator[Batch]:
    return reader_for(file.name)(file, Cursor())
