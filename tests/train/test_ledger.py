"""Claims within one round."""

import random

import pytest

from metaflow_hf.data import BlockManager, ChunkTracker
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import ClaimLost
from metaflow_hf.store import open_store
from metaflow_hf.train import RoundsLedger
from metaflow_hf.train.ledger import RoundLimits
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Accepted, Payload, Round
from metaflow_hf.train.schedule import Budget, Schedule

NOTHING = Payload(key="weights/x", digest="0" * 64, size=1)


@pytest.fixture
def lineage(tmp_path) -> Lineage:
    return Lineage(open_store(tmp_path / "store"))


@pytest.fixture
def make(lineage):
    def make_ledger(attempt: str, *, seconds: float = 100.0, budget: Budget | None = None, clock=lambda: 0.0):
        return RoundsLedger(
            lineage,
            ClaimOrder([20], 20, 2, shuffle=False),
            attempt=attempt,
            limits=RoundLimits(budget=budget or Budget(10), seconds=seconds),
            clock=clock,
            rng=random.Random(attempt),
        )

    return make_ledger


def close(lineage, number, **fields):
    return lineage.create_round(Round(nonce="0", round=number, parent=None, weights=NOTHING, **fields))


def test_no_position_is_claimed_twice_in_a_round(lineage, make):
    base = close(lineage, 0)
    ledgers = [make(name) for name in "abc"]
    for ledger in ledgers:
        ledger.enter(base, contributors=1)
    claimed = []
    for _ in range(4):
        for ledger in ledgers:
            claim = ledger.claim()
            if claim is not None:
                claimed.append(claim.position)
                ledger.complete(claim, 1)
    assert len(claimed) == len(set(claimed)) == 10


def test_one_worker_claims_in_order_and_finds_the_rows(lineage, make):
    ledger = make("a")
    ledger.enter(close(lineage, 0), contributors=1)
    spans = []
    while (claim := ledger.claim()) is not None:
        spans.append((claim.position, claim.start, claim.stop))
        ledger.complete(claim, 1)
    assert spans == [(n, 2 * n, 2 * n + 2) for n in range(10)]


def test_each_contributor_begins_at_its_rank(lineage, make):
    accepted = [
        Accepted(attempt=name, positions=[], tokens=1, loss=0.0, delta_digest="") for name in ("c", "a", "b")
    ]
    base = close(lineage, 1, done=[(0, 2)], accepted=accepted)
    for name, position in (("a", 2), ("b", 3), ("c", 4)):
        ledger = make(name)
        ledger.enter(base, contributors=3)
        assert ledger.claim().position == position


def test_settled_and_hopeless_positions_are_left_alone(lineage, make):
    base = close(lineage, 1, done=[(0, 4)], skipped=[(5, 6)], failures={4: 5, 7: 4})
    ledger = make("a")
    ledger.enter(base, contributors=1)
    assert list(ledger.free()) == [6, 7, 8, 9]
    assert ledger.claim().position == 6


def test_a_worker_has_enough_when_its_share_is_done(lineage, make):
    ledger = make("a")
    ledger.enter(close(lineage, 0), contributors=3)
    count = 0
    while (claim := ledger.claim()) is not None:
        ledger.complete(claim, 1)
        count += 1
    assert count == 4


def test_the_time_box_ends_after_one_claim_at_least(lineage, make):
    now = [0.0]
    ledger = make("a", seconds=5.0, clock=lambda: now[0])
    ledger.enter(close(lineage, 0), contributors=1)
    now[0] = 50.0
    ledger.complete(ledger.claim(), 1)
    assert ledger.claim() is None


def test_the_budget_of_tokens_counts_what_the_others_will_have_done(lineage, make):
    ledger = make("a", budget=Budget(10, max_tokens=100))
    ledger.enter(close(lineage, 0, tokens=40), contributors=2)
    for _ in range(2):
        claim = ledger.claim()
        ledger.record(claim, tokens=15)
        ledger.complete(claim, 1)
    assert ledger.fraction() == 1.0
    assert ledger.claim() is None


