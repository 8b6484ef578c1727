"""Each chunk exactly once per epoch, whoever asks, dies, sleeps or comes late."""

import itertools
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from metaflow_hf.data import BlockManager, ChunkTracker, build_blocks
from metaflow_hf.data.epoch import THOUSAND, EpochRecords
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.manifest import BlockEntry, BlockManifest
from metaflow_hf.data.standalone import StandaloneLedger
from metaflow_hf.errors import ClaimLost, ConfigError, DatasetMismatch, StoreUnavailable, UserError
from metaflow_hf.store.leases import Observer


def manifest_of(*samples: int, is_complete: bool = True) -> BlockManifest:
    blocks, start = [], 0
    for number, count in enumerate(samples):
        blocks.append(BlockEntry(block_id=number, sample_count=count, start_index=start, end_index=start + count,
                                 file_path=f"blocks/block_{number:05d}.jsonl", size_bytes=1))  # fmt: skip
        start += count
    return BlockManifest(dataset_name="d", total_samples=start, total_blocks=len(blocks), block_size=max(samples, default=1),
                         blocks=tuple(blocks), is_complete=is_complete, digest=f"digest-{start}")  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def worker(memory_store):
    """Makes ledgers of one tracker; each has a clock of its own, as workers on other machines do."""
    made = []

    def make(samples=(10, 10, 5), chunk_size=3, **settings) -> StandaloneLedger:
        clock = settings.pop("clock", Clock())
        manifest = settings.pop("manifest", None) or manifest_of(*samples)
        store = settings.pop("store", memory_store)
        ledger = StandaloneLedger(
            store, lambda: manifest, chunk_size=chunk_size, worker_id=f"w{len(made)}",
            rng=random.Random(len(made)), observer=Observer(clock=clock), **settings,
        )  # fmt: skip
        ledger.clock = clock
        made.append(ledger)
        return ledger

    yield make
    for ledger in made:
        ledger.close()


def drain(ledger) -> list[Claim]:
    claims = []
    while (claim := ledger.claim()) is not None:
        ledger.complete(claim, 1)
        claims.append(claim)
    return claims


def test_one_worker_gets_every_chunk_once_and_then_nothing(worker):
    ledger = worker()
    claims = drain(ledger)
    rows = Counter((c.block_id, row) for c in claims for row in range(c.start, c.stop))
    assert rows == Counter((block, row) for block, count in enumerate((10, 10, 5)) for row in range(count))
    assert ledger.is_epoch_complete()
    assert ledger.claim() is None
    assert ledger.progress() == {
        "epoch": 0, "total_chunks": 10, "done_chunks": 10, "claimed_chunks": 0, "done_samples": 25, "workers": 0,
    }  # fmt: skip


def test_many_workers_in_turn_share_without_overlap(worker):
    ledgers = [worker(samples=(40, 40, 7)) for _ in range(5)]
    claimed = []
    for ledger in itertools.cycle(ledgers):
        claim = ledger.claim()
        if claim is None:
            break
        claimed.append((ledger, claim))
    assert len(claimed) == 14 + 14 + 3
    assert len({claim.position for _, claim in claimed}) == 31
    stats = ledgers[0].progress()
    assert (stats["claimed_chunks"], stats["workers"], stats["done_chunks"]) == (31, 5, 0)
    for ledger, claim in claimed:
        ledger.complete(claim, 1)
    assert all(ledger.is_epoch_complete() for ledger in ledgers)


def test_threads_of_one_worker_and_workers_at_once_never_share_a_chunk(worker):
    ledgers = [worker(samples=(100, 100)) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(drain, ledgers * 2))
    positions = [claim.position for part in parts for claim in part]
    assert sorted(positions) == list(range(68))


def test_a_dead_workers_claim_is_taken_over_after_its_ttl_on_the_observers_own_clock(worker, memory_store):
    dead, alive = worker(samples=(3,), lease_seconds=60), worker(samples=(3,), lease_seconds=60)
    lost = dead.claim()
    _silence(dead)
    assert alive.claim() is None, "first look"
    alive.clock.now += 59
    assert alive.claim() is None, "not yet"
    alive.clock.now += 1
    taken = alive.claim()
    assert (taken.position, taken.token != lost.token) == (lost.position, True)
    with pytest.raises(ClaimLost, match="taken over"):
        dead.complete(lost, 1)
    alive.complete(taken, 1)
    with pytest.raises(ClaimLost, match="not held"):
        dead.complete(lost, 1)
    assert alive.is_epoch_complete()


