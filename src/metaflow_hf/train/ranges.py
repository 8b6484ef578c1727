"""Sets of positions as sorted half-open ranges, so that a run's progress is a few numbers."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Positions:
    """An immutable set of non-negative integers, kept as ascending ranges that neither touch nor overlap.

    Two sets of the same numbers are equal. Membership is O(log ranges), everything else O(ranges).
    """

    ranges: tuple[Range, ...] = ()

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Self:
        """The set of the given numbers, in any order, repeated or not."""
        return cls.from_ranges([(number, number + 1) for number in numbers])

    @classmethod
    def from_ranges(cls, ranges: Iterable[Sequence[int]]) -> Self:
        """The union of ``[start, stop)`` pairs. Raises ``ValueError`` for a negative or reversed one."""
        merged: list[Range] = []
        for start, stop in sorted([(int(start), int(stop)) for start, stop in ranges]):
            if not 0 <= start <= stop:
                raise ValueError(f"[{start}, {stop}) is no range of positions.")
            if start == stop:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    def __len__(self) -> int:
        return sum([stop - start for start, stop in self.ranges])

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.ranges:
            yield from range(start, stop)

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self.ranges, number, key=lambda item: item[0])
        return index > 0 and number < self.ranges[index - 1][1]

    def __or__(self, other: Self) -> Self:
        if not self.ranges or not other.ranges:
            return self if self.ranges else other
        return type(self).from_ranges((*self.ranges, *other.ranges))

    def __sub__(self, other: Self) -> Self:
        if not self.ranges or not other.ranges:
            return self
        # What is left between holes is ascending and does not touch.
        return type(self)(tuple(_without(self.ranges, other.ranges)))

    def __and__(self, other: Self) -> Self:
        return self - (self - other)

    def isdisjoint(self, other: Self) -> bool:
        """Whether no number is in both."""
        return not self & other

    def to_json(self) -> list[Range]:
        """The ranges as JSON writes them: ``[[start, stop], …]``."""
        return list(self.ranges)


def _without(ranges: Iterable[Range], holes: Sequence[Range]) -> Iterator[Range]:
    index = 0
    for start, stop in ranges:
        cursor = start
        while index < len(holes) and holes[index][1] <= cursor:
            index += 1
        for hole_start, hole_stop in holes[index:]:
            if hole_start >= stop:
                break
            if cursor < hole_start:
                yield cursor, hole_start
            cursor = max(cursor, hole_stop)
        if cursor < stop:
            yield cursor, stop
