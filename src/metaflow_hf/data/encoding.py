"""Rows -> the lines of a block: validated, counted where they are skipped, never changed.

A line of JSON is kept byte for byte once it is known to be one valid object with text; a row of Python values is
encoded, after values that JSON has no type for were converted (see ``json_values``). A text that cannot be kept
exactly is refused by row number and column, or its row is skipped where that was asked. Any other column that cannot
be kept is left out of its row, and reported once.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress, count
from operator import itemgetter
from typing import Any, Final, cast

import msgspec
import numpy as np

from metaflow_hf.data.formats import DetectedFormat, RowProblem
from metaflow_hf.data.formats.examples import contents
from metaflow_hf.data.json_values import NotStorable, json_value
from metaflow_hf.data.line_texts import LineTexts
from metaflow_hf.data.manifest import OnBadRow
from metaflow_hf.data.rows import (
    AfterLine,
    EncodedRows,
    Ends,
    InputLines,
    InputRow,
    InputRows,
    Unreadable,
    line_ends,
)
from metaflow_hf.errors import BadRowError

__all__ = ["BLANKS", "EncodedRows", "InputLines", "InputRow", "InputRows", "RowEncoder", "Unreadable"]

# What JSON calls white space: a text of nothing else says nothing.
BLANKS: Final = " \t\r\n"
_LINE_BLANKS: Final = BLANKS.encode()
_OPENING, _CLOSING = ord("{"), ord("}")
# About more than this is not encoded at once: rows of that size take their time anyway. Told by every 16th text.
_MANY_CHARACTERS: Final = 4 * 1024 * 1024
_TOLD_BY: Final = 16
# What the encoder writes as it must be; NaN and infinities as null.
_PLAIN: Final = frozenset({str, int, float, bool, type(None)})
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NOT_ENCODABLE: Final = (TypeError, ValueError, RecursionError, OverflowError)


class RowEncoder:
    """Turns input rows into lines, by the rules of one dataset.

    Args:
        text_column: The column that decides which rows are blank; ``None`` keeps all rows that have a value.
        form: The format of the rows, which decides instead where it is not plain text.
        ascii_only: Skip rows whose text is not ASCII.
        on_bad_row: Whether a row whose text cannot be kept is an error or skipped.
        keep_columns: The columns to store beside those that are trained; ``None`` stores all that JSON can hold.

    """

    def __init__(
        self,
        text_column: str | None,
        *,
        form: DetectedFormat | None = None,
        ascii_only: bool = False,
        on_bad_row: OnBadRow = "raise",
        keep_columns: Collection[str] | None = None,
    ) -> None:
        self._text_column = text_column
        # Rows of other formats than text are read one by one.
        self._form = form if form is not None and form.name != "text" else None
        self._ascii_only = ascii_only
        self._on_bad_row = on_bad_row
        self._trained = frozenset({text_column} if self._form is None else self._form.columns.values())
        self._keep = None if keep_columns is None else frozenset(keep_columns) | self._trained
        self._decode = msgspec.json.Decoder(dict[str, Any]).decode
        self._decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
        self._decode_raw_lines = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode_lines
        self._texts_of = LineTexts(text_column or "")
        encoder = msgspec.json.Encoder()
        self._encode, self._encode_lines = encoder.encode, encoder.encode_lines
        self.append_plain = _appender(text_column, encoder.encode_into) if self._form is None else _no_line
        # The columns that could not be stored so far, and why.
        self.left_out: dict[str, str] = {}

    def encode(self, batch: InputRows | InputLines) -> EncodedRows:
        """Raises ``BadRowError`` naming file, row and column, unless bad rows are to be skipped."""
        num_told = len(self.left_out)
        encoded = self._encode_batch(batch)
        if len(self.left_out) == num_told:
            return encoded
        return replace(encoded, left_out=dict(list(self.left_out.items())[num_told:]))

    def _encode_batch(self, batch: InputRows | InputLines) -> EncodedRows:
        kept = None
        if self._form is None:
            kept = (
                self._keep_good_lines(batch)
                if isinstance(batch, InputLines)
                else self._encode_plain_rows(batch)
            )
        if kept is not None:
            return kept
        first, name, is_line = batch.first_row, batch.name, isinstance(batch.after, AfterLine)
        lines = [
            self.encode_row(row, name, first + number, is_line=is_line)
            for number, row in enumerate(batch.rows)
        ]
        return _only_kept(lines, [line is not None for line in lines], batch)

    def encode_row(self, row: InputRow, name: str, number: int, *, is_line: bool = False) -> bytes | None:
        """The line of one row, row ``number`` of ``name``; ``None`` for one to be skipped. Raises as ``encode``.

        ``is_line`` says that each line of ``name`` is a row.
        """
        try:
            if isinstance(row, bytes):
                return self._keep_line(row)
            if isinstance(row, Unreadable):
                raise _Refused(row.reason)
            return self._encode_values(row)
        except _Refused as refusal:
            if self._on_bad_row == "skip":
                return None
            where = f"line {number + 1}" if is_line else "counted from 0"
            raise BadRowError(
                f"{name}: row {number} ({where}), {refusal}. Repair the row, or skip bad rows with "
                "on_bad_row='skip'."
            ) from refusal.__cause__

    def plain_lines(self, rows: Sequence[InputRow]) -> bytes | None:
        """The lines of rows that are all what most are (see ``append_plain``), else ``None``.

        All at once, which is several times faster than row by row.
        """
        if self._form is not None or self._ascii_only or self._text_column is None:
            return None
        if set(map(type, rows)) != {dict}:
            return None
        try:
            texts = list(map(itemgetter(self._text_column), cast("Sequence[dict[str, Any]]", rows)))
        except KeyError:
            return None
        if not self._are_texts(texts) or sum(map(len, texts[::_TOLD_BY])) > _MANY_CHARACTERS // _TOLD_BY:
            return None
        values = chain.from_iterable(map(dict.values, cast("Sequence[dict[str, Any]]", rows)))
        if not _PLAIN.issuperset(map(type, values)):
            return None
        try:
            return self._encode_lines(rows)
        except (ValueError, OverflowError):
            # Refused by its number and column, on the way of single rows.
            return None

    def _encode_plain_rows(self, batch: InputRows) -> EncodedRows | None:
        rows: Sequence[InputRow] = batch.rows
        if self._keep is not None:
            rows = [self._chosen(row) if isinstance(row, Mapping) else row for row in rows]
        data = self.plain_lines(rows)
        return None if data is None else _all_kept(data, line_ends(data), batch)

    def _keep_good_lines(self, batch: InputLines) -> EncodedRows | None:
        """What nearly every batch of lines is: one good object a line, seldom one without text. ``None`` for others.

        All objects are decoded at once, which is several times faster than line by line.
        """
        data = batch.data.replace(b"\r\n", b"\n") if b"\r" in batch.data else batch.data
        ends = batch.ends if data is batch.data else line_ends(data)
        if self._text_column is None or not len(ends) or not _is_framed(data, ends):
            return None
        try:
            texts = self._texts_of(data)
            if len(texts) != len(ends):
                return None
            if self._keep is not None:
                data = self._encode_lines(list(map(self._chosen, self._decode_raw_lines(data))))
                ends = line_ends(data)
        except _NOT_JSON:
            return None
        if self._are_texts(texts):
            return _all_kept(data, ends, batch)
        try:
            keep = list(map(self._has_text, texts))
        except _Refused:
            return None
        return _only_kept(data.split(b"\n"), keep, batch)

    def _chosen(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row that are to be stored."""
        assert self._keep is not None
        return {column: value for column, value in row.items() if column in self._keep}

    def _are_texts(self, texts: list[Any]) -> bool:
        return (
            set(map(type, texts)) == {str}
            and all(texts)
            and not any(map(str.isspace, texts))
            and (not self._ascii_only or all(map(str.isascii, texts)))
        )

    def _keep_line(self, line: bytes) -> bytes | None:
        stripped = line.strip(_LINE_BLANKS)
        if not stripped:
            return None
        try:
            row = self._decode(stripped)
        except _NOT_JSON as error:
            return self._encode_values(_row_of_python(stripped, error))
        if not self._is_wanted(row):
            return None
        return stripped if self._keep is None else self._encode(self._chosen(self._decode_raw(stripped)))

    def _encode_values(self, row: Mapping[str, Any]) -> bytes | None:
        if self._keep is not None:
            row = self._chosen(row)
        if not _PLAIN.issuperset(map(type, row.values())):
            row = self._converted(row)
        if not self._is_wanted(row):
            return None
        try:
            return self._encode(row)
        except _NOT_ENCODABLE:
            return self._encode(self._encodable(row))

    def _converted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row without what JSON has no type for."""
        values: dict[str, Any] = {}
        for column, value in row.items():
            try:
                values[column] = json_value(value)
            except NotStorable as error:
                self._leave_out(column, str(error))
            except RecursionError:
                self._leave_out(column, "values that nest too deep")
        return values

    def _encodable(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row without the columns that the encoder refuses."""
        values: dict[str, Any] = {}
        for column, value in row.items():
            try:
                self._encode({column: value})
            except _NOT_ENCODABLE as error:
                self._leave_out(str(column), _reason(value, error))
            else:
                values[column] = value
        return values

    def _leave_out(self, column: str, reason: str) -> None:
        if column in self._trained:
            raise _Refused(f"column {column!r} holds {reason}")
        self.left_out.setdefault(column, reason)

    def _is_wanted(self, row: Mapping[str, Any]) -> bool:
        if self._form is not None:
            return self._has_content(self._form, row)
        return bool(row) if self._text_column is None else self._has_text(row.get(self._text_column))

    def _has_content(self, form: DetectedFormat, row: Mapping[str, Any]) -> bool:
        try:
            example = form.example(row)
        except RowProblem as problem:
            raise _Refused(str(problem)) from problem
        if example is None:
            return False
        return not self._ascii_only or self._is_ascii(contents(example))

    def _has_text(self, text: Any) -> bool:
        if isinstance(text, str):
            if not text or (text[0] in BLANKS and not text.strip(BLANKS)):
                return False
            return not self._ascii_only or text.isascii()
        if text is None:
            return False
        raise _Refused(f"column {self._text_column!r} holds {type(text).__name__} instead of text")

    def _is_ascii(self, content: Any) -> bool:
        try:
            return self._encode(content).isascii()
        except _NOT_ENCODABLE as error:
            raise _Refused(f"column {self._text_column!r} holds {_reason(content, error)}") from error