def test_a_living_workers_claim_is_not_taken_however_long_it_takes(worker):
    slow, other = worker(samples=(3,), lease_seconds=60), worker(samples=(3,), lease_seconds=60)
    claim = slow.claim()
    for _ in range(5):
        other.clock.now += 50
        _renew(slow)
        assert other.claim() is None
    slow.complete(claim, 1)


def test_a_zombie_that_completes_first_wins_and_the_other_is_told(worker):
    zombie, other = worker(samples=(3,), lease_seconds=60), worker(samples=(3,), lease_seconds=60)
    first = zombie.claim()
    _silence(zombie)
    other.claim()
    other.clock.now += 60
    second = other.claim()
    # The zombie looked at its lease before it was taken over, and creates its record after that.
    records = zombie._records
    assert records.create_done(first.position, {"token": first.token, "worker": "w0", "steps": 1})
    with pytest.raises(ClaimLost, match="completed by another"):
        other.complete(second, 1)
    assert other.is_epoch_complete()


def test_a_released_claim_is_free_at_once(worker):
    one, two = worker(samples=(3,)), worker(samples=(3,))
    claim = one.claim()
    assert two.claim() is None
    one.release(claim)
    again = two.claim()
    assert again.position == claim.position
    with pytest.raises(ClaimLost):
        one.complete(claim, 1)
    with pytest.raises(ClaimLost):
        one.release(claim)
    two.complete(again, 1)
    two.complete(again, 1)


def test_closing_gives_claims_back(worker):
    one, two = worker(samples=(6,)), worker(samples=(6,))
    one.claim()
    one.claim()
    one.close()
    assert len(drain(two)) == 2


def test_is_chunk_trained(worker):
    ledger = worker(samples=(7, 3))
    assert not ledger.is_chunk_trained(0, 2)
    drain(ledger)
    assert ledger.is_chunk_trained(0, 2)
    assert worker(samples=(7, 3)).is_chunk_trained(1, 0)
    with pytest.raises(IndexError):
        ledger.is_chunk_trained(0, 3)
    with pytest.raises(IndexError):
        ledger.is_chunk_trained(2, 0)


def test_a_new_epoch_has_another_order_and_comes_once_however_many_ask(worker):
    ledgers = [worker(samples=(60, 60)) for _ in range(3)]
    with pytest.raises(UserError, match="0 of 40"):
        ledgers[0].start_new_epoch()
    first = drain(ledgers[0])
    for ledger in ledgers:
        assert ledger.is_epoch_complete()
        ledger.start_new_epoch()
    assert {ledger.progress()["epoch"] for ledger in ledgers} == {1}
    second = drain(ledgers[1])
    chunks = [
        [(c.block_id, c.chunk_id) for c in sorted(part, key=lambda c: c.position)] for part in (first, second)
    ]
    assert sorted(chunks[0]) == sorted(chunks[1])
    assert chunks[0] != chunks[1]
    assert {c.epoch for c in second} == {1}
    assert worker(samples=(60, 60)).progress()["epoch"] == 1, "a restart goes on in the newest epoch"


def test_a_claim_of_the_last_epoch_can_still_be_completed(worker):
    slow, fast = worker(samples=(6,), lease_seconds=60), worker(samples=(6,), lease_seconds=60)
    claim = slow.claim()
    drain(fast)
    assert not fast.is_epoch_complete()
    slow.complete(claim, 1)
    fast.start_new_epoch()
    slow.start_new_epoch()
    assert (slow.progress()["epoch"], slow.progress()["done_chunks"]) == (1, 0)


def test_many_threads_and_workers_that_start_an_epoch_at_once_start_one(worker):
    ledgers = [worker(samples=(60,)) for _ in range(8)]
    drain(ledgers[0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda ledger: ledger.start_new_epoch(), ledgers))
    assert {ledger.progress()["epoch"] for ledger in ledgers} == {1}
    assert ledgers[0]._store.children("epochs") == ["00000.json", "00001.json"]
    assert len(drain(ledgers[3])) == 20


