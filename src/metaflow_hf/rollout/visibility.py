"""Which keys each query of a token chunk sees, as a few rectangles and triangles instead of a mask.

transformers describes attention by a mask function over (row, head, query, key). Three of its patterns are
known here: causal, sliding window, and attention chunks (Llama 4), each with padding on either side. They
are cut into spans of contiguous keys: a span is seen in full, or as the causal triangle, or as the triangle
that a window cuts off at its far end. No tensor of queries x keys exists.

All positions are absolute, in tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_UNKNOWN = "a mask function that is neither causal, a sliding window nor attention chunks"


class Shape(Enum):
    """What the queries of a span see of its keys."""

    FULL = "every query sees every key"
    CAUSAL = "query i sees keys 0 … i; as many queries as keys"
    FADING = "query i sees keys i …; as many queries as keys"


@dataclass(frozen=True)
class Span:
    """Queries [q0, q1) and keys [k0, k1) of one row, or of all rows (None)."""

    row: int | None
    q0: int
    q1: int
    k0: int
    k1: int
    shape: Shape

    def shares_keys(self, other: Span) -> bool:
        """Whether some token's keys are in both, of whatever rows."""
        return self.k0 < other.k1 and other.k0 < self.k1

    def split(self, key: int) -> list[Span]:
        """The same in parts whose keys all lie before `key` or all from it on. Not for CAUSAL."""
        if not self.k0 < key < self.k1:
            return [self]
        if self.shape is Shape.FULL:
            parts = [
                (self.q0, self.q1, self.k0, key, Shape.FULL),
                (self.q0, self.q1, key, self.k1, Shape.FULL),
            ]
        else:
            assert self.shape is Shape.FADING
            middle = self.q0 + key - self.k0
            parts = [
                (self.q0, middle, self.k0, key, Shape.FADING),
                (self.q0, middle, key, self.k1, Shape.FULL),
                (middle, self.q1, key, self.k1, Shape.FADING),
            ]
        return [Span(self.row, *part) for part in parts]


@dataclass(frozen=True)
class Pattern:
    """Causal, and: the last `window` keys only, itself included; the keys of its own `chunk` only."""

    window: int | None = None
    chunk: int | None = None

    def sees(self, query: Tensor, key: Tensor, first: Tensor) -> Tensor:
        """Whether these queries see these keys; attention chunks are counted from `first` on."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & ((key - first) // self.chunk == (query - first) // self.chunk)
        return seen

    def spans(self, start: int, stop: int, first: int, row: int | None) -> Iterator[Span]:
        """All that the queries [start, stop) see, in a row whose first token is at `first` <= start."""
        if self.chunk is None:
            yield from self._local_spans(start, stop, first, row)
            return
        while start < stop:
            begin = first + (start - first) // self.chunk * self.chunk
            end = min(begin + self.chunk, stop)
            yield from self._local_spans(start, end, begin, row)
            start = end

    def _local_spans(self, start: int, stop: int, first: int, row: int | None) -> Iterator[Span]:
        window = stop - first if self.window is None else self.window
        for q0 in range(start, stop, window):
            q1 = min(q0 + window, stop)
            # every query sees [near, q0); the last query none of [far, near), the one before it the last key, …
            near, far = max(q1 - window, first), max(q0 - window + 1, first)
            if far < near:
                fading = q1 - 1 - (near - far)
                if q0 < fading:
                    yield Span(row, q0, fading, far, near, Shape.FULL)
                yield Span(row, fading, q1 - 1, far, near, Shape.FADING)
            if near < q0:
                yield Span(row, q0, q1, near, q0, Shape.FULL)
            yield Span(row, q0, q1, q0, q1, Shape.CAUSAL)


class Visible:
    """What transformers makes a mask of for one token chunk; stands in the mask's place.

    `spans`: what is seen, or the reason why spans cannot say it. `dense(mask_function)` is the mask that
    transformers would have made. Both are found when first asked for: models make masks that no layer uses.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._dense: Tensor | None = None
        self.first_key: int = arguments["kv_offset"]

    @cached_property
    def spans(self) -> list[Span] | str:
        given = self._arguments
        start, stop = given["q_offset"], given["q_offset"] + given["q_length"]
        if given.get("use_vmap") or not given.get("allow_is_causal_skip", True):
            return _UNKNOWN
        if given["kv_offset"] + given["kv_length"] != stop:
            return "keys that end at another token than the queries"
        rows = _rows(given.get("attention_mask"), given["batch_size"], stop)
        if rows is None:
            return "padding between attended tokens"
        pattern = self._pattern([first for first, _ in rows])
        if pattern is None:
            return _UNKNOWN
        if all(row == (0, stop) for row in rows):
            return list(pattern.spans(start, stop, 0, None))
        spans: list[Span] = []
        for row, (first, last) in enumerate(rows):
            if first < min(last, stop) and max(start, first) < min(stop, last):
                spans += pattern.spans(max(start, first), min(stop, last), first, row)
            if first < last < stop:  # padding on the right sees what lies before it
                if pattern != Pattern():
                    return "padding on the right of a local pattern"
                spans.append(Span(row, max(start, last), stop, first, last, Shape.FULL))
        return spans

    def dense(self, make: Callable[..., Any]) -> Any:
        """The mask that `make`, one of transformers' mask interfaces, builds; made once."""
        if self._dense is None:
            self._dense = make(**self._arguments)
        return self._dense

    def _pattern(self, firsts: list[int]) -> Pattern | None:
        """The pattern that agrees with the mask function on three queries and all keys."""
        given = self._arguments
        size = given.get("local_size")
        chunk = getattr(given.get("config"), "attention_chunk_size", None)
        candidates = [Pattern()] if size is None else [Pattern(window=size)] if size > 0 else []
        candidates += [Pattern(chunk=chunk)] if chunk else []
        start, stop, device = given["q_offset"], given["q_offset"] + given["q_length"], given["device"]
        row = torch.arange(given["batch_size"], device=device)[:, None, None, None]
        head = row.new_zeros(1, 1, 1, 1)
        query = row.new_tensor(sorted({start, (start + stop) // 2, stop - 1}))[None, None, :, None]
        key = torch.arange(given["kv_offset"], stop, device=device)[None, None, None, :]
        expected = given["mask_function"](row, head, query, key)
        first = row.new_tensor(firsts)[:, None, None, None]
        for pattern in candidates:
            found = pattern.sees(query, key, first)
            if torch.equal(*torch.broadcast_tensors(found, expected)):
                return pattern
        return None


def _rows(mask: Tensor | None, batch_size: int, stop: int) -> list[tuple[int, int]] | None:
    """[first, last) of the attended tokens of each row; None if some row has others between them.

    A row with none is (stop, stop).
    """
    if mask is None:
        return [(0, stop)] * batch_size
    attended = mask[:, :stop] != 0
    count, position = attended.sum(dim=1), torch.arange(stop, device=mask.device)
    first = torch.where(attended, position, stop).amin(dim=1)
    last = torch.where(attended, position + 1, 0).amax(dim=1)
    bounds: list[list[int]] = torch.stack([count, first, last], dim=1).tolist()
    if any(n and n != last - first for n, first, last in bounds):
        return None
    return [(first, last) if n else (stop, stop) for n, first, last in bounds]
