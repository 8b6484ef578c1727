"""Machines that are taken away: what is finished is published, and what the process told stays."""

import threading

import pytest

from metaflow_hf.errors import StoreUnavailable, TrainingIncomplete
from metaflow_hf.events import ClaimDone, DeltaPublished, Notice, RoundClosed, StepDone
from metaflow_hf.report import parse_events
from metaflow_hf.train.closing import Pace
from metaflow_hf.train.engine import Engine
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.stopping import GraceOver, StopReasons
from metaflow_hf.train.stored_metrics import StoredMetrics, stored_metrics


class After:
    """Counts finished claims, and calls ``then`` after so many."""

    def __init__(self, count, then):
        self.left = count
        self.then = then
        self.events = []

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, ClaimDone):
            self.left -= 1
            if self.left == 0:
                self.then()


def test_a_spot_notice_stops_like_a_signal(training, tmp_path):
    notice = tmp_path / "spot_termination_notice"
    training.start(rounds={"seconds": 60.0})
    listen = After(3, lambda: notice.write_text("2026-01-01T00:00:00Z"))
    with pytest.raises(TrainingIncomplete, match=r"about to be taken away .*spot_termination_notice"):
        training.work(notice=notice, on_event=listen)
    notice.unlink()
    training.work(notice=notice)
    closed = Lineage(training.store).round(1).manifest
    assert (closed.done, closed.failures) == ([(0, 3)], {})


def test_a_step_that_is_longer_than_the_grace_time_is_left_in_the_middle(training, monkeypatch):
    """As with a long context: there is no end of the step to wait for."""
    stop = threading.Event()
    listen = After(2, lambda: roll_out_from_now_on.append(True))
    roll_out_from_now_on = []
    passes = []
    plain = Engine._loss_and_norm

    def with_a_stop_in_it(self, batches):
        if roll_out_from_now_on:
            passes.append(len(passes))
            stop.set()
        return plain(self, batches)

    monkeypatch.setattr(Engine, "_loss_and_norm", with_a_stop_in_it)
    training.start(rounds={"seconds": 60.0})
    with pytest.raises(TrainingIncomplete, match="told to stop"):
        training.work(stop=stop, on_event=listen, pace=Pace(grace=0.0))
    assert passes == [0]
    steps = [event for event in listen.events if isinstance(event, StepDone)]
    claims = [event for event in listen.events if isinstance(event, ClaimDone)]
    assert sum(step.tokens for step in steps) == sum(claim.tokens for claim in claims), "no step ended after"
    delta, _ = Lineage(training.store).delta(0, listen.events[0].worker)
    assert delta.positions == [(0, 2)]
    assert (delta.released, delta.failed, delta.inner) == ([(2, 3)], [], None)
    monkeypatch.undo()
    training.work()
    assert all(not m.failures for m in manifests(training.store))


def manifests(store):
    lineage = Lineage(store)
    return [lineage.round(number).manifest for number in range(lineage.newest().number + 1)]


def test_the_grace_time_begins_when_the_reason_is_first_seen():
    now = [0.0]
    stop = threading.Event()
    reasons = StopReasons(stop, grace=5.0, clock=lambda: now[0])
    now[0] = 100.0
    reasons.raise_when_over()
    assert reasons() is None
    stop.set()
    reasons.raise_when_over()
    now[0] = 104.9
    reasons.raise_when_over()
    now[0] = 105.0
    with pytest.raises(GraceOver, match="given up after 5 s: it was told to stop"):
        reasons.raise_when_over()


def test_the_configuration_says_how_long(training):
    """No time at all: the claim in hand is dropped with its first step."""
    stop = threading.Event()
    steps = []

    def listen(event):
        if isinstance(event, StepDone):
            steps.append(event)
            stop.set()

    training.start(rounds={"grace_seconds": 0.0, "claim_samples": 10}, data={"batch_size": 2})
    with pytest.raises(TrainingIncomplete):
        training.work(stop=stop, on_event=listen)
    assert len(steps) == 1


# ---- what it told


def test_the_metrics_of_a_killed_process_survive_it(training):
    class Killed(BaseException):
        pass

    left = {}

    def die():
        # What a process leaves that has no time for anything.
        left.update(stored_metrics(training.store))
        raise Killed

    told = After(3, die)
    training.start(rounds={"seconds": 1e-6})
    with pytest.raises(Killed):
        training.work(on_event=told)
    (attempt,) = left
    stored = parse_events(left[attempt])
    assert stored == told.events[: len(stored)]
    assert any(isinstance(event, DeltaPublished) for event in stored)
    rest = After(1000, lambda: None)
    training.work(on_event=rest)
    texts = stored_metrics(training.store)
    assert len(texts) == 2
    (other,) = texts.keys() - {attempt}
    assert parse_events(texts[other]) == rest.events, "one that ends in order tells everything"


def closed(number, time):
    return RoundClosed(
        time=time,
        worker="a",
        round=number,
        contributors=1,
        tokens=1,
        tokens_total=number,
        positions_done=1,
        positions_total=9,
        loss=1.0,
        seconds=1.0,
        waited_seconds=0.0,
        final=False,
    )


def test_pieces_become_rarer_so_that_they_stay_few(training):
    now = [0.0]
    metrics = StoredMetrics(training.store, "a", interval=10.0, clock=lambda: now[0])
    minutes = 24 * 60
    for number in range(minutes):
        now[0] = number * 60.0
        metrics(closed(number, now[0]))
    metrics.close()
    metrics.close()
    assert len(list(training.store.list("metrics"))) < 400
    texts = stored_metrics(training.store)
    assert [event.round for event in parse_events(texts["a"])] == list(range(minutes))


def test_an_outage_delays_metrics_and_nothing_else(training, monkeypatch, caplog):
    now = [0.0]
    metrics = StoredMetrics(training.store, "a", clock=lambda: now[0])
    with monkeypatch.context() as patch:

        def fail(key, data):
            raise StoreUnavailable("no answer")

        patch.setattr(training.store, "put", fail)
        metrics(closed(1, 0.0))
    assert "could not be stored" in caplog.text
    now[0] = 5.0
    metrics(closed(2, 5.0))
    assert stored_metrics(training.store) == {}, "not before the pause is over"
    metrics(Notice(time=6.0, worker="a", message="one more"))
    metrics.close()
    assert len(parse_events(stored_metrics(training.store)["a"])) == 3
