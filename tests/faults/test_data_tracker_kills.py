"""Workers of one tracker as real processes: killed at any operation, stopped, restarted; each chunk once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from metaflow_hf.data import ChunkTracker, build_blocks

ROWS, BLOCK, CHUNK = 300, 100, 5
LEASE_SECONDS = 1.0

# Forks its workers, because starting Python costs more than all that they do. No thread runs in the parent.
WORKERS = """
import json, os, signal, sys, time
from pathlib import Path
from metaflow_hf.data import BlockManager, ChunkTracker
from metaflow_hf.errors import ClaimLost
from metaflow_hf.store import open_store

directory, lease_seconds = Path(sys.argv[1]), float(sys.argv[2])

class KillingStore:
    "Kills its process before or after the n-th operation that its main thread asks for."

    def __init__(self, inner, kill_at, where):
        self._inner, self._left, self._where = inner, kill_at, where

    def __getattr__(self, name):
        method = getattr(self._inner, name)

        def call(*args, **kwargs):
            import threading
            if threading.current_thread() is not threading.main_thread():
                return method(*args, **kwargs)
            self._left -= 1
            if self._left == 0 and self._where == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return method(*args, **kwargs)
            finally:
                if self._left == 0 and self._where == "after":
                    os.kill(os.getpid(), signal.SIGKILL)

        return call if callable(method) else method

def work(name, pause, kill_at, where, stop_at_claim):
    store = KillingStore(open_store(directory / "tracker"), kill_at, where)
    with BlockManager(directory / "blocks", dataset_chunk_size=5) as manager:
        with open(directory / f"{name}.log", "a", buffering=1) as out:
            tracker = ChunkTracker(store, manager, worker_id=name, lease_seconds=lease_seconds)
            while not tracker.check_epoch_complete():
                claim = tracker.claim_chunk()
                if claim is None:
                    time.sleep(0.05)
                    continue
                print(json.dumps(["claimed", claim.position, claim.token]), file=out)
                stop_at_claim -= 1
                if stop_at_claim == 0:
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(pause)
                try:
                    tracker.mark_chunk_complete(claim, 1)
                except ClaimLost:
                    print(json.dumps(["lost", claim.position, claim.token]), file=out)
                else:
                    print(json.dumps(["completed", claim.position, claim.token]), file=out)

def start(name, pause=0.0, kill_at=-1, where="", stop_at_claim=0, at_once=1):
    process = os.fork()
    if process == 0:
        try:
            (directory / f"{name}.pid").write_text(str(os.getpid()))
            while len(list(directory.glob("*.pid"))) < at_once:
                time.sleep(0.01)
            work(name, pause, kill_at, where, stop_at_claim)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process

for step in json.loads(sys.argv[3]):
    "The workers of a step run at once; those of the next begin when all have ended."
    workers = [start(**worker) for worker in step]
    ends = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    print(json.dumps(ends), flush=True)
"""


@pytest.fixture
def directory(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(ROWS)))
    build_blocks(raw, tmp_path / "blocks", samples_per_block=BLOCK)
    return tmp_path


@pytest.fixture
def start(directory):
    """Starts the workers of each step, one step after the other; the names are those of their logs."""
    started: list[subprocess.Popen] = []

    def begin(*steps: list[dict]) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKERS, str(directory), str(LEASE_SECONDS), json.dumps(steps)],
            env=os.environ, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ends_of(process: subprocess.Popen) -> list[list[int]]:
    """How the workers of each step ended."""
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


def test_killed_at_each_operation_of_a_claim_and_a_completion(directory, start):
    """Forty kills, before and after each of twenty operations in a row, then one worker that ends."""
    points = [(n, where) for n in range(1, 21) for where in ("before", "after")]
    steps = [[{"name": f"killed-{n}-{where}", "kill_at": n, "where": where}] for n, where in points]
    ends = ends_of(start(*steps, [{"name": "last"}]))
    assert ends == [[-signal.SIGKILL]] * len(points) + [[0]]
    check_exactly_once(directory)


def test_eight_share_a_tracker_and_some_are_killed(directory, start):
    process = start([{"name": f"w{i}", "pause": 0.1, "at_once": 8} for i in range(8)])
    for name in ("w1", "w2", "w3"):
        wait_for(lambda name=name: len(events(directory, name, "claimed")) >= 2)
        # It may have ended by itself on a machine that is busy.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid_of(directory, name), signal.SIGKILL)
    [ends] = ends_of(process)
    assert [ends[i] for i in (0, 4, 5, 6, 7)] == [0] * 5
    assert set(ends[1:4]) <= {0, -signal.SIGKILL}
    check_exactly_once(directory)


def test_a_stopped_worker_that_wakes_up_late_is_told_that_its_claim_is_lost(directory, start):
    sleeper = start([{"name": "sleeper", "stop_at_claim": 2}])
    wait_for(lambda: len(events(directory, "sleeper", "claimed")) == 2)
    *_, held = events(directory, "sleeper", "claimed")[-1]
    assert ends_of(start([{"name": "awake"}])) == [[0]]
    stat = Path(f"/proc/{pid_of(directory, 'sleeper')}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    os.kill(pid_of(directory, "sleeper"), signal.SIGCONT)
    assert ends_of(sleeper) == [[0]]
    check_exactly_once(directory)
    assert [token for *_, token in events(directory, "sleeper", "lost")] == [held]


def test_a_tracker_state_says_nothing_about_the_machine(directory):
    from metaflow_hf.data import BlockManager

    with BlockManager(directory / "blocks") as manager:
        tracker = ChunkTracker(directory / "tracker", manager, worker_id="w")
        tracker.mark_chunk_complete(tracker.claim_chunk(), 1)
        tracker.close()
    stored = b"".join(path.read_bytes() for path in (directory / "tracker").rglob("*") if path.is_file())
    assert str(directory).encode() not in stored


def check_exactly_once(directory: Path) -> None:
    """Each chunk has one record, of a claim that its worker was given; nobody else was told that it completed it."""
    records = [path for path in (directory / "tracker/done").rglob("*") if path.is_file()]
    assert len(records) == ROWS // CHUNK
    claimed, completed = {}, []
    for log in directory.glob("*.log"):
        claimed |= {token: position for _, position, token in events(directory, log.stem, "claimed")}
        completed += [(position, token) for _, position, token in events(directory, log.stem, "completed")]
    # A worker killed between the record and its log line has completed its chunk all the same.
    assert len(completed) == len(set(completed))
    recorded = {(int(path.name), json.loads(path.read_text())["token"]) for path in records}
    assert set(completed) <= recorded
    assert all(claimed[token] == position for position, token in recorded)


def pid_of(directory: Path, name: str) -> int:
    return int((directory / f"{name}.pid").read_text())


def events(directory: Path, name: str, kind: str) -> list:
    log = directory / f"{name}.log"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in found if event[0] == kind]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "what is waited for never came"
        time.sleep(0.02)
