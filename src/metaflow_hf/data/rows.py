"""Rows on their way from a source to a block: as they were read, and as the lines that will be stored.

All of it can be sent to another process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from metaflow_hf.data.manifest import Cursor

LINE_FEED: Final = 10

Ends = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of a row that its file's reader could not read, and why."""

    reason: str


InputRow = bytes | Mapping[str, Any] | Unreadable


@dataclass(frozen=True, slots=True)
class InputRows:
    """Consecutive rows of one source file: lines of JSON as bytes, rows of Python values, or unreadable ones.

    ``name`` and ``first_row`` say where they are, for people; ``after(n)`` is the cursor behind the first ``n``.
    """

    rows: Sequence[InputRow]
    name: str
    first_row: int
    after: Callable[[int], Cursor]


@dataclass(frozen=True, slots=True)
class InputLines:
    """As ``InputRows``, for consecutive lines of JSON in one piece: line ``i`` ends, with its feed, at ``ends[i]``."""

    data: bytes
    ends: Ends
    name: str
    first_row: int
    after: Callable[[int], Cursor]

    @property
    def rows(self) -> list[bytes]:
        """The lines without their line feeds."""
        return self.data.split(b"\n")[:-1]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """The kept lines in one piece, each with its line feed: line ``i`` ends at ``ends[i]``.

    ``consumed[i]`` input rows, counted from the batch's first, were used up to and with line ``i``. ``left_out`` are
    the columns that could not be stored, with the reason, unless an earlier batch of the same encoder named them.
    """

    data: bytes | bytearray
    ends: Ends
    consumed: Sequence[int]
    total_consumed: int
    after: Callable[[int], Cursor]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, lines: Sequence[bytes], consumed: Sequence[int], total: int, after: Callable[[int], Cursor]
    ) -> Self:
        """Of lines without their line feeds."""
        lengths = np.fromiter(map(len, lines), np.int64, len(lines))
        return cls(b"\n".join([*lines, b""]), np.cumsum(lengths + 1), consumed, total, after)

    def first(self, num_lines: int) -> Self:
        """Only the first lines, with the input rows used for them."""
        ends, consumed = self.ends[:num_lines], self.consumed[:num_lines]
        data = self.data[: int(ends[-1])] if num_lines else b""
        return replace(
            self, data=data, ends=ends, consumed=consumed, total_consumed=consumed[-1] if num_lines else 0
        )


@dataclass(frozen=True, slots=True)
class AfterRow:
    """Cursors behind rows that are found again by counting."""

    file: int
    row: int

    def __call__(self, num_rows: int) -> Cursor:
        return Cursor(file=self.file, row=self.row + num_rows)


@dataclass(frozen=True, slots=True)
class AfterLine:
    """Cursors behind lines that are found again at their byte."""

    file: int
    row: int
    offset: int
    ends: Ends

    def __call__(self, num_rows: int) -> Cursor:
        used = int(self.ends[num_rows - 1]) if num_rows else 0
        return Cursor(file=self.file, row=self.row + num_rows, offset=self.offset + used)


def line_ends(data: bytes) -> Ends:
    """Behind each line feed of ``data``."""
    ends: Ends = np.flatnonzero(np.frombuffer(data, np.uint8) == LINE_FEED)
    ends += 1
    return ends
