"""What both ledgers promise, the standalone one and that of the rounds; each test runs over both."""

import random

import pytest

from metaflow_hf.data import Claim
from metaflow_hf.data.manifest import BlockEntry, BlockManifest
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.data.standalone import StandaloneLedger
from metaflow_hf.data.tracker import ChunkTracker
from metaflow_hf.errors import ClaimLost
from metaflow_hf.train.ledger import RoundLimits, RoundsLedger
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Payload, Round
from metaflow_hf.train.schedule import Budget

SAMPLES, CHUNK = (10, 7, 0, 1), 3
NUM_CHUNKS = 4 + 3 + 0 + 1
KEYS = {"epoch", "total_chunks", "done_chunks", "claimed_chunks", "done_samples", "workers"}


class Standalone:
    """Workers of one standalone tracker."""

    def __init__(self, store):
        self._store = store
        self._made = []
        blocks = [
            BlockEntry(
                block_id=i,
                sample_count=count,
                start_index=0,
                end_index=count,
                size_bytes=1,
                file_path=f"blocks/block_{i:05d}.jsonl",
            )
            for i, count in enumerate(SAMPLES)
        ]
        self._manifest = BlockManifest(
            dataset_name="d", total_samples=sum(SAMPLES), total_blocks=len(blocks), block_size=10,
            blocks=tuple(blocks), digest="x",
        )  # fmt: skip

    def worker(self) -> ChunkTracker:
        name = f"w{len(self._made)}"
        ledger = StandaloneLedger(
            self._store, lambda: self._manifest, chunk_size=CHUNK, worker_id=name, rng=random.Random(name)
        )
        self._made.append(ledger)
        return ChunkTracker(None, self._manifest, ledger=ledger)

    def commit(self) -> None:
        """Done is done at once."""

    def close(self) -> None:
        for ledger in self._made:
            ledger.close()


class Rounds:
    """Workers of one training by rounds; ``commit`` closes the round with all that they did."""

    def __init__(self, store):
        self._lineage = Lineage(store)
        self._made = []
        self._order = ClaimOrder(SAMPLES, CHUNK, CHUNK)
        self._number = -1
        self._done = Positions()
        self._close()

    def worker(self) -> ChunkTracker:
        name = f"w{len(self._made)}"
        ledger = RoundsLedger(
            self._lineage, self._order, attempt=name, rng=random.Random(name), clock=lambda: 0.0,
            limits=RoundLimits(budget=Budget(NUM_CHUNKS), seconds=100.0),
        )  # fmt: skip
        ledger.enter(self._base, contributors=1)
        self._made.append(ledger)
        return ChunkTracker(None, BlockManifest(dataset_name="d", total_samples=0, total_blocks=0, block_size=1,
                                                blocks=()), ledger=ledger)  # fmt: skip

    def commit(self) -> None:
        for ledger in self._made:
            self._done |= ledger.done
        self._close()
        for ledger in self._made:
            ledger.enter(self._base, contributors=1)

    def close(self) -> None:
        """Claims die with their round."""

    def _close(self) -> None:
        self._number += 1
        weights = Payload(key="weights/x", digest="0" * 64, size=1)
        self._base = self._lineage.create_round(
            Round(
                nonce="0",
                round=self._number,
                parent=None,
                weights=weights,
                done=self._done.to_json(),
                final=len(self._done) == NUM_CHUNKS,
            )
        )


@pytest.fixture(params=[Standalone, Rounds])
def training(request, memory_store):
    training = request.param(memory_store)
    yield training
    training.close()


def drain(*workers) -> list[Claim]:
    """The workers claim and complete in turn, until nobody gets anything."""
    claims: list[Claim] = []
    while True:
        before = len(claims)
        for worker in workers:
            claim = worker.claim_chunk()
            if claim is not None:
                worker.mark_chunk_complete(claim, steps=1)
                claims.append(claim)
        if len(claims) == before:
            return claims


