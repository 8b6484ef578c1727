"""What workers tell is what the store says: rounds, contributions, lost work."""

from metaflow_hf.events import RoundClosed, WorkLost
from metaflow_hf.report import series
from metaflow_hf.train.announcements import Announcer
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.records import Payload, Round
from metaflow_hf.train.schedule import Budget

NOTHING = Payload(key="weights/x", digest="0" * 64, size=1)


def test_each_round_of_the_report_is_that_of_the_store(training):
    events = []
    spec = training.start()
    training.work(on_event=events.append)
    lineage = Lineage(training.store)
    labels = series.worker_labels(events)
    rows = series.round_rows(events, labels)
    assert [row.round for row in rows] == list(range(1, lineage.newest().number + 1))
    for row in rows:
        manifest = lineage.round(row.round).manifest
        assert row.tokens == sum(row.tokens_by_worker.values()) == sum(a.tokens for a in manifest.accepted)
    done = series.position_rounds(events)
    assert sorted(done) == list(range(spec.num_positions)), "those of the first round too"
    for position, (number, attempt) in done.items():
        (mine,) = [a for a in lineage.round(number).manifest.accepted if a.attempt == attempt]
        assert any(start <= position < stop for start, stop in mine.positions)


def test_what_died_with_its_worker_is_told_by_those_who_live():
    def round_of(number, failures):
        made = Round(nonce="n", round=number, parent=None, weights=NOTHING, failures=failures)
        return ClosedRound(manifest=made, digest="d")

    events = []
    for name in "ab":
        announcer = Announcer(attempt=name, budget=Budget(10), on_event=events.append, wall_clock=lambda: 0.0)
        announcer.closed(round_of(3, {5: 1}), round_of(4, {5: 2, 6: 1}), seconds=1.0, waited=0.5)
    assert [event.positions_lost for event in events] == [2, 2]
    # One of the two lives, and says why.
    events.append(WorkLost(time=1.0, worker="c", round=4, positions=1, reason="it was published too late"))
    (row,) = series.round_rows(events, {})
    assert isinstance(events[0], RoundClosed)
    assert row.lost_positions == 2
