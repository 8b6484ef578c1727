"""The rows of a source, without building anything of them."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from metaflow_hf.data.emptiness import nothing_stored
from metaflow_hf.data.encoding import RowEncoder
from metaflow_hf.data.formats import resolve_format
from metaflow_hf.data.left_out import LeftOutColumns
from metaflow_hf.data.manifest import Cursor, DatasetSpec
from metaflow_hf.data.sources import Source, open_source
from metaflow_hf.errors import ConfigError
from metaflow_hf.references import SnapshotRef


def open_rows(
    source: str | Path | SnapshotRef | Mapping[str, Any],
    *,
    split: str | None = None,
    text_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a source, in order, with the values that `build_blocks` stores.

    Of plain texts blank rows are passed over, as in a build. Rows of other formats, and of no certain one, are all
    given, also those that a build refuses or skips.

    Args:
        source: A dataset of the hub, a local file, directory or pattern, a URI of a store, or a reference, as for
            `build_blocks`.
        split: The split, in place of one in the location: `test`, `train[:10%]`, `train[100:200]`, `train+test`.
            By default `train`, or the only split there is.
        text_column: The column with the text; found by name and type by default.
        keep_columns: The columns to give beside the text; all by default.

    Returns:
        An iterator of rows, which reads as it goes. Close it when you do not want all rows.

    Raises:
        SelectionError: There is no such source, configuration or split, or it holds no rows.
        BadRowError: A row cannot be kept; raised when its turn comes.

    """
    opened = open_source(source, split=split)
    return _rows(opened, _text_column(opened, text_column), keep_columns)


def _text_column(source: Source, named: str | None) -> str | None:
    """The column of plain texts; ``None`` for rows of another format, or of none that is certain."""
    rows = source.first_rows()
    try:
        form = resolve_format(rows, text_column=named, where=source.source.removeprefix("file:"))
    except ConfigError:
        if named is not None and rows:
            raise
        return named
    return form.main_column if form.name == "text" else None


def _rows(
    source: Source, text_column: str | None, keep_columns: Sequence[str] | None
) -> Generator[dict[str, Any]]:
    encoder = RowEncoder(text_column, keep_columns=keep_columns)
    left_out = LeftOutColumns(source.name)
    is_empty = True
    with closing(source.batches(Cursor())) as batches:
        for batch in batches:
            encoded = encoder.encode(batch)
            left_out.warn(encoded.left_out)
            for line in bytes(encoded.data).split(b"\n")[:-1]:
                is_empty = False
                yield msgspec.json.decode(line)
    if is_empty:
        spec = DatasetSpec(dataset_name=source.name, source=source.source, text_column=text_column)
        raise nothing_stored(source, spec)
