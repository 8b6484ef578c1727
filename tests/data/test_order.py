"""The order is a pure function that visits each row exactly once per epoch."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf.data.order import WINDOW_BLOCKS, ClaimOrder, chunk_order, permutation
from metaflow_hf.errors import ConfigError

blocks = st.lists(st.integers(0, 60), min_size=0, max_size=25)
sizes = st.integers(1, 17)


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=100, deadline=None)
@given(blocks, sizes, st.integers(0, 5), st.integers(0, 2), st.booleans())
def test_chunk_order_covers_every_row_once_and_is_the_order_of_claims(samples, chunk, seed, epoch, shuffle):
    chunks = chunk_order(seed, epoch, samples, chunk, shuffle)
    rows = Counter((c.block_id, row) for c in chunks for row in range(c.start, c.stop))
    assert rows == Counter((b, r) for b, count in enumerate(samples) for r in range(count))
    order = ClaimOrder(samples, chunk, chunk, seed=seed, epochs=epoch + 1, shuffle=shuffle)
    first = epoch * order.positions_per_epoch
    spans = [order.locate(first + i) for i in range(order.positions_per_epoch)]
    assert [(s.block_id, s.chunk_id) for s in spans] == [(c.block_id, c.chunk_id) for c in chunks]


@settings(max_examples=100, deadline=None)
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
    began = time.perf_counter()
    spans = [
        order.locate(position)
        for position in range(order.positions_per_epoch, order.positions_per_epoch + 2000)
    ]
    assert time.perf_counter() - began < 0.5
    assert all(span.epoch == 1 for span in spans)


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"claim_samples": 0}, {"epochs": 0}])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        ClaimOrder([5], **{"chunk_size": 2, "claim_samples": 1, **wrong})


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError, match="outside"):
        ClaimOrder([5], 2, 1).locate(position)
