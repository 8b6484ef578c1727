"""Real processes that are killed, stopped and told to end; checked from the store's content alone."""

import json
import signal
import time
from pathlib import Path

import pytest
from soak.trainings import NUM_POSITIONS, Training, wait_until


@pytest.fixture
def training(tmp_path):
    training = Training(root=tmp_path, store=str(tmp_path / "store"))
    training.prepare()
    yield training
    training.kill_all()


@pytest.fixture
def root(training) -> Path:
    return training.root


@pytest.fixture
def workers(training):
    return training.start


def newest_round(root: Path) -> int:
    return len(list((root / "store/rounds").glob("*.json"))) - 1


def wait_for_round(root: Path, number: int) -> None:
    wait_until(lambda: newest_round(root) >= number, f"round {number} does not come")


def assert_exactly_once(root: Path, num_positions: int = NUM_POSITIONS) -> list[dict]:
    rounds = [json.loads(path.read_text()) for path in sorted((root / "store/rounds").glob("*.json"))]
    seen = [
        position
        for manifest in rounds
        for item in manifest["accepted"]
        for start, stop in item["positions"]
        for position in range(start, stop)
    ]
    assert sorted(seen) == list(range(num_positions))
    assert rounds[-1]["final"]
    return rounds


def test_a_worker_killed_in_the_middle_costs_its_claims_of_one_round(root, workers):
    victim, *others = workers(3)
    victim.await_claims(2)
    victim.send(signal.SIGKILL)
    began = time.monotonic()
    assert [worker.end() for worker in others] == [0, 0]
    assert time.monotonic() - began < 50, "a process that is gone from this machine needs no waiting"
    assert_exactly_once(root)


def test_a_zombie_drops_its_work_and_goes_on(root, workers):
    zombie, other = workers(2, minimum=1.0)
    zombie.await_claims(3)
    zombie.send(signal.SIGSTOP)
    wait_for_round(root, newest_round(root) + 4)
    zombie.send(signal.SIGCONT)
    assert [zombie.end(), other.end()] == [0, 0]
    rounds = assert_exactly_once(root)
    assert any(manifest["failures"] for manifest in rounds) == ("WorkLost" in zombie.events)


def test_a_worker_that_is_told_to_end_publishes_and_is_not_waited_for(root, workers):
    leaver, other = workers(2)
    leaver.await_claims(2)
    leaver.send(signal.SIGTERM)
    began = time.monotonic()
    assert leaver.end() != 0
    assert other.end() == 0
    assert time.monotonic() - began < 50
    rounds = assert_exactly_once(root)
    assert not any(manifest["failures"] for manifest in rounds)


def test_all_killed_and_started_again(root, workers):
    first = workers(2)
    wait_for_round(root, 2)
    for worker in first:
        worker.send(signal.SIGKILL)
        worker.end()
    assert [worker.end() for worker in workers(2)] == [0, 0]
    assert_exactly_once(root)


def test_a_worker_notices_that_its_parent_is_gone(root, workers):
    (parent,) = workers(1, as_child=True)
    wait_for_round(root, 1)
    child = int(parent.log.with_suffix(".pid").read_text())
    parent.send(signal.SIGKILL)
    wait_until(lambda: not is_running(child), "the orphan goes on")
    assert newest_round(root) < 200
    (other,) = workers(1)
    assert other.end() == 0
    assert_exactly_once(root)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
