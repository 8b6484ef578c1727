"""Files of which only some is read: rows from one number to another, or some members of an archive."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Final, Protocol

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.rows import AfterLine, InputLines, InputRow, InputRows, Unreadable

Batch = InputRows | InputLines


class SizedFile(Protocol):
    """A file of a source."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def open(self) -> BinaryIO: ...


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a configuration of a dataset says that its files are read.

    ``delimiter`` and ``columns`` are those of CSV; ``field`` names the list that holds the rows of a JSON file.
    """

    delimiter: str | None = None
    columns: tuple[str, ...] | None = None
    field: str | None = None


NO_OPTIONS: Final = ReadOptions()


@dataclass(frozen=True, slots=True)
class FileView:
    """A file as seen by a split.

    Args:
        file: The file itself.
        options: How its rows are read.
        members: Of an archive, the names of the members that are read; ``None`` reads all with rows.
        rows: The first row that is read, and the row behind the last; rows are counted with blank ones.
        share: How much of the file that is.

    """

    file: SizedFile
    options: ReadOptions = NO_OPTIONS
    members: tuple[str, ...] | None = None
    rows: tuple[int, int] | None = None
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return round(self.file.size * self.share)

    def open(self) -> BinaryIO:
        return self.file.open()


def options_of(file: object) -> ReadOptions:
    return file.options if isinstance(file, FileView) else NO_OPTIONS


def members_of(file: object) -> tuple[str, ...] | None:
    return file.members if isinstance(file, FileView) else None


def rows_of(file: object) -> tuple[int, int] | None:
    return file.rows if isinstance(file, FileView) else None


def is_row(item: InputRow) -> bool:
    """Whether `datasets` counts it as a row; it passes over blank lines of JSON and CSV."""
    return bool(item.strip()) if isinstance(item, bytes) else isinstance(item, Unreadable) or bool(item)


def between(batches: Iterator[Batch], first: int, stop: int) -> Iterator[Batch]:
    """Those rows of a file's batches that have numbers from ``first`` on and below ``stop``."""
    for batch in batches:
        # Members of an archive number their rows from 0; cursors count on.
        row = batch.after(0).row
        if row >= stop:
            return
        begin, end = max(first - row, 0), min(stop - row, _length(batch))
        if begin < end:
            yield batch if (begin, end) == (0, _length(batch)) else _part(batch, begin, end)


def _length(batch: Batch) -> int:
    return len(batch.ends) if isinstance(batch, InputLines) else len(batch.rows)


def _part(batch: Batch, begin: int, end: int) -> Batch:
    if isinstance(batch, InputRows):
        after = _AfterPart(batch.after, begin)
        return replace(batch, rows=batch.rows[begin:end], first_row=batch.first_row + begin, after=after)
    before = int(batch.ends[begin - 1]) if begin else 0
    ends = batch.ends[begin:end] - before
    position = batch.after(begin)
    return InputLines(
        batch.data[before : before + int(ends[-1])],
        ends,
        batch.name,
        batch.first_row + begin,
        AfterLine(position.file, position.row, position.offset, ends),
    )


@dataclass(frozen=True, slots=True)
class _AfterPart:
    """Cursors behind the rows of a batch whose first ``begin`` rows are left out."""

    after: Callable[[int], Cursor]
    begin: int

    def __call__(self, num_rows: int) -> Cursor:
        return self.after(self.begin + num_rows)