def test_each_row_is_claimed_once_by_any_number_of_workers(training):
    claims = drain(*(training.worker() for _ in range(3)))
    rows = [(c.block_id, row) for c in claims for row in range(c.start, c.stop)]
    assert sorted(rows) == [(b, row) for b, count in enumerate(SAMPLES) for row in range(count)]
    assert len({claim.token for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.start // CHUNK == (claim.stop - 1) // CHUNK == claim.chunk_id
        assert (claim.epoch, claim.num_samples) == (0, claim.stop - claim.start)


def test_what_is_held_by_one_is_free_for_no_other(training):
    one, other = training.worker(), training.worker()
    held = one.claim_chunk()
    assert held.position not in {claim.position for claim in drain(other)}
    one.mark_chunk_complete(held, 1)


def test_an_epoch_is_complete_when_all_of_it_is(training):
    worker = training.worker()
    first = worker.claim_chunk()
    worker.mark_chunk_complete(first, 1)
    training.commit()
    assert not worker.check_epoch_complete()
    assert worker.is_chunk_trained(first.block_id, first.chunk_id)
    drain(worker)
    training.commit()
    assert worker.check_epoch_complete()
    assert worker.claim_chunk() is None
    assert all(
        worker.is_chunk_trained(block, chunk)
        for block, count in enumerate(SAMPLES)
        for chunk in range(-(-count // CHUNK))
    )


def test_a_chunk_that_is_only_claimed_is_not_trained(training):
    worker = training.worker()
    claim = worker.claim_chunk()
    assert not worker.is_chunk_trained(claim.block_id, claim.chunk_id)


@pytest.mark.parametrize("chunk", [(0, 4), (2, 0), (4, 0), (0, -1), (-1, 0)])
def test_a_chunk_that_is_none_is_refused(training, chunk):
    with pytest.raises(IndexError):
        training.worker().is_chunk_trained(*chunk)


def test_a_claim_that_is_not_held_cannot_be_completed(training):
    one, other = training.worker(), training.worker()
    claim = one.claim_chunk()
    with pytest.raises(ClaimLost):
        other.mark_chunk_complete(claim, 1)
    with pytest.raises(ClaimLost):
        other.release(claim)
    one.mark_chunk_complete(claim, 1)


def test_a_released_claim_is_lost_and_trained_by_others(training):
    worker = training.worker()
    claim = worker.claim_chunk()
    worker.release(claim)
    for call in (lambda: worker.release(claim), lambda: worker.mark_chunk_complete(claim, 1)):
        with pytest.raises(ClaimLost):
            call()
    # In rounds it is free again from the next one on.
    training.commit()
    assert claim.position in {again.position for again in drain(training.worker())}


def test_progress_counts_chunks_and_rows(training):
    worker = training.worker()
    before = worker.get_progress_stats()
    assert before.keys() >= KEYS
    assert (before["epoch"], before["total_chunks"]) == (0, NUM_CHUNKS)
    assert (before["done_chunks"], before["done_samples"], before["claimed_chunks"]) == (0, 0, 0)
    held = worker.claim_chunk()
    assert (worker.get_progress_stats()["claimed_chunks"], worker.get_progress_stats()["workers"]) == (1, 1)
    worker.mark_chunk_complete(held, 1)
    done = [held, *drain(worker)]
    training.commit()
    after = worker.get_progress_stats()
    assert after["done_chunks"] == len(done) == NUM_CHUNKS
    assert after["done_samples"] == sum(SAMPLES)


def test_both_give_the_chunk_of_a_position_that_the_order_says(training):
    order = ClaimOrder(SAMPLES, CHUNK, CHUNK)
    for claim in drain(training.worker()):
        span = order.locate(claim.position)
        assert (claim.block_id, claim.chunk_id, claim.start, claim.stop) == (
            span.block_id, span.chunk_id, span.start, span.stop,
        )  # fmt: skip
