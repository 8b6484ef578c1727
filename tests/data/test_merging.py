"""Merged batches say the same about every line as the batches they were made of."""

from itertools import pairwise

import numpy as np
import pytest

from metaflow_hf.data.encoding import InputLines, RowEncoder
from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.merging import is_continued, merge
from metaflow_hf.data.rows import AfterLine, AfterRow, InputRows, line_ends


def _batches(kind, texts):
    """Encoded batches of three rows; rows without text are skipped."""
    encoder = RowEncoder("text")
    offset = 0
    for first in range(0, len(texts), 3):
        rows = texts[first : first + 3]
        if kind == "rows":
            yield encoder.encode(InputRows([{"text": text} for text in rows], "f", first, AfterRow(2, first)))
            continue
        ending = "\r\n" if kind == "crlf" else "\n"
        data = "".join(f'{{"text": "{text}"}}{ending}' for text in rows).encode()
        ends = line_ends(data)
        yield encoder.encode(InputLines(data, ends, "f", first, AfterLine(2, first, offset, ends)))
        offset += len(data)


@pytest.mark.parametrize("kind", ["lines", "crlf", "rows"])
@pytest.mark.parametrize(
    "texts",
    [
        ["a", "bb", "ccc", "d", "e", "f", "g"],
        ["", "bb", "ccc", "d", "", "f", "g", "", ""],
        ["a", "b", "c", "", "", "", "g", "h", "i"],
    ],
)
def test_every_line_keeps_its_bytes_and_its_cursor(kind, texts):
    batches = list(_batches(kind, texts))
    assert all(is_continued(*pair) for pair in pairwise(batches))
    merged = merge(batches, b"".join(batch.data for batch in batches))
    assert merged.total_consumed == len(texts)
    assert merged.data.splitlines() == [line for batch in batches for line in batch.data.splitlines()]
    assert np.array_equal(merged.ends, line_ends(bytes(merged.data)))
    cursors = [batch.after(used) for batch in batches for used in batch.consumed]
    assert [merged.after(used) for used in merged.consumed] == cursors
    assert merged.after(merged.total_consumed) == batches[-1].after(batches[-1].total_consumed)
    assert all(type(cursor.row) is int for cursor in cursors)


def test_batches_of_two_files_or_with_a_gap_do_not_continue_each_other():
    first, second, third = _batches("rows", list("abcdefghi"))
    assert is_continued(first, second)
    assert not is_continued(first, third)
    assert not is_continued(second, first)
    other = RowEncoder("text").encode(InputRows([{"text": "x"}], "g", 0, AfterRow(3, 0)))
    assert not is_continued(first, other)
    assert first.after(3) == Cursor(file=2, row=3)
