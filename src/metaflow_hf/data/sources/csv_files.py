"""Rows of CSV: cells stay text, where `datasets` would guess their types and lose `007` and `NA`."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from metaflow_hf.data.rows import InputRow, Unreadable
from metaflow_hf.errors import ConfigError, SelectionError


def csv_rows(
    stream: BinaryIO, name: str, *, delimiter: str, columns: Sequence[str] | None = None
) -> Iterator[InputRow]:
    """The rows of a CSV file; its first line names the columns unless ``columns`` does.

    A row with another number of cells is ``Unreadable``. Raises ``SelectionError`` for what is no CSV, and
    ``ConfigError`` for two columns of one name.
    """
    # The module's own limit of 128 KiB a cell guards nothing here, and texts are longer.
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = list(columns) if columns is not None else next(filter(None, lines), [])
            if len(set(header)) != len(header):
                raise ConfigError(f"{name}: two columns have the same name: {', '.join(header)}.")
            for cells in lines:
                yield _csv_row(header, cells)
        except csv.Error as error:
            raise SelectionError(f"{name}, line {lines.line_num}: not CSV: {error}.") from error


def _csv_row(header: Sequence[str], cells: list[str]) -> InputRow:
    if not cells:
        return {}
    if len(cells) != len(header):
        return Unreadable(f"{len(cells)} cells, but the header names {len(header)} columns")
    return dict(zip(header, cells, strict=True))
