"""The texts of many lines of JSON at once; everything else in the lines is checked, and not kept."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

_MOST_COLUMNS: Final = 64
# Rows whose columns are others again and again are not guessed at for ever.
_MOST_GUESSES: Final = 4
_TEXT: Final = "text"


class LineTexts:
    """Decodes lines of JSON objects, and gives what each has under ``text_column``: ``None`` where that is nothing.

    The columns that were met are the fields of a struct, which costs less than a dict of each row. Lines with other
    columns are decoded into dicts.
    """

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column
        self._decode_rows = msgspec.json.Decoder(dict[str, Any]).decode_lines
        self._decode_known: Callable[[bytes], list[Any]] | None = None
        self._columns: dict[str, None] = {}
        self._guesses = 0

    def __call__(self, lines: bytes) -> list[Any]:
        """Raises ``msgspec.DecodeError``, ``UnicodeDecodeError`` or ``RecursionError`` for what is no valid object."""
        if self._decode_known is not None:
            try:
                return [row.text for row in self._decode_known(lines)]
            except msgspec.ValidationError:
                # Another column, most likely. What is wrong otherwise is so for the dicts too.
                self._decode_known = None
        rows = self._decode_rows(lines)
        if self._guesses < _MOST_GUESSES:
            self._guesses += 1
            self._learn(rows)
        return [row.get(self._text_column) for row in rows]

    def _learn(self, rows: Sequence[dict[str, Any]]) -> None:
        self._columns |= dict.fromkeys(column for row in rows for column in row)
        if len(self._columns) > _MOST_COLUMNS or self._text_column not in self._columns:
            return
        names = {
            _TEXT if column == self._text_column else f"column_{number}": column
            for number, column in enumerate(self._columns)
        }
        try:
            row = msgspec.defstruct(
                "Row",
                [(name, Any, None) for name in names],
                rename=names,
                gc=False,
                forbid_unknown_fields=True,
                module=__name__,
            )
        except ValueError:
            # A column with a name that no field can have.
            return
        self._decode_known = msgspec.json.Decoder(row).decode_lines
