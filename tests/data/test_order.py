"""The order is a pure function that visits each row exactly once per epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf.data.order import WINDOW_BLOCKS, ClaimOrder, chunk_order, permutation
from metaflow_hf.errors import ConfigError

blocks = st.lists(st.integers(0, 60), min_size=0, max_size=25)
sizes = st.integers(1, 17)


@settings(max_examples=80, deadline=None)
@given(blocks, sizes, sizes, st.integers(0, 5), st.integers(1, 3), st.booleans())
def test_every_row_is_in_exactly_one_claim_of_each_epoch(samples, chunk, claim, seed, epochs, shuffle):
    order = ClaimOrder(samples, chunk, claim, seed=seed, epochs=epochs, shuffle=shuffle)
    seen = Counter()
    for position in range(order.num_positions):
        span = order.locate(position)
        assert span.position == position
        assert span.start // chunk == (span.stop - 1) // chunk == span.chunk_id, "a claim lies in one chunk"
        assert sorted(order.row_order(position)) == list(range(span.stop - span.start))
        seen.update((span.epoch, span.block_id, row) for row in range(span.start, span.stop))
    expected = [(e, b, r) for e in range(epochs) for b, count in enumerate(samples) for r in range(count)]
    assert seen == Counter(expected)


@settings(max_examples=60, deadline=None)
@given(blocks, sizes, st.integers(0, 5), st.integers(0, 2), st.booleans())
def test_chunk_order_covers_every_row_once_and_is_the_order_of_claims(samples, chunk, seed, epoch, shuffle):
    chunks = chunk_order(seed, epoch, samples, chunk, shuffle)
    rows = Counter((c.block_id, row) for c in chunks for row in range(c.start, c.stop))
    assert rows == Counter((b, r) for b, count in enumerate(samples) for r in range(count))
    order = ClaimOrder(samples, chunk, chunk, seed=seed, epochs=epoch + 1, shuffle=shuffle)
    first = epoch * order.positions_per_epoch
    spans = [order.locate(first + i) for i in range(order.positions_per_epoch)]
    assert [(s.block_id, s.chunk_id) for s in spans] == [(c.block_id, c.chunk_id) for c in chunks]


@settings(max_examples=60, deadline=None)
@given(blocks, sizes, sizes, st.integers(0, 3))
def test_positions_of_a_chunk_are_the_inverse_of_locate(samples, chunk, claim, seed):
    order = ClaimOrder(samples, chunk, claim, seed=seed, epochs=2)
    for position in range(order.num_positions):
        span = order.locate(position)
        assert position in order.positions_of(span.epoch, span.block_id, span.chunk_id)


def test_without_shuffle_it_is_the_order_of_the_files():
    order = ClaimOrder([10, 7], 4, 3, shuffle=False)
    spans = [order.locate(position) for position in range(order.num_positions)]
    assert [(s.block_id, s.start, s.stop) for s in spans] == [
        (0, 0, 3), (0, 3, 4), (0, 4, 7), (0, 7, 8), (0, 8, 10),
        (1, 0, 3), (1, 3, 4), (1, 4, 7),
    ]  # fmt: skip
    assert order.row_order(0) == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(blocks, sizes, st.integers(0, 5), st.booleans())
def test_the_order_does_not_depend_on_who_asks_nor_on_what_was_asked_before(samples, chunk, seed, shuffle):
    """Workers ask for other positions, in any order, each of an order of its own."""
    in_order = ClaimOrder(samples, chunk, chunk, seed=seed, epochs=2, shuffle=shuffle)
    positions = range(in_order.num_positions)
    spans = [in_order.locate(position) for position in positions]
    for asked in (positions[::-1], positions[1::2], positions[-1:]):
        worker = ClaimOrder(samples, chunk, chunk, seed=seed, epochs=2, shuffle=shuffle)
        assert [worker.locate(position) for position in asked] == [spans[position] for position in asked]


@settings(max_examples=60, deadline=None)
@given(blocks, sizes, sizes, st.integers(0, 3), st.booleans())
def test_no_chunk_leaves_its_window_of_blocks(samples, chunk, claim, seed, shuffle):
    order = ClaimOrder(samples, chunk, claim, seed=seed, shuffle=shuffle)
    seen = [order.locate(position).block_id for position in range(order.num_positions)]
    # A window is done before the next one begins, so blocks that are open at once are never more than a window.
    for block in set(seen):
        first, last = seen.index(block), len(seen) - 1 - seen[::-1].index(block)
        assert len(set(seen[first : last + 1])) <= WINDOW_BLOCKS


@settings(max_examples=60, deadline=None)
@given(blocks, sizes, sizes, st.integers(0, 3), st.booleans())
def test_without_shuffle_rows_come_as_in_the_files_and_with_it_the_same_rows(
    samples, chunk, claim, seed, shuffle
):
    order = ClaimOrder(samples, chunk, claim, seed=seed, shuffle=shuffle)
    rows = [
        (span.block_id, span.start + row)
        for span in map(order.locate, range(order.num_positions))
        for row in order.row_order(span.position)
    ]
    in_files = [(block, row) for block, count in enumerate(samples) for row in range(count)]
    assert sorted(rows) == in_files
    assert shuffle or rows == in_files


@settings(max_examples=60, deadline=None)
@given(blocks, sizes, sizes, st.integers(0, 3), st.data())
def test_samples_of_a_range_of_positions(samples, chunk, claim, seed, data):
    order = ClaimOrder(samples, chunk, claim, seed=seed, epochs=2)
    first, stop = sorted(data.draw(st.tuples(*[st.integers(0, order.positions_per_epoch)] * 2)))
    begin = order.positions_per_epoch
    spans = [order.locate(begin + position) for position in range(first, stop)]
    assert order.num_samples(1, first, stop) == sum(span.stop - span.start for span in spans)


@pytest.mark.parametrize(
    ("samples", "chunk"),
    [([1] * 30, 4), ([7], 7), ([0, 0, 5, 0], 2), ([0], 3), ([], 3), ([5, 1, 4_001], 4_000)],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_awkward_shapes(samples, chunk, shuffle):
    order = ClaimOrder(samples, chunk, chunk, epochs=2, shuffle=shuffle)
    expected = [
        (block, chunk * part, min(chunk * part + chunk, count))
        for block, count in enumerate(samples)
        for part in range(-(-count // chunk))
    ]
    for epoch in range(2):
        chunks = [(c.block_id, c.start, c.stop) for c in chunk_order(0, epoch, samples, chunk, shuffle)]
        assert sorted(chunks) == expected
        assert shuffle or chunks == expected
    assert order.num_positions == 2 * len(expected)


def test_each_epoch_has_another_order_of_blocks_chunks_and_rows():
    order = ClaimOrder([40] * 16, 40, 10, seed=5, epochs=6)
    per_epoch = order.positions_per_epoch
    spans = [[order.locate(e * per_epoch + i) for i in range(per_epoch)] for e in range(6)]
    assert len({tuple(s.block_id for s in epoch) for epoch in spans}) == 6
    assert (
        len(
            {tuple((s.block_id, s.start) for s in sorted(epoch, key=lambda s: s.block_id)) for epoch in spans}
        )
        == 6
    )
    same = [next(s.position for s in epoch if (s.block_id, s.start) == (3, 20)) for epoch in spans]
    assert len({tuple(order.row_order(position)) for position in same}) == 6


def test_each_epoch_mixes_other_blocks_and_shuffles_the_chunks_of_one_block_otherwise():
    windows = {
        frozenset(c.block_id for c in chunk_order(0, e, [10] * 40, 10)[:WINDOW_BLOCKS]) for e in range(6)
    }
    assert len(windows) == 6
    assert len({tuple(chunk_order(0, epoch, [100], 5)) for epoch in range(6)}) == 6


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    assert chunk_order(np.int64(3), np.int32(1), [50] * 20, 7) == chunk_order(3, 1, [50] * 20, 7)
    assert ClaimOrder([50] * 20, 7, 7, seed=np.int64(3)).locate(5) == ClaimOrder(
        [50] * 20, 7, 7, seed=3
    ).locate(5)


def test_epochs_and_seeds_give_other_orders_and_the_same_arguments_the_same():
    samples = [100] * 20
    orders = {(seed, epoch): chunk_order(seed, epoch, samples, 10) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[0, 1] == chunk_order(0, 1, samples, 10)


def test_chunks_are_shuffled_within_windows_of_blocks():
    chunks = chunk_order(3, 0, [100] * 40, 10)
    window = 10 * WINDOW_BLOCKS
    for at in range(0, len(chunks), window):
        assert len({chunk.block_id for chunk in chunks[at : at + window]}) == WINDOW_BLOCKS
    assert [chunk.block_id for chunk in chunks[:window:10]] != sorted(c.block_id for c in chunks[:window:10])


def test_claims_and_rows_are_shuffled_differently_in_each_chunk_and_epoch():
    order = ClaimOrder([80] * 3, 80, 8, epochs=2)
    starts = [tuple(order.locate(chunk * 10 + i).start for i in range(10)) for chunk in range(6)]
    assert len(set(starts)) == 6
    assert len({tuple(order.row_order(position)) for position in range(order.num_positions)}) > 50


def test_the_shuffle_never_changes():
    # Written down once: a resumed run on another machine or version must continue the same order.
    assert permutation(8, "example", 0) == [2, 3, 0, 1, 7, 6, 5, 4]


def test_locating_in_a_quarter_of_a_million_chunks_is_cheap():
    order = ClaimOrder([100_000] * 10_000, 4_000, 160, epochs=3)
    assert order.num_positions == 3 * 10_000 * 25 * 25
    spans = [
        order.locate(position)
        for position in range(order.positions_per_epoch, order.positions_per_epoch + 2000)
    ]
    # One epoch and one window of blocks are laid out for all of them.
    assert order._epoch.cache_info().misses == 1
    assert order._window.cache_info().misses == 1
    assert all(span.epoch == 1 for span in spans)


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"claim_samples": 0}, {"epochs": 0}])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        ClaimOrder([5], **{"chunk_size": 2, "claim_samples": 1, **wrong})


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError, match="outside"):
        ClaimOrder([5], 2, 1).locate(position)
