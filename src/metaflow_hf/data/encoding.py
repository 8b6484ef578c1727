"""Rows -> the lines of a block: validated, counted where they are skipped, never changed.

A line of JSON is kept byte for byte once it is known to be one valid object with text; a row of Python values
is encoded. What cannot be kept exactly is refused by row number and column, or skipped where that was asked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec

from metaflow_hf.data.manifest import Cursor, OnBadRow
from metaflow_hf.errors import BadRowError

# What JSON calls white space: a text of nothing else says nothing.
BLANKS: Final = " \t\r\n"
_LINE_BLANKS: Final = BLANKS.encode()


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
class EncodedRows:
    """The kept lines, without line ends; ``consumed[i]`` input rows were used up to and with line ``i``."""

    lines: Sequence[bytes]
    consumed: Sequence[int]
    total_consumed: int
    after: Callable[[int], Cursor]


class RowEncoder:
    """Turns input rows into lines, by the rules of one dataset."""

    def __init__(self, text_column: str, *, ascii_only: bool = False, on_bad_row: OnBadRow = "raise") -> None:
        self._text_column = text_column
        self._ascii_only = ascii_only
        self._on_bad_row = on_bad_row
        self._decode = msgspec.json.Decoder(dict[str, Any]).decode
        self._encode = msgspec.json.Encoder().encode

    def encode(self, batch: InputRows) -> EncodedRows:
        """Raises ``BadRowError`` naming file, row and column, unless bad rows are to be skipped."""
        lines: Sequence[bytes | None] | None = self._keep_plain_lines(batch.rows)
        if lines is None:
            first, name = batch.first_row, batch.name
            lines = [self.encode_row(row, name, first + number) for number, row in enumerate(batch.rows)]
        total = len(lines)
        if None not in lines:
            return EncodedRows(cast("Sequence[bytes]", lines), range(1, total + 1), total, batch.after)
        kept = [(line, number) for number, line in enumerate(lines, 1) if line is not None]
        return EncodedRows([line for line, _ in kept], [n for _, n in kept], total, batch.after)

    def encode_row(self, row: InputRow, name: str, number: int) -> bytes | None:
        """The line of one row, row ``number`` of ``name``; ``None`` for one to be skipped. Raises as ``encode``."""
        try:
            if isinstance(row, bytes):
                return self._keep_line(row)
            if isinstance(row, Unreadable):
                raise _Refused(row.reason)
            return self._encode_values(row)
        except _Refused as refusal:
            if self._on_bad_row == "skip":
                return None
            raise BadRowError(
                f"{name}: row {number} (line {number + 1}), {refusal}. Mend the row, or skip bad rows with "
                "on_bad_row='skip'."
            ) from refusal.__cause__

    def _keep_plain_lines(self, rows: Sequence[InputRow]) -> list[bytes] | None:
        """What nearly every batch of JSON lines is: one good object with text a line. ``None`` for any other."""
        if self._ascii_only or set(map(type, rows)) != {bytes}:
            return None
        lines = [row.strip(_LINE_BLANKS) for row in cast("Sequence[bytes]", rows)]
        column = self._text_column
        try:
            texts: list[Any] = [row.get(column) for row in map(self._decode, lines)]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if set(map(type, texts)) == {str} and all(texts) and not any(map(str.isspace, texts)):
            return lines
        return None

    def _keep_line(self, line: bytes) -> bytes | None:
        stripped = line.strip(_LINE_BLANKS)
        if not stripped:
            return None
        try:
            row = self._decode(stripped)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Refused(f"not a JSON object: {error}") from error
        return stripped if self._has_text(row) else None

    def _encode_values(self, row: Mapping[str, Any]) -> bytes | None:
        if not self._has_text(row):
            return None
        if not _PLAIN.issuperset(map(type, row.values())):
            for column, value in row.items():
                _refuse_bytes(value, column)
        try:
            return self._encode(row)
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise _Refused(f"column {self._culprit(row)!r} cannot be stored as JSON: {error}") from error

    def _has_text(self, row: Mapping[str, Any]) -> bool:
        text = row.get(self._text_column)
        if isinstance(text, str):
            if not text or (text[0] in BLANKS and not text.strip(BLANKS)):
                return False
            return not self._ascii_only or text.isascii()
        if text is None or text == []:
            return False
        if isinstance(text, list) and all(isinstance(m, dict) for m in text):
            return not self._ascii_only or self._encode(text).isascii()
        raise _Refused(f"column {self._text_column!r} holds {type(text).__name__} instead of text")

    def _culprit(self, row: Mapping[str, Any]) -> str:
        for column, value in row.items():
            try:
                self._encode({column: value})
            except (TypeError, ValueError, RecursionError, OverflowError):
                return str(column)
        return "?"


class _Refused(Exception):  # noqa: N818  never leaves this module
    """What is wrong with a row, without where it is."""


_PLAIN: Final = frozenset({str, int, float, bool, type(None)})


def _refuse_bytes(value: Any, column: str) -> None:
    # msgspec would write them as base64, which no reader could tell from text.
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise _Refused(f"column {column!r} holds bytes, which JSON cannot keep")
    if isinstance(value, (list, tuple, Mapping)):
        nested: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for item in nested:
            if type(item) not in _PLAIN:
                _refuse_bytes(item, column)
