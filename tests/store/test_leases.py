"""A lease is held while its heartbeat moves, and by one at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metaflow_hf.store import ObjectStore, leases, open_store


class Clock:
    """A clock that moves when told, or when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_one_of_many_gets_it(store: ObjectStore):
    barrier = threading.Barrier(6)
    held = []

    def acquire(n: int) -> None:
        barrier.wait()
        lease = leases.acquire(store, "leases/job", owner=str(n), ttl=20)
        if lease is not None:
            held.append(lease)

    threads = [threading.Thread(target=acquire, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert leases.holder(store, "leases/job")["owner"] == held[0].owner
    held[0].release()


def test_released_is_free_at_once_with_a_higher_term(store: ObjectStore):
    with leases.acquire(store, "l/job", owner="a", ttl=20) as first:
        assert leases.acquire(store, "l/job", owner="b", ttl=20) is None
    with leases.acquire(store, "l/job", owner="b", ttl=20) as second:
        assert second.term == first.term + 1


def test_expiry_needs_two_own_reads_a_ttl_apart(store: ObjectStore):
    clock = Clock()
    observer = leases.Observer(clock=clock)
    dead = leases.acquire(store, "l/job", owner="dead", ttl=20, renew=False)

    def attempt() -> leases.Lease | None:
        return leases.acquire(store, "l/job", owner="next", ttl=20, observer=observer, renew=False)

    clock.now = 1_000_000  # however old it may look, the first read proves nothing
    assert attempt() is None
    clock.now += 19.9
    assert attempt() is None
    dead.renew()  # it lives after all
    clock.now += 0.2
    assert attempt() is None
    clock.now += 20
    taken = attempt()
    assert taken is not None
    dead.renew()
    assert dead.lost
    assert not taken.lost


def test_a_lost_lease_does_not_free_the_new_holders(store: ObjectStore):
    clock = Clock()
    observer = leases.Observer(clock=clock)
    zombie = leases.acquire(store, "l/job", owner="zombie", ttl=20, renew=False)
    leases.acquire(store, "l/job", owner="next", ttl=20, observer=observer, renew=False)
    clock.now += 20
    assert leases.acquire(store, "l/job", owner="next", ttl=20, observer=observer, renew=False) is not None
    zombie.release()
    assert leases.acquire(store, "l/job", owner="third", ttl=20, renew=False) is None


def test_a_holder_that_died_before_its_first_heartbeat_expires_too(store: ObjectStore):
    store.create("l/job/0000000001.json", b"{}")
    clock = Clock()
    lease = leases.wait_for(store, "l/job", owner="next", ttl=20, clock=clock, sleep=clock.sleep)
    assert lease is not None
    assert lease.term == 2
    assert 20 <= clock.now < 25
    lease.release()


def test_a_waiter_leaves_when_the_job_is_done(store: ObjectStore):
    clock = Clock()
    with leases.acquire(store, "l/job", owner="a", ttl=20):
        assert leases.wait_for(
            store, "l/job", owner="b", ttl=20, done=lambda: clock.now > 3, clock=clock, sleep=clock.sleep
        ) is None  # fmt: skip
    assert 3 < clock.now < 6


_HOLDER = """
import sys, time
from metaflow_hf.store import leases, open_store
lease = leases.acquire(open_store(sys.argv[1]), "l/job", owner="child", ttl=1.0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_holder_is_followed_after_its_ttl(tmp_path: Path, how: signal.Signals):
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        store = open_store(tmp_path)
        observer = leases.Observer()
        beats = set()
        while len(beats) < 5:  # renewed by its thread, however slowly on a busy machine
            assert leases.acquire(store, "l/job", owner="me", ttl=60, observer=observer) is None
            beats.update(store.get(info.key) for info in store.list("l/job") if "heartbeat" in info.key)
            time.sleep(0.05)
        os.kill(child.pid, how)
        began = time.monotonic()
        lease = leases.wait_for(store, "l/job", owner="me", ttl=1.0)
        assert lease is not None
        assert time.monotonic() - began >= 0.9
        lease.release()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