def test_a_worker_that_slept_through_an_epoch_catches_up_one_by_one(worker):
    awake, asleep = worker(samples=(9,)), worker(samples=(9,))
    for _ in range(2):
        drain(awake)
        awake.start_new_epoch()
    assert asleep.claim() is None
    asleep.start_new_epoch()
    assert (asleep.progress()["epoch"], asleep.is_epoch_complete()) == (1, True)
    asleep.start_new_epoch()
    assert len(drain(asleep)) == 3


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"chunk_size": 4}, {"shuffle": False}, {"samples": (10, 10, 6)}]
)
def test_another_order_for_the_same_tracker_is_refused(other, worker):
    worker()
    with pytest.raises(DatasetMismatch, match=r"other chunks"):
        worker(**other)


def test_a_growing_dataset_is_tracked_from_its_first_block(worker):
    now = [manifest_of(10, is_complete=False)]
    ledger = worker()
    ledger.close()
    growing = StandaloneLedger(
        ledger._store.child("growing"), lambda: now[0], chunk_size=3, worker_id="g", lease_seconds=60
    )
    claims = drain(growing)
    assert [claim.position for claim in sorted(claims, key=lambda c: c.position)] == [0, 1, 2, 3]
    assert not growing.is_epoch_complete()
    now[0] = manifest_of(10, 10, 4)
    claims += drain(growing)
    assert len({(c.block_id, c.start) for c in claims}) == len(claims) == 10
    assert growing.is_epoch_complete()
    again = StandaloneLedger(
        ledger._store.child("growing"), lambda: now[0], chunk_size=3, worker_id="h", lease_seconds=60
    )
    assert again.claim() is None
    assert again.is_epoch_complete()


def test_a_dataset_that_grows_is_not_complete_because_its_thousands_are_full(memory_store, monkeypatch):
    monkeypatch.setattr("metaflow_hf.data.epoch.THOUSAND", 2)
    monkeypatch.setattr("metaflow_hf.data.standalone.THOUSAND", 2)
    now = [manifest_of(12, is_complete=False)]
    growing = StandaloneLedger(memory_store, lambda: now[0], chunk_size=3, worker_id="g", lease_seconds=60)
    assert len(drain(growing)) == 4
    assert not growing.is_epoch_complete()
    now[0] = manifest_of(12, 3)
    assert not growing.is_epoch_complete()
    assert len(drain(growing)) == 1
    assert growing.is_epoch_complete()


@pytest.mark.parametrize("thousand", [3, 1000])
def test_a_dataset_that_ends_between_two_looks_at_it_loses_no_chunk(memory_store, monkeypatch, thousand):
    monkeypatch.setattr("metaflow_hf.data.epoch.THOUSAND", thousand)
    monkeypatch.setattr("metaflow_hf.data.standalone.THOUSAND", thousand)
    growing, whole = manifest_of(2, 2, is_complete=False), manifest_of(2, 2, 2, 2)
    for looks_before in range(8, 40):
        looks = itertools.count()

        def look(looks=looks, before=looks_before) -> BlockManifest:
            return growing if next(looks) < before else whole

        ledger = StandaloneLedger(
            memory_store.child(f"{looks_before}"), look, chunk_size=2, worker_id="g", lease_seconds=60
        )
        trained = [claim.block_id for _ in range(20) for claim in drain(ledger)]
        assert sorted(trained) == [0, 1, 2, 3], looks_before
        assert ledger.is_epoch_complete()


def test_full_thousands_are_summed_up_so_that_a_start_lists_few(
    worker, recording_store, memory_store, monkeypatch
):
    monkeypatch.setattr("metaflow_hf.data.epoch.THOUSAND", 10)
    monkeypatch.setattr("metaflow_hf.data.standalone.THOUSAND", 10)
    drain(worker(samples=(1000,), chunk_size=10))
    store = recording_store(memory_store)
    late = worker(samples=(1000,), chunk_size=10, store=store)
    assert late.is_epoch_complete()
    assert late.claim() is None
    assert late.is_chunk_trained(0, 99)
    assert len(store.calls) <= 6
    assert late.progress()["done_samples"] == 1000


