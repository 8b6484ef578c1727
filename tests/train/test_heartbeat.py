"""Who is given up, and when."""

import json
import subprocess
import sys

import pytest

from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import open_store
from metaflow_hf.train.heartbeat import (
    Heartbeat,
    Patience,
    Watch,
    give_up_earlier_attempts,
    process_is_gone,
    this_process,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


def beating(store, clock, **settings) -> Heartbeat:
    heart = Heartbeat(store, "a", patience=Patience(**settings), process=None, clock=clock)
    heart.begin()
    return heart


def test_without_progress_a_worker_is_given_up_after_its_allowance(store, clock):
    heart = beating(store, clock, minimum=60, first_step=60)
    watch = Watch(store, clock=clock)
    for _ in range(5):
        clock.now += 50
        heart.progress(step=True)
        assert not watch.expired("a")
    allowance = heart.allowance
    assert allowance == 250
    clock.now += allowance - 1
    assert not watch.expired("a")
    clock.now += 1
    assert watch.expired("a")
    assert not watch.expired("a", factor=2.0)


def test_the_first_step_may_take_long(store, clock):
    heart = beating(store, clock)
    watch = Watch(store, clock=clock)
    watch.expired("a")
    clock.now += 899
    assert not watch.expired("a")
    heart.progress(step=True)
    assert heart.allowance == 60


def test_an_observer_needs_two_reads_of_its_own(store, clock):
    beating(store, clock, minimum=10, first_step=10)
    clock.now += 10_000
    watch = Watch(store, clock=clock)
    assert not watch.expired("a")
    clock.now += 10
    assert watch.expired("a")


def test_a_transfer_asks_for_the_time_it_may_take(store, clock):
    heart = beating(store, clock, first_step=60)
    heart.expect(num_bytes=2_000_000_000)
    assert json.loads(store.get("heartbeats/a"))["allowance_seconds"] == 1060


def test_beats_are_written_only_now_and_then(store, clock):
    heart = beating(store, clock, interval=2.0)
    heart.progress(step=True)
    before = store.get("heartbeats/a")
    for _ in range(10):
        clock.now += 0.1
        heart.progress(step=True)
    assert store.get("heartbeats/a") == before
    clock.now += 2
    heart.progress(step=True)
    assert store.get("heartbeats/a") != before


def test_whoever_left_is_not_waited_for(store, clock):
    heart = beating(store, clock)
    watch = Watch(store, clock=clock)
    assert not watch.expired("a")
    heart.leave()
    assert watch.expired("a")


def test_movement_is_seen_once_and_remembered(store, clock):
    heart = beating(store, clock)
    watch = Watch(store, clock=clock)
    assert not watch.moves("a")
    heart.progress(step=True)
    assert watch.moves("a")
    assert watch.moves("a")


def test_an_outage_does_not_stop_the_work(store, clock, monkeypatch, caplog):
    heart = beating(store, clock)

    def fail(key, data):
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(store, "put", fail)
    clock.now += 10
    heart.progress(step=True)
    assert "could not be written" in caplog.text


def test_a_process_of_this_machine_that_is_gone_is_known_at_once(store, clock):
    code = (
        "import json; from metaflow_hf.train.heartbeat import this_process; print(json.dumps(this_process()))"
    )
    gone = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert process_is_gone(gone)
    here = this_process()
    assert here is not None
    assert not process_is_gone(here)
    assert process_is_gone({**here, "started": "1"}), "the same number, another process"
    assert not process_is_gone({**gone, "boot": "another machine"})
    assert not process_is_gone({**gone, "namespace": "another container"})
    Heartbeat(store, "a", patience=Patience(), process=gone, clock=clock).begin()
    assert Watch(store, clock=clock).expired("a")


def test_a_retry_gives_up_the_attempts_before_it_and_nobody_else(store, clock):
    for attempt, task in (("a", "Flow/1/train/2"), ("b", "Flow/1/train/3"), ("c", None)):
        Heartbeat(store, attempt, patience=Patience(), process=None, task=task, clock=clock).begin()
    give_up_earlier_attempts(store, "Flow/1/train/2")
    watch = Watch(store, clock=clock)
    assert [watch.expired(attempt) for attempt in "abc"] == [True, False, False]
