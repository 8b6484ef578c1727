"""Datasets that grow under their reader: written by another process, or by none any more."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from metaflow_hf.data import BlockManager, ChunkTracker, build_blocks
from metaflow_hf.data.growth import StoredBlocks, newer_manifest
from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.writer import LEASE_KEY
from metaflow_hf.errors import BadRowError, SelectionError, UserError
from metaflow_hf.store import open_store
from metaflow_hf.store.leases import acquire


class Growing:
    """A dataset of 3 blocks of 10 rows (the last of 4), committed step by step, as another process would."""

    def __init__(self, whole, place):
        self._whole, self.place = whole, place
        self._blocks = 0
        self.store = open_store(place)
        self._lease = acquire(self.store, LEASE_KEY, owner="writer", ttl=60)

    def commit(self, blocks: int) -> None:
        for number in range(self._blocks, self._blocks + blocks):
            for name in (
                f"blocks/block_{number:05d}.jsonl",
                f"blocks/block_{number:05d}.idx",
                f"commits/{number:05d}.json",
            ):
                self._copy(name)
        self._blocks += blocks

    def complete(self) -> None:
        self.commit(3 - self._blocks)
        self._copy("commits/complete.json")
        self._copy("block_manifest.json")
        self.stop()

    def stop(self) -> None:
        self._lease.release()

    def _copy(self, name: str) -> None:
        self.store.create(name, (self._whole / name).read_bytes())


@pytest.fixture
def growing(tmp_path, write_jsonl):
    raw = write_jsonl([{"text": str(i)} for i in range(24)])
    build_blocks(raw, tmp_path / "whole", samples_per_block=10)
    growing = Growing(tmp_path / "whole", tmp_path / "out")
    yield growing
    growing.stop()


def test_a_loop_over_what_another_process_writes_sees_all_of_it(growing):
    growing.commit(1)
    with BlockManager(growing.place, dataset_chunk_size=5) as manager, ThreadPoolExecutor(3) as pool:
        assert manager.get_chunk(0, 1) == ["5", "6", "7", "8", "9"]
        total = pool.submit(manager.get_total_blocks)
        is_last = pool.submit(lambda: manager.get_block(0).is_last_block)
        chunk = pool.submit(manager.get_chunk, 2, 0, 4)
        growing.complete()
        assert total.result(timeout=60) == 3
        assert is_last.result(timeout=60) is False
        assert chunk.result(timeout=60) == ["20", "21", "22", "23"]
        assert manager.get_block(2).is_last_block


def test_a_dataset_only_just_begun_is_waited_for(growing):
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(BlockManager, growing.place)
        growing.commit(1)
        with opened.result(timeout=60) as manager:
            assert manager.get_chunk(0, 0) == [str(i) for i in range(10)]


def test_a_dataset_that_ended_before_its_first_block_is_none(growing):
    growing.stop()
    with pytest.raises(SelectionError, match="no dataset of blocks"):
        BlockManager(growing.place)


def test_a_loop_of_ones_own_begins_before_the_end_and_trains_all(growing, tmp_path):
    growing.commit(1)
    with BlockManager(growing.place, dataset_chunk_size=5) as manager:
        tracker = ChunkTracker(tmp_path / "tracker", manager)
        seen, idle = [], 0
        while not tracker.check_epoch_complete():
            claim = tracker.claim_chunk()
            if claim is not None:
                seen += manager.get_chunk(claim.block_id, claim.chunk_id)
                tracker.mark_chunk_complete(claim)
                continue
            idle += 1
            if idle == 1:
                assert sorted(map(int, seen)) == list(range(10))
                growing.complete()
            # The manager looks again twice a second.
            threading.Event().wait(0.05)
        assert sorted(map(int, seen)) == list(range(24))
        assert tracker.get_progress_stats()["done_samples"] == 24
        assert ChunkTracker(tmp_path / "tracker", manager).check_epoch_complete()


def test_a_loop_that_ends_at_none_trains_all_of_what_its_manager_builds(tmp_path, write_jsonl):
    raw = write_jsonl([{"text": str(i)} for i in range(24)])
    with (
        BlockManager(raw, samples_per_block=5, dataset_chunk_size=5, cache_dir=tmp_path / "built") as manager,
        ChunkTracker(tmp_path / "tracker", manager) as tracker,
    ):
        seen = []
        while (claim := tracker.claim_chunk()) is not None:
            seen += manager.get_chunk(claim.block_id, claim.chunk_id)
            tracker.mark_chunk_complete(claim)
        assert sorted(map(int, seen)) == list(range(24))
        assert tracker.check_epoch_complete()


def test_a_builder_that_fails_is_no_end_of_a_loop(tmp_path):
    raw = tmp_path / "rows.jsonl"
    raw.write_text('{"text": "0"}\n' * 5 + "broken\n")
    with (
        BlockManager(raw, samples_per_block=5, dataset_chunk_size=5, cache_dir=tmp_path / "built") as manager,
        ChunkTracker(tmp_path / "tracker", manager) as tracker,
        pytest.raises(BadRowError, match="row 5"),
    ):
        while (claim := tracker.claim_chunk()) is not None:
            tracker.mark_chunk_complete(claim)


def test_a_reader_that_still_knows_too_little_joins_an_epoch_begun_on_the_whole(growing, tmp_path):
    growing.commit(1)
    with BlockManager(growing.place, dataset_chunk_size=5) as behind:
        behind._known._looked_at = float("inf")
        growing.complete()
        with BlockManager(growing.place, dataset_chunk_size=5) as fresh:
            ChunkTracker(tmp_path / "tracker", fresh).close()
        tracker = ChunkTracker(tmp_path / "tracker", behind)
        assert tracker.get_progress_stats()["total_chunks"] == 5


def test_an_incomplete_dataset_that_nobody_writes_is_no_shorter_dataset(growing, tmp_path):
    growing.commit(2)
    growing.stop()
    with BlockManager(growing.place) as manager:
        assert manager.get_chunk(1, 0)[0] == "10"
        assert manager.is_last_block(0) is False
        for call in (manager.get_total_blocks, manager.wait_complete, lambda: manager.is_last_block(1)):
            with pytest.raises(UserError, match="2 blocks are committed, and nobody is writing"):
                call()
        with pytest.raises(IndexError, match="so far"):
            manager.get_block(2)
        tracker = ChunkTracker(tmp_path / "tracker", manager)
        for _ in range(2):
            tracker.mark_chunk_complete(tracker.claim_chunk())
        assert not tracker.check_epoch_complete()
        with pytest.raises(UserError, match="nobody is writing"):
            tracker.claim_chunk()


def test_a_dead_writer_is_waited_for_until_its_lease_is_over(growing):
    growing.commit(1)
    growing.stop()
    assert acquire(growing.store, LEASE_KEY, owner="dead", ttl=7, renew=False) is not None
    now = [0.0]
    blocks = StoredBlocks(growing.store, read_manifest(growing.store), clock=lambda: now[0])
    for now[0] in (0.0, 6.9):
        blocks.check_growing()
    now[0] = 7.0
    with pytest.raises(UserError, match="nobody is writing"):
        blocks.check_growing()
    assert blocks.wait_until(lambda known: known.is_complete).total_blocks == 1


def test_closing_ends_waiting(growing):
    growing.commit(1)
    manager = BlockManager(growing.place)
    with ThreadPoolExecutor(1) as pool:
        total = pool.submit(manager.get_total_blocks)
        manager.close()
        with pytest.raises(UserError, match="not complete"):
            total.result(timeout=60)


def test_following_costs_the_same_however_much_there_is(growing, recording_store):
    growing.commit(2)
    store = recording_store(growing.store)
    known = read_manifest(store)
    store.calls.clear()
    assert newer_manifest(store, known) is known
    assert len(store.calls) == 2
