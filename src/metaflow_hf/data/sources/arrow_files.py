"""Rows of Arrow record batches, however the file stores them."""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final

import msgspec

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.rows import AfterRow, InputRows
from metaflow_hf.errors import BadRowError, IntegrityError

BATCH_ROWS: Final = 1000
_ARROW_FILE: Final = b"ARROW1"
_FEATHER_1: Final = b"FEA1"
_MILLISECONDS: Final = {"s": 1000, "ms": 1}
_PER_MILLISECOND: Final = {"us": 1000, "ns": 1_000_000}


def record_batches(stream: BinaryIO) -> Iterator[Any]:
    """The batches of an Arrow stream, as ``datasets`` saves them, of an Arrow file, or of a Feather file."""
    import pyarrow.feather
    import pyarrow.ipc

    magic = stream.read(len(_ARROW_FILE))
    stream.seek(0)
    if magic == _ARROW_FILE:
        with pyarrow.ipc.open_file(stream) as reader:
            yield from map(reader.get_batch, range(reader.num_record_batches))
    elif magic.startswith(_FEATHER_1):
        yield from pyarrow.feather.read_table(stream).to_batches()
    else:
        with pyarrow.ipc.open_stream(stream) as reader:
            yield from reader


def sliced(batches: Iterator[Any]) -> Iterator[Any]:
    """The same rows in batches of at most ``BATCH_ROWS``."""
    for batch in batches:
        for at in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(at, BATCH_ROWS)


def arrow_rows(batches: Iterator[Any], name: str, cursor: Cursor, first: int) -> Iterator[InputRows]:
    """The rows of batches, of which the first has number ``first``, from the cursor's on."""
    for batch in batches:
        skip = min(max(cursor.row - first, 0), batch.num_rows)
        if skip < batch.num_rows:
            rows = _python_rows(batch.slice(skip), name, first + skip)
            yield InputRows(rows, name, first + skip, AfterRow(cursor.file, first + skip))
        first += batch.num_rows


def _python_rows(batch: Any, name: str, first: int) -> list[dict[str, Any]]:
    import pyarrow as pa

    names = batch.schema.names
    if len(set(names)) != len(names):
        raise IntegrityError(f"{name}: two columns have the same name: {', '.join(names)}.")
    columns = [
        _in_milliseconds(column) if _is_time_point(column.type) else column for column in batch.columns
    ]
    try:
        rows: list[dict[str, Any]] = pa.RecordBatch.from_arrays(columns, names).to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise BadRowError(
            f"{name}: rows {first} to {first + batch.num_rows - 1} hold a value that cannot be read: {error}."
        ) from error
    for field in batch.schema:
        decode = _json_decoder(field.type)
        if decode is not None:
            for row in rows:
                row[field.name] = decode(row[field.name])
    return rows


def _is_time_point(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_duration(kind))


def _in_milliseconds(column: Any) -> Any:
    """Timestamps, dates and durations as whole milliseconds, as ``json_value`` has them, and all of them at once."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_date32(column.type):
        column, scale, unit = column.cast(pa.int32()).cast(pa.int64()), 86_400_000, 1
    elif pa.types.is_date64(column.type):
        column, scale, unit = column.cast(pa.int64()), 1, 1
    else:
        unit = _PER_MILLISECOND.get(column.type.unit, 1)
        scale = _MILLISECONDS.get(column.type.unit, 1)
        column = column.cast(pa.int64())
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    return pa.array(values * scale // unit, mask=np.asarray(column.is_null()))


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """What gives the values of a column that `datasets` holds as JSON text, alone or within lists and structs."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else msgspec.json.decode(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        decode = _json_decoder(kind.value_type)
        return decode and (lambda value: None if value is None else list(map(decode, value)))
    if pa.types.is_struct(kind):
        decoders = {field.name: _json_decoder(field.type) for field in kind}
        known = {name: decode for name, decode in decoders.items() if decode is not None}
        if known:
            return lambda value: (
                None
                if value is None
                else {name: known[name](item) if name in known else item for name, item in value.items()}
            )
    return None