LARGE = manifest_of(*([100_000] * 9_999), 52_000)
LARGE_THOUSANDS = 250


@pytest.fixture
def at_large(memory_store, recording_store):
    """Makes 64 workers of 10,000 blocks, 249,988 chunks, of which the first so many thousands are done."""
    made = []

    def make(thousands_done):
        root = memory_store.child(f"after-{thousands_done}")
        workers = []
        for number in range(64):
            store = recording_store(root)
            ledger = StandaloneLedger(
                store, lambda: LARGE, chunk_size=4_000, worker_id=f"w{number}", rng=random.Random(number)
            )
            workers.append((ledger, store))
            if number == 0:
                for thousand in range(thousands_done):
                    root.create(ledger._records._full_key(thousand), b"{}")
                ledger._records.refresh()
        made.extend(ledger for ledger, _ in workers)
        return workers

    yield make
    for ledger in made:
        ledger.close()


def test_what_a_claim_costs_does_not_grow_with_the_dataset_nor_with_what_is_done(at_large):
    """Operations of the store, as 64 workers claim and complete in turn, at three places of the epoch."""
    starts, claims, completions = {}, {}, {}
    for done in (0, 125, 249):
        workers = at_large(done)
        starts[done] = len(workers[-1][1].calls)
        positions = set()
        for _ in range(2):
            held = []
            for store in (store for _, store in workers):
                store.calls.clear()
            for ledger, store in workers:
                held.append(ledger.claim())
                claims[done] = max(claims.get(done, 0), len(store.calls))
                store.calls.clear()
            for (ledger, store), claim in zip(workers, held, strict=True):
                ledger.complete(claim, 1)
                completions[done] = max(completions.get(done, 0), len(store.calls))
            assert positions.isdisjoint(claim.position for claim in held)
            positions |= {claim.position for claim in held}
        assert len(positions) == 2 * 64
        assert {position // THOUSAND for position in positions} == {done}
    assert set(starts.values()) == {3}, starts
    assert max(claims.values()) <= 24, claims
    assert max(claims.values()) <= min(claims.values()) + 6, claims
    assert set(completions.values()) == {4}, completions


def test_progress_of_a_large_dataset_is_exact_and_reads_no_record_of_what_is_done(at_large):
    (ledger, store), (other, _), *_ = at_large(249)
    done = [ledger.claim() for _ in range(5)]
    for claim in done:
        ledger.complete(claim, 1)
    other.claim()
    chunks = sum(-(-block.sample_count // 4_000) for block in LARGE.blocks)
    samples = LARGE.total_samples - sum(
        span.stop - span.start for span in map(ledger._records.span, ledger._records.positions(249))
    )
    store.calls.clear()
    assert ledger.progress() == {
        "epoch": 0, "total_chunks": chunks, "done_chunks": 249_005, "claimed_chunks": 1,
        "done_samples": samples + sum(claim.num_samples for claim in done), "workers": 1,
    }  # fmt: skip
    assert len(store.calls) <= 8


def test_the_public_tracker_over_a_manager_a_manifest_and_another_ledger(tmp_path, write_jsonl, make_rows):
    manifest = build_blocks(write_jsonl(make_rows(25)), tmp_path / "out", samples_per_block=10)
    with (
        BlockManager(tmp_path / "out", dataset_chunk_size=4) as manager,
        ChunkTracker(tmp_path / "tracker", manager, lease_seconds=1, seed=3) as tracker,
    ):
        claim = tracker.claim_chunk()
        assert len(manager.read_rows(claim.block_id, claim.start, claim.stop)) == claim.num_samples
        tracker.mark_chunk_complete(claim, steps=7)
        other = tracker.claim_chunk()
        tracker.release(other)
        assert tracker.is_chunk_trained(claim.block_id, claim.chunk_id)
        assert not tracker.check_epoch_complete()
        stats = tracker.get_progress_stats()
        assert (stats["total_chunks"], stats["done_chunks"], stats["done_samples"]) == (
            8,
            1,
            claim.num_samples,
        )
        outer = ChunkTracker(None, manager, ledger=tracker._ledger)
        assert outer.get_progress_stats() == stats
    whole = ChunkTracker(tmp_path / "whole", manifest)
    assert whole.get_progress_stats()["total_chunks"] == 3, "chunks of 4,000 when only a manifest is given"
    with pytest.raises(ConfigError, match="lease_seconds"):
        ChunkTracker(tmp_path / "x", manifest, lease_seconds=0.5)
    with pytest.raises(ConfigError, match="root"):
        ChunkTracker(None, manifest)


def test_thousands_are_what_keys_are_grouped_by(memory_store):
    manifest = manifest_of(2500)
    records = EpochRecords(memory_store, lambda: manifest, epoch=0, chunk_size=1, seed=0, shuffle=True)
    assert [len(records.positions(t)) for t in range(records.num_thousands)] == [THOUSAND, THOUSAND, 500]
    assert records.claim_key(1234) == "claims/00000/000001/000001234"


def _silence(ledger) -> None:
    """The worker's process is gone, or stopped: nobody renews its claims."""
    for _, lease in ledger._held.values():
        lease._stop.set()
        lease._thread.join()
        lease._stop.clear()


def _renew(ledger) -> None:
    for _, lease in ledger._held.values():
        lease.renew()


def test_a_claim_that_an_outage_interrupts_is_not_kept_alive_by_nobody(worker, recording_store, memory_store):
    """The lease is taken, then the store goes away: a thread that renewed it would keep the chunk from all."""
    is_away = []

    def before(method, key, _):
        if is_away and method == "get" and key.startswith("done/"):
            raise StoreUnavailable("as if the store were away")

    ledger = worker((3,), store=recording_store(memory_store, before), lease_seconds=60)
    is_away.append(True)
    with pytest.raises(StoreUnavailable):
        ledger.claim()
    is_away.clear()
    assert [t.name for t in threading.enumerate() if t.name.startswith("lease claims/00000")] == []
    other = worker((3,), lease_seconds=60)
    assert other.claim() is None
    other.clock.now += 60
    assert other.claim() is not None


def test_a_chunk_completed_meanwhile_is_not_given_out_again(worker):
    """The last thing that is looked at before a claim is given out, after the lease was taken."""
    one, two = worker((3,)), worker((3,))
    records = two._records
    assert records.create_done(0, {"token": "x", "worker": "gone", "steps": 1})
    assert one._try(0) is None
    assert one._held == {}


def test_a_claim_stays_held_through_an_outage_and_is_completed_after_it(worker, monkeypatch):
    ledger = worker((6,), chunk_size=3)
    claim = ledger.claim()
    create_done = EpochRecords.create_done

    def away(*_):
        raise StoreUnavailable("as if the store were away")

    monkeypatch.setattr(EpochRecords, "create_done", away)
    with pytest.raises(StoreUnavailable):
        ledger.complete(claim, steps=1)
    monkeypatch.setattr(EpochRecords, "create_done", create_done)
    ledger.complete(claim, steps=1)
    assert ledger.is_chunk_trained(claim.block_id, claim.chunk_id)
    other = ledger.claim()
    assert other.position != claim.position
    ledger.complete(other, steps=1)
    assert ledger.is_epoch_complete()


def test_a_path_is_no_dataset_of_a_tracker(tmp_path):
    with pytest.raises(ConfigError, match="a BlockManager or a manifest, not 'blocks'"):
        ChunkTracker(tmp_path, "blocks")


def test_numbers_of_numpy_are_numbers(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"text": "a"}\n' * 6)
    manifest = build_blocks(
        tmp_path / "raw.jsonl", tmp_path / "out", samples_per_block=np.int64(4), max_rows=np.int32(5)
    )
    assert manifest == build_blocks(tmp_path / "raw.jsonl", tmp_path / "out", samples_per_block=4, max_rows=5)
    with BlockManager(tmp_path / "out", dataset_chunk_size=np.int64(2)) as manager:
        ChunkTracker(tmp_path / "tracker", manager, seed=np.uint8(3)).close()
    with BlockManager(tmp_path / "out", dataset_chunk_size=2) as manager:
        ChunkTracker(tmp_path / "tracker", manager, seed=3).close()
