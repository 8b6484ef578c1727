"""Rows of one's own, written one by one into the blocks of a dataset."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import msgspec
import numpy as np

from metaflow_hf.data.build import with_format
from metaflow_hf.data.encoding import RowEncoder
from metaflow_hf.data.formats import resolve_format
from metaflow_hf.data.left_out import LeftOutColumns
from metaflow_hf.data.manifest import BlockManifest, Compression, DatasetSpec, OnBadRow
from metaflow_hf.data.records import read_commit, read_completion
from metaflow_hf.data.rows import AfterRow, EncodedRows, line_ends
from metaflow_hf.data.writer import LEASE_SECONDS, DatasetWriter, check_settings, hold_lease
from metaflow_hf.errors import UserError
from metaflow_hf.store import ObjectStore, open_store

# What waits in memory to be written together.
_FLUSH_BYTES: Final = 1024 * 1024
_MANY_SKIPS: Final = 10_000
# How many rows are encoded together.
_MANY: Final = 1_000


class StreamingBlockWriter:
    """Writes rows, one by one, into the blocks of a dataset; survives being killed at any moment.

    ``output_dir`` is a directory or a URI of a store. After a restart with the same arguments ``next_cursor``
    says how many calls of ``write`` are already committed: go on with the row after those, and the result is
    that of an uninterrupted run. As a context manager it completes the dataset at the end; when the body
    raises, what is committed stays and the dataset stays incomplete; so it is when rows could not be stored. A second
    writer of the same directory waits until the first is gone, however it went.

    The format of the rows is found in the first one, unless ``format``, ``columns`` or ``text_column`` name it. ``max_rows`` and ``max_bytes`` (of JSON lines)
    end the dataset early; later rows are ignored. Raises ``FormatError`` for a first row whose format is not certain,
    and ``DatasetMismatch`` when the directory holds another dataset. For use by one thread.
    """

    def __init__(
        self,
        output_dir: str | Path,
        dataset_name: str,
        samples_per_block: int = 100_000,
        *,
        format: str = "auto",  # noqa: A002  the name of the setting
        columns: Mapping[str, str] | None = None,
        text_column: str | None = None,
        compression: Compression | None = None,
        max_rows: int | None = None,
        max_bytes: int | None = None,
        on_bad_row: OnBadRow = "raise",
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._spec = check_settings(
            DatasetSpec(
                dataset_name=dataset_name,
                source="rows",
                block_size=samples_per_block,
                compression=compression,
                on_bad_row=on_bad_row,
                max_rows=max_rows,
                max_bytes=max_bytes,
            )
        )
        self._settings: dict[str, Any] = {"format": format, "columns": columns, "text_column": text_column}
        self._store = open_store(output_dir)
        lease = hold_lease(self._store, ttl=lease_seconds)
        assert lease is not None, "without a condition to wait for, the lease is ours in the end"
        self._lease = lease
        # Lines that wait; where the first begins and each ends, which alone says how many there are, however a call
        # was interrupted; and how many of them stood before each row that was skipped.
        self._lines = bytearray()
        self._ends = [0]
        self._skips: list[int] = []
        self._block_room = 0
        self._first = 0
        self._wants_more = True
        self._is_open = True
        self._left_out = LeftOutColumns(dataset_name)
        self._writer: DatasetWriter | None = None
        self._encoder: RowEncoder | None = None
        self._append_plain: Callable[[dict[str, Any], bytearray, int], int] = _no_line
        try:
            stored = _stored_spec(self._store)
            if stored is not None and stored.text_column is not None:
                self._begin(stored)
        except BaseException:
            lease.release()
            raise

    @property
    def next_cursor(self) -> int:
        """How many calls of ``write``, counted over all runs, are committed or under way in this run."""
        return self._first + len(self._ends) - 1 + len(self._skips)

    def write(self, row: Mapping[str, Any] | str) -> None:
        """Adds one row; a plain string is a row with the column ``text``.

        A row without text is counted and skipped. Raises ``BadRowError`` for one that JSON cannot keep, and
        ``UserError`` after ``close`` or ``abort``.
        """
        end = self._append_plain(row, self._lines, self._ends[-1]) if row.__class__ is dict else 0
        if not end:
            self._write_other(row)
            return
        self._ends.append(end)
        if end > _FLUSH_BYTES or len(self._ends) > self._block_room:
            self._flush()

    def write_many(self, rows: Sequence[Mapping[str, Any] | str]) -> None:
        """Adds rows in order, as ``write`` does one, and several times faster where most are plain.

        When it raises, the rows before the one that was refused are added.
        """
        # The first of all rows says which column is the text.
        begun = 0 if self._encoder is not None else min(1, len(rows))
        for row in rows[:begun]:
            self.write(row)
        for start in range(begun, len(rows), _MANY):
            some = rows[start : start + _MANY]
            if not self._write_at_once(some):
                for row in some:
                    self.write(row)

    def _write_at_once(self, rows: Sequence[Mapping[str, Any] | str]) -> bool:
        """Whether the rows could be added, all together."""
        if self._encoder is None or self._append_plain is _no_line:
            return False
        data = self._encoder.plain_lines(cast("Sequence[Mapping[str, Any]]", rows))
        if data is None:
            return False
        ends = line_ends(data) + self._ends[-1]
        self._lines[self._ends[-1] :] = data
        self._ends.extend(ends.tolist())
        if self._ends[-1] > _FLUSH_BYTES or len(self._ends) > self._block_room:
            self._flush()
        return True

    def _write_other(self, row: Mapping[str, Any] | str) -> None:
        """Any row: the first, one after the last that is wanted, and what is not as plain as most."""
        if not self._is_open:
            raise UserError(f"{self._spec.dataset_name}: the writer is closed, and the row would be lost.")
        if not self._wants_more:
            return
        values: Mapping[str, Any] = {"text": row} if isinstance(row, str) else row
        encoder = self._encoder
        if encoder is None:
            found = resolve_format([values], where=self._spec.dataset_name, **self._settings)
            encoder = self._begin(with_format(self._spec, found))
        line = encoder.encode_row(values, self._spec.dataset_name, self.next_cursor)
        if encoder.left_out:
            self._left_out.warn(encoder.left_out)
        if line is None:
            self._skips.append(len(self._ends) - 1)
        else:
            self._lines[self._ends[-1] :] = line + b"\n"
            self._ends.append(len(self._lines))
        is_much = self._ends[-1] > _FLUSH_BYTES or len(self._skips) > _MANY_SKIPS
        if is_much or len(self._ends) > self._block_room:
            self._flush()

    def close(self) -> BlockManifest:
        """Commits the last block and completes the dataset. Idempotent; when it raises, as ``abort``.

        Raises ``UserError`` where rows were lost: after ``abort``, and after a ``write`` that could not store what it
        was given.
        """
        if not self._is_open and not (self._writer is not None and self._writer.is_complete):
            raise UserError(
                f"{self._spec.dataset_name}: the writer was aborted, so the dataset is not complete. Open another one, "
                "which goes on behind what is committed (next_cursor)."
            )
        try:
            if self._writer is None:
                self._begin(self._spec)
            self._flush()
            writer = self._writer
            assert writer is not None
            return writer.finish()
        finally:
            self.abort()

    def abort(self) -> None:
        """Drops what is not committed and lets others write; a later writer goes on. Idempotent."""
        self._is_open, self._append_plain = False, _no_line
        if self._writer is not None:
            self._writer.discard()
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin(self, form: DatasetSpec) -> RowEncoder:
        """Begins to write rows of the format of a specification."""
        spec = msgspec.structs.replace(
            self._spec, text_column=form.text_column, format=form.format, columns=form.columns
        )
        self._writer = DatasetWriter(self._store, spec, lease=self._lease)
        self._first = self._writer.cursor.row
        self._block_room = self._writer.block_room
        self._encoder = RowEncoder(spec.text_column or "text", form=spec.detected, on_bad_row=spec.on_bad_row)
        self._append_plain = self._encoder.append_plain
        return self._encoder

    def _flush(self) -> None:
        count, total = len(self._ends) - 1, len(self._ends) - 1 + len(self._skips)
        if self._writer is None or not total:
            return
        consumed: Sequence[int] = range(1, count + 1)
        if self._skips:
            numbers = np.arange(count)
            consumed = (numbers + 1 + np.searchsorted(self._skips, numbers, side="right")).tolist()
        with self._abort_on_error():
            ends = np.array(self._ends[1:], np.int64)
            self._take(EncodedRows(self._lines, ends, consumed, total, AfterRow(0, self._first)))
            # These lines are the block's now.
            self._lines, self._ends, self._skips = bytearray(), [0], []

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        """What of a batch is in the open block is not known when that fails: nothing may follow it."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _take(self, batch: EncodedRows) -> None:
        assert self._writer is not None
        self._wants_more = self._writer.append(batch)
        if not self._wants_more:
            self._append_plain = _no_line
        self._first += batch.total_consumed
        self._block_room = self._writer.block_room


def _no_line(_row: dict[str, Any], _lines: bytearray, _at: int) -> int:
    return 0


def _stored_spec(store: ObjectStore) -> DatasetSpec | None:
    completion = read_completion(store)
    if completion is not None:
        return completion.spec
    commit = read_commit(store, 0)
    return commit.spec if commit is not None else None
