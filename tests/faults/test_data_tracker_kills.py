"""Workers of one tracker as real processes: some are killed, some are stopped; each chunk is completed once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metaflow_hf.data import ChunkTracker, build_blocks

ROWS, BLOCK, CHUNK = 600, 100, 5

WORKER = """
import json, sys, time
from metaflow_hf.data import BlockManager, ChunkTracker
from metaflow_hf.errors import ClaimLost

dataset, root, log, name, pause = sys.argv[1:]
with BlockManager(dataset, dataset_chunk_size=5) as manager:
    tracker = ChunkTracker(root, manager, worker_id=name, lease_seconds=1.0)
    with open(log, "a", buffering=1) as out:
        while not tracker.check_epoch_complete():
            claim = tracker.claim_chunk()
            if claim is None:
                time.sleep(0.05)
                continue
            print(json.dumps(["claimed", claim.position, claim.token]), file=out)
            time.sleep(float(pause))
            try:
                tracker.mark_chunk_complete(claim, 1)
            except ClaimLost:
                print(json.dumps(["lost", claim.position, claim.token]), file=out)
            else:
                print(json.dumps(["completed", claim.position, claim.token]), file=out)
"""


@pytest.fixture
def dataset(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(ROWS)))
    return tmp_path, build_blocks(raw, tmp_path / "blocks", samples_per_block=BLOCK)


@pytest.fixture
def start_worker(dataset):
    directory, _ = dataset
    workers: list[subprocess.Popen] = []

    def start(name: str, pause: float = 0.01) -> subprocess.Popen:
        log = directory / f"{name}.log"
        arguments = [directory / "blocks", directory / "tracker", log, name, pause]
        process = subprocess.Popen([sys.executable, "-c", WORKER, *map(str, arguments)], env=os.environ)
        workers.append(process)
        return process

    yield start
    for process in workers:
        process.kill()
        process.wait()


def test_two_of_four_are_killed_and_each_chunk_is_completed_exactly_once(dataset, start_worker):
    directory, manifest = dataset
    workers = [start_worker(f"w{i}") for i in range(4)]
    _wait_for(directory / "w1.log", "claimed", 8)
    workers[1].kill()
    _wait_for(directory / "w2.log", "claimed", 12)
    workers[2].kill()
    assert [workers[0].wait(60), workers[3].wait(60)] == [0, 0]
    _check_exactly_once(directory, manifest)


def test_all_are_killed_and_one_restart_finishes(dataset, start_worker):
    directory, manifest = dataset
    workers = [start_worker(f"w{i}") for i in range(2)]
    for i, worker in enumerate(workers):
        _wait_for(directory / f"w{i}.log", "claimed", 10)
        worker.kill()
        worker.wait()
    assert start_worker("late").wait(60) == 0
    _check_exactly_once(directory, manifest)


def test_a_stopped_worker_that_wakes_up_late_is_told_that_its_claim_is_lost(dataset, start_worker):
    directory, manifest = dataset
    sleeper = start_worker("sleeper", pause=0.3)
    _wait_for(directory / "sleeper.log", "claimed", 3)
    sleeper.send_signal(signal.SIGSTOP)
    assert start_worker("awake").wait(60) == 0
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(60) == 0
    _check_exactly_once(directory, manifest)
    assert len(_events(directory / "sleeper.log", "lost")) == 1


def _check_exactly_once(directory: Path, manifest) -> None:
    num_chunks = ROWS // CHUNK
    done = [path for path in (directory / "tracker/done").rglob("*") if path.is_file()]
    assert len(done) == num_chunks
    claimed, completed = {}, []
    for log in directory.glob("*.log"):
        claimed |= {token: position for _, position, token in _events(log, "claimed")}
        completed += [position for _, position, _ in _events(log, "completed")]
    # A worker killed between the record and its log line has completed its chunk all the same.
    assert len(completed) == len(set(completed))
    assert set(completed) <= {int(path.name) for path in done}
    for path in done:
        assert claimed[json.loads(path.read_text())["token"]] == int(path.name)


def _events(log: Path, kind: str) -> list:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event[0] == kind]


def _wait_for(log: Path, kind: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(_events(log, kind)) < count:
        assert time.monotonic() < deadline, f"{log.name} never came to {count} x {kind}"
        time.sleep(0.02)


def test_a_tracker_state_says_nothing_about_the_machine(dataset, start_worker):
    directory, manifest = dataset
    tracker = ChunkTracker(directory / "tracker", manifest, worker_id="w")
    tracker.mark_chunk_complete(tracker.claim_chunk(), 1)
    tracker.close()
    stored = b"".join(path.read_bytes() for path in (directory / "tracker").rglob("*") if path.is_file())
    assert str(directory).encode() not in stored
