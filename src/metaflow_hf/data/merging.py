"""Consecutive batches of encoded rows as one larger batch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from metaflow_hf.data.rows import AfterLine, AfterRow, EncodedRows, Ends


def is_continued(batch: EncodedRows, following: EncodedRows) -> bool:
    """Whether ``following`` begins in the same file at the row behind ``batch``."""
    kinds = type(batch.after), type(following.after)
    is_known = kinds in ((AfterLine, AfterLine), (AfterRow, AfterRow))
    return is_known and batch.after(batch.total_consumed) == following.after(0)


def merge(batches: Sequence[EncodedRows], data: bytes) -> EncodedRows:
    """One batch of batches that continue each other. ``data`` holds their lines, or nothing yet."""
    if len(batches) == 1:
        return replace(batches[0], data=data)
    first = batches[0]
    sizes = [int(batch.ends[-1]) if len(batch.ends) else 0 for batch in batches]
    ends = _shifted([batch.ends for batch in batches], sizes)
    after = first.after
    if isinstance(after, AfterLine):
        afters = [batch.after for batch in batches if isinstance(batch.after, AfterLine)]
        is_same = all(batch.ends is after.ends for batch, after in zip(batches, afters, strict=True))
        read = [int(after.ends[-1]) for after in afters]
        after = replace(after, ends=ends if is_same else _shifted([after.ends for after in afters], read))
    total = sum(batch.total_consumed for batch in batches)
    return EncodedRows(data, ends, _consumed(batches, total), total, after)


def _consumed(batches: Sequence[EncodedRows], total: int) -> Sequence[int]:
    if sum(len(batch.ends) for batch in batches) == total:
        return range(1, total + 1)
    consumed: list[int] = []
    base = 0
    for batch in batches:
        consumed += [base + number for number in batch.consumed]
        base += batch.total_consumed
    return consumed


def _shifted(pieces: Sequence[Ends], sizes: Sequence[int]) -> Ends:
    """The ends of pieces of data, of these sizes, that are put one behind the other."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate([ends + start for ends, start in zip(pieces, starts, strict=True)])
