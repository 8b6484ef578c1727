"""Sets of positions behave as Python's sets do."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaflow_hf.train.ranges import Positions

numbers = st.frozensets(st.integers(0, 40))


@given(numbers, numbers)
def test_they_agree_with_sets(a, b):
    left, right = Positions.of(a), Positions.of(b)
    assert set(left | right) == a | b
    assert set(left - right) == a - b
    assert set(left & right) == a & b
    assert left.isdisjoint(right) == a.isdisjoint(b)
    assert len(left) == len(a)
    assert bool(left) == bool(a)
    assert [number in left for number in range(42)] == [number in a for number in range(42)]


@given(numbers)
def test_equal_sets_have_one_form_that_survives_json(a):
    positions = Positions.of(a)
    assert Positions.from_ranges(positions.to_json()) == positions
    assert list(positions) == sorted(a)
    pairs = positions.ranges
    assert all(start < stop for start, stop in pairs)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(pairs))


def test_a_million_positions_are_one_range():
    assert Positions.from_ranges([(0, 500_000), (500_000, 1_000_000)]).to_json() == [(0, 1_000_000)]


@pytest.mark.parametrize("wrong", [(-1, 2), (3, 2)])
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match="no range"):
        Positions.from_ranges([wrong])
