"""The order of a mixture: shares, every row as often as it should be, and the same everywhere."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf.data.mixed_order import MixedOrder, OrderPart, samples_of_mixture
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import ConfigError

blocks = st.lists(st.integers(1, 40), min_size=1, max_size=6)
unweighted = st.lists(
    st.builds(OrderPart, block_samples=blocks, epochs=st.integers(1, 3)), min_size=1, max_size=4
)
weighted = st.lists(
    st.builds(
        OrderPart, block_samples=blocks, epochs=st.integers(1, 3), weight=st.floats(0.01, 100).map(float)
    ),
    min_size=1,
    max_size=4,
)
claims = st.tuples(st.integers(1, 15), st.integers(1, 20)).map(lambda pair: (max(pair), min(pair)))
SHARES = [
    OrderPart(block_samples=[400, 400, 200], weight=5),
    OrderPart(block_samples=[300], weight=3, epochs=4),
    OrderPart(block_samples=[5_000], weight=2),
]


def order_of(parts, sizes=(20, 5), **settings) -> MixedOrder:
    return MixedOrder(parts, *sizes, **settings)


def spans_of(order: MixedOrder):
    return [order.locate(position) for position in range(order.num_positions)]


def first_blocks(parts) -> list[int]:
    return [sum(len(part.block_samples) for part in parts[:number]) for number in range(len(parts))]


def rows_of(order: MixedOrder, parts) -> list[Counter]:
    """How often each row (epoch, block, row) of each dataset is trained."""
    starts, found = first_blocks(parts), [Counter() for _ in parts]
    for position, span in enumerate(spans_of(order)):
        part = order.part_of(position)
        assert span.position == position
        for offset in order.row_order(position):
            row = span.start + offset
            assert row < span.stop
            found[part][span.epoch, span.block_id - starts[part], row] += 1
    return found


@settings(deadline=None)
@given(unweighted, claims, st.booleans())
def test_without_weights_every_row_is_trained_once_in_each_epoch_of_its_dataset(parts, sizes, shuffle):
    order = order_of(parts, sizes, seed=3, shuffle=shuffle)
    for part, found in zip(parts, rows_of(order, parts), strict=True):
        expected = {
            (epoch, block, row)
            for epoch in range(part.epochs)
            for block, samples in enumerate(part.block_samples)
            for row in range(samples)
        }
        assert found.keys() == expected
        assert set(found.values()) == {1}
    assert order.samples == tuple(part.available for part in parts)


@settings(deadline=None)
@given(weighted, claims)
def test_with_weights_no_row_is_trained_twice_and_one_dataset_runs_out(parts, sizes):
    order = order_of(parts, sizes, seed=3)
    found = rows_of(order, parts)
    assert all(set(rows.values()) <= {1} for rows in found)
    assert order.samples == tuple(map(len, found))
    assert any(rows == part.available for rows, part in zip(order.samples, parts, strict=True))
    # Later epochs begin when the earlier ones are over.
    for rows, part in zip(found, parts, strict=True):
        per_epoch = Counter(epoch for epoch, _, _ in rows)
        assert all(per_epoch[epoch] == sum(part.block_samples) for epoch in range(max(per_epoch, default=0)))


@settings(deadline=None)
@given(weighted, claims)
def test_at_every_position_the_shares_are_the_weights_but_for_a_claim(parts, sizes):
    order = order_of(parts, sizes)
    total, counted = 0, [0] * len(parts)
    weights = [part.weight / sum(part.weight for part in parts) for part in parts]
    size = min(sizes)
    for position, span in enumerate(spans_of(order)):
        counted[order.part_of(position)] += span.stop - span.start
        total += span.stop - span.start
        for share, rows in zip(weights, counted, strict=True):
            assert abs(rows - share * total) <= size / 2 * (1 + len(parts) * share) + 1e-6


def test_the_shares_are_exactly_the_weights_where_claims_allow_it():
    order = order_of(SHARES, (100, 10))
    assert order.samples == (1000, 600, 400)
    assert samples_of_mixture([1000, 1200, 5000], [5, 3, 2]) == [1000, 600, 400]
    # Not only at the end: in each twentieth of it.
    twentieth = order.num_positions // 20
    for start in range(0, order.num_positions, twentieth):
        assert order.samples_at([(start, start + twentieth)]) == [50, 30, 20]


def test_without_weights_all_datasets_end_together():
    parts = [OrderPart(block_samples=[1000]), OrderPart(block_samples=[100]), OrderPart(block_samples=[30])]
    order = order_of(parts, (50, 5))
    assert order.samples_at([(0, order.num_positions // 2)]) == pytest.approx([500, 50, 15], abs=5)
    last = {order.part_of(position): position for position in range(order.num_positions)}
    assert all(position > 0.9 * order.num_positions for position in last.values())


def test_a_dataset_of_which_more_is_asked_for_is_repeated():
    parts = [
        OrderPart(block_samples=[100], weight=1),
        OrderPart(block_samples=[20], weight=1, epochs=10),
    ]
    order = order_of(parts)
    assert order.samples == (100, 100)
    assert {span.epoch for span in spans_of(order) if span.block_id == 1} == set(range(5))


@settings(deadline=None)
@given(unweighted, claims)
def test_the_positions_of_a_chunk_are_those_that_lie_in_it(parts, sizes):
    order = order_of(parts, sizes)
    expected: dict[tuple[int, int, int], list[int]] = {}
    for position, span in enumerate(spans_of(order)):
        expected.setdefault((span.epoch, span.block_id, span.chunk_id), []).append(position)
    for place, positions in expected.items():
        assert order.positions_of(*place) == positions
    assert sorted(order.chunks()) == sorted(expected.values())
    assert order.num_samples(0, 1, order.num_positions) == sum(order.samples) - len(order.row_order(0))


@settings(deadline=None)
@given(blocks, claims, st.booleans())
def test_a_mixture_of_one_dataset_is_the_dataset(samples, sizes, shuffle):
    alone = ClaimOrder(samples, *sizes, seed=5, epochs=2, shuffle=shuffle)
    mixed = order_of([OrderPart(block_samples=samples, epochs=2)], sizes, seed=5, shuffle=shuffle)
    assert mixed.num_positions == alone.num_positions
    for position in range(alone.num_positions):
        assert mixed.locate(position) == alone.locate(position)
        assert mixed.row_order(position) == alone.row_order(position)


@settings(deadline=None)
@given(blocks, claims, st.booleans())
def test_the_sizes_of_claims_are_those_of_their_spans(samples, sizes, shuffle):
    order = ClaimOrder(samples, *sizes, seed=5, epochs=2, shuffle=shuffle)
    for epoch in range(2):
        first = epoch * order.positions_per_epoch
        spans = [order.locate(first + number) for number in range(order.positions_per_epoch)]
        assert order.claim_sizes(epoch).tolist() == [span.stop - span.start for span in spans]


def test_datasets_of_equal_sizes_are_shuffled_differently():
    parts = [OrderPart(block_samples=[100]), OrderPart(block_samples=[100])]
    order = order_of(parts)
    pairs = [(order.locate(p), order.locate(p + 1)) for p in range(0, order.num_positions, 2)]
    assert sum(a.start == b.start for a, b in pairs) < len(pairs) / 2


FINGERPRINT = """
import hashlib
from metaflow_hf.data.mixed_order import MixedOrder, OrderPart
parts = [OrderPart(block_samples=[70, 31], weight=0.3), OrderPart(block_samples=[50], weight=0.7, epochs=3)]
order = MixedOrder(parts, 20, 5, seed=11)
facts = [(order.locate(p), order.row_order(p)) for p in range(order.num_positions)]
print(hashlib.sha256(repr(facts).encode()).hexdigest())
"""


def test_the_order_is_the_same_in_every_process_and_every_version():
    done = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "93ea27df139af213be8c9f698c4b8f5d9638872d3543949ca2add72dce985200"


def test_what_is_no_mixture_is_refused():
    with pytest.raises(ConfigError, match="either all datasets"):
        order_of([OrderPart(block_samples=[5], weight=1), OrderPart(block_samples=[5])])
    with pytest.raises(ConfigError, match="at least 1 sample"):
        order_of([OrderPart(block_samples=[5]), OrderPart(block_samples=[])])
    order = order_of(SHARES)
    for position in (-1, order.num_positions):
        with pytest.raises(IndexError):
            order.locate(position)
    with pytest.raises(IndexError, match="not trained"):
        order.positions_of(3, 3, 14)
    with pytest.raises(IndexError):
        order.positions_of(0, 5, 0)
