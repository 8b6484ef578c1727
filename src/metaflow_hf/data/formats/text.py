"""Plain text: everything carries the loss."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from metaflow_hf.data.formats.columns import EMPTY, TEXT
from metaflow_hf.data.formats.examples import Example, RowProblem
from metaflow_hf.data.formats.row_format import Role

# Columns of these names hold the texts of a dataset; any other lone column of strings may hold anything.
TEXT_COLUMNS: Final = (
    "text",
    "content",
    "document",
    "article",
    "body",
    "sentence",
    "passage",
    "story",
    "raw_content",
    "raw_text",
    "full_text",
)


class TextFormat:
    """``{"text": "…"}``."""

    name = "text"
    roles: Sequence[Role] = (Role(name="text", names=TEXT_COLUMNS, kinds=(TEXT,)),)

    def example(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example | None:
        return text_of(row, columns["text"])


def text_of(row: Mapping[str, Any], column: str) -> str | None:
    """The text in a column; ``None`` where there is none. Raises ``RowProblem`` for anything but text."""
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowProblem(f"column {column!r} holds {_kind(value)} instead of text")
    return value if value.strip(" \t\r\n") else None


def _kind(value: Any) -> str:
    from metaflow_hf.data.formats.columns import kind_of

    found = kind_of(value)
    return f"an empty {type(value).__name__}" if found == EMPTY else found
