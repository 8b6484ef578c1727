"""Why nothing of a source can be stored."""

from collections import Counter
from contextlib import closing
from typing import Final

from metaflow_hf.data.encoding import BLANKS, RowEncoder
from metaflow_hf.data.manifest import Cursor, DatasetSpec
from metaflow_hf.data.rows import AfterLine, InputRow
from metaflow_hf.data.sources import Source
from metaflow_hf.errors import BadRowError, SelectionError

# More rows are not read again only to count them.
COUNTED_ROWS: Final = 100_000


def nothing_stored(source: Source, spec: DatasetSpec) -> SelectionError:
    """The error for a source of which no row was stored: it says how many rows were skipped, and why.

    Reads the source again, up to ``COUNTED_ROWS`` rows.
    """
    reasons, first_bad = _reasons(source, spec)
    where, total = spec.source.removeprefix("file:"), reasons.total()
    if not total:
        return SelectionError(f"{where} holds no rows: there is nothing to store.")
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    more = "at least " if total >= COUNTED_ROWS else ""
    bad = f" The first bad row: {first_bad}" if first_bad else ""
    return SelectionError(
        f"{where} holds no rows that can be stored: {more}{total:,} skipped ({counts}).{bad}"
    )


def _reasons(source: Source, spec: DatasetSpec) -> tuple[Counter[str], str]:
    strict = RowEncoder(spec.text_column or "text")
    reasons: Counter[str] = Counter()
    first_bad = ""
    with closing(source.batches(Cursor())) as batches:
        for batch in batches:
            is_line = isinstance(batch.after, AfterLine)
            for number, row in enumerate(batch.rows, batch.first_row):
                try:
                    kept = strict.encode_row(row, batch.name, number, is_line=is_line)
                except BadRowError as error:
                    first_bad = first_bad or str(error)
                    reasons["bad"] += 1
                else:
                    reasons[_reason(row, kept, spec)] += 1
                if reasons.total() >= COUNTED_ROWS:
                    return reasons, first_bad
    return reasons, first_bad


def _reason(row: InputRow, kept: bytes | None, spec: DatasetSpec) -> str:
    if kept is not None:
        return "not ASCII"
    if not row or (isinstance(row, bytes) and not row.strip(BLANKS.encode())):
        return "blank"
    return f"without text in column {spec.text_column or 'text'!r}"