def _row_of_python(line: bytes, error: Exception) -> dict[str, Any]:
    """The row in a line of what Python's `json` writes beyond JSON: NaN, infinities, halves of surrogate pairs."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise _Refused(f"not a JSON object: {error}") from error
    return row


def _reason(value: Any, error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        half = error.object[error.start]
        return f"half of a surrogate pair, or a byte that is not UTF-8 ({half!a} at character {error.start})"
    if isinstance(error, RecursionError):
        return "values that nest too deep"
    return f"{type(value).__name__}, which JSON cannot keep: {error}"


def _appender(
    text_column: str | None, encode_into: Callable[[Any, bytearray, int], None]
) -> Callable[[dict[str, Any], bytearray, int], int]:
    """Puts the line of a row into ``lines``, from byte ``at`` to their end, if the row is what most are: text that is
    surely kept, beside values that JSON surely keeps. Returns where the line ends, or 0 for other rows, which are left
    to ``encode_row``; behind ``at`` may then be anything.

    Called for each row, so everything it needs is at hand.
    """
    plain, blanks = _PLAIN.issuperset, BLANKS
    column: Any = text_column

    def append_plain(row: dict[str, Any], lines: bytearray, at: int) -> int:
        text = row.get(column)
        if text.__class__ is str and text[:1] not in blanks and plain(map(type, row.values())):
            try:
                encode_into(row, lines, at)
            except (ValueError, OverflowError):
                # Refused with its column, on the way of all other rows.
                return 0
            lines += b"\n"
            return len(lines)
        return 0

    return append_plain


def _no_line(_row: dict[str, Any], _lines: bytearray, _at: int) -> int:
    return 0


class _Refused(Exception):  # noqa: N818  never leaves this module
    """What is wrong with a row, without where it is."""


def _all_kept(data: bytes, ends: Ends, batch: InputRows | InputLines) -> EncodedRows:
    return EncodedRows(data, ends, range(1, len(ends) + 1), len(ends), batch.after)


def _only_kept(
    lines: Sequence[bytes | None], keep: Sequence[bool], batch: InputRows | InputLines
) -> EncodedRows:
    kept = cast("list[bytes]", list(compress(lines, keep)))
    return EncodedRows.of(kept, list(compress(count(1), keep)), len(keep), batch.after)


def _is_framed(data: bytes, ends: Ends) -> bool:
    """Whether every line begins with a brace and ends with one.

    Then no valid object spans two lines: within one, a comma stands between two braces.
    """
    codes = np.frombuffer(data, np.uint8)
    return bool(
        codes[0] == _OPENING and np.all(codes[ends - 2] == _CLOSING) and np.all(codes[ends[:-1]] == _OPENING)
    )