def test_nothing_is_claimed_once_somebody_has_published_or_the_round_is_closed(lineage, make):
    base = close(lineage, 0)
    late = make("late")
    late.enter(base, contributors=1)
    claim = late.claim()
    close(lineage, 1)
    with pytest.raises(ClaimLost, match="round 1 was closed without this worker"):
        late.complete(claim, 1)
    assert late.claim() is None


def test_a_claim_is_completed_by_its_holder_only(lineage, make):
    base = close(lineage, 0)
    one, other = make("a"), make("b")
    one.enter(base, contributors=1)
    other.enter(base, contributors=1)
    claim = one.claim()
    with pytest.raises(ClaimLost):
        other.complete(claim, 1)
    one.release(claim)
    assert len(one.done) == 0


def test_the_tracker_of_users_stands_on_it(lineage, make, dataset_dir):
    ledger = make("a")
    ledger.enter(close(lineage, 0), contributors=1)
    with BlockManager(dataset_dir) as blocks:
        tracker = ChunkTracker(None, blocks, ledger=ledger)
        claim = tracker.claim_chunk()
        tracker.mark_chunk_complete(claim, 3)
        assert not tracker.is_chunk_trained(0, 0), "done means: in the model"
        assert tracker.get_progress_stats()["done_chunks"] == 0
        ledger.enter(close(lineage, 1, done=[(0, 10)], final=True), contributors=1)
        assert tracker.is_chunk_trained(0, 0)
        assert tracker.check_epoch_complete()
        tracker.start_new_epoch()
        assert tracker.get_progress_stats()["done_chunks"] == 10


def test_the_schedule_warms_up_and_falls():
    schedule = Schedule(1.0, "cosine", 0.1, 0.2)
    rates = [schedule.at(number / 100) for number in range(101)]
    assert 0 < rates[0] < rates[5] < rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.2)
    assert Schedule(1.0, "linear", 0.0, 0.0).at(0.25) == pytest.approx(0.75)
    assert Schedule(1.0, "constant", 0.0, 0.5).at(1.0) == 1.0


def test_a_run_ends_with_its_data_or_its_tokens():
    assert Budget(10).fraction(5, 1_000) == 0.5
    assert Budget(10, 2_000).fraction(2, 1_500) == 0.75
    assert Budget(10, 2_000).fraction(9, 100) == 0.9
    assert Budget(10).planned_tokens(5, 1_000) == 2_000


def test_what_is_foreseen_is_claimed_next_unless_somebody_was_faster(lineage, make):
    base = close(lineage, 0)
    ours, theirs = make("a"), make("b")
    for ledger in (ours, theirs):
        ledger.enter(base, contributors=2)
    for _ in range(2):
        claim = ours.claim()
        foreseen = ours.foresee()
        assert foreseen == ours.foresee(), "one guess until it is used"
        assert foreseen.position != claim.position
        ours.complete(claim, 1)
        following = ours.claim()
        assert (following.position, following.start) == (foreseen.position, foreseen.start)
        ours.complete(following, 1)
    in_hand = ours.claim()
    position = ours.foresee().position
    while (claim := theirs.claim()) is not None and claim.position != position:
        theirs.complete(claim, 1)
    ours.complete(in_hand, 1)
    following = ours.claim()
    assert following is None or following.position != position


def test_after_the_last_position_nothing_is_foreseen(lineage, make):
    ledger = make("a")
    ledger.enter(close(lineage, 0, done=[(0, 9)]), contributors=1)
    claim = ledger.claim()
    assert ledger.foresee() is None
    ledger.complete(claim, 1)
    assert ledger.claim() is None


def test_whoever_is_to_be_alone_gives_way_to_whoever_claimed_first(lineage, make):
    """Also when the other's claim came between the look at the round and the own claim."""
    base = close(lineage, 0)
    first, second, third = make("a"), make("b"), make("c")
    for ledger in (first, second, third):
        ledger.enter(base, contributors=1, alone=True)
    third.foresee()
    assert first.claim().position == 0
    assert second.claim() is None
    assert third.claim() is None
