"""A dataset and its tracker on a store of each kind: read, claimed and followed as on a disk."""

import json

import pytest

from metaflow_hf.data import BlockManager, ChunkTracker, build_blocks
from metaflow_hf.errors import ClaimLost, IntegrityError

ROWS = [{"text": f"row {i} é\u2028", "n": i} for i in range(640)]


@pytest.fixture
def dataset(store, tmp_path):
    """A store that holds a dataset of 3 blocks; the last has 40 rows."""
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    build_blocks(tmp_path / "raw.jsonl", f"{store.uri}/dataset", samples_per_block=300)
    return store.child("dataset")


def test_chunks_are_read_from_where_the_datastore_is(dataset):
    with BlockManager(dataset.uri, dataset_chunk_size=70) as manager:
        texts = [
            text
            for block in range(manager.get_total_blocks())
            for chunk in range(manager.get_block(block).chunk_count(70))
            for text in manager.get_chunk(block, chunk)
        ]
        assert texts == [row["text"] for row in ROWS]
        assert manager.read_rows(1, 249, 252) == ROWS[549:552]
        assert manager.get_block(2).is_last_block


def test_a_block_cut_off_or_changed_is_named(dataset):
    key = "blocks/block_00001.jsonl"
    data = dataset.get(key)
    for damaged in (data[:-1], data[:50], b"", data.replace(b"row 320", b"row 321", 1)):
        dataset.put(key, damaged)
        with (
            BlockManager(dataset.uri, dataset_chunk_size=300) as manager,
            pytest.raises(IntegrityError, match=r"block_00001\.jsonl"),
        ):
            manager.get_chunk(1, 0)
    dataset.delete(key)
    with (
        BlockManager(dataset.uri, dataset_chunk_size=300) as manager,
        pytest.raises(IntegrityError, match=r"block_00001\.jsonl is gone"),
    ):
        manager.get_chunk(1, 0)


def test_blocks_without_an_index_are_read(dataset):
    for name in dataset.children("blocks"):
        if name.endswith(".idx"):
            dataset.delete(f"blocks/{name}")
    with BlockManager(dataset.uri, dataset_chunk_size=70) as manager:
        assert manager.get_chunk(2, 0) == [row["text"] for row in ROWS[600:]]


def test_workers_share_a_tracker(dataset, store):
    with BlockManager(dataset.uri, dataset_chunk_size=150) as manager:
        one, two = (ChunkTracker(store.child("tracker"), manager, worker_id=name) for name in "ab")
        held = one.claim_chunk()
        seen = [held]
        while (claim := two.claim_chunk()) is not None:
            two.mark_chunk_complete(claim)
            seen.append(claim)
        with pytest.raises(ClaimLost):
            two.mark_chunk_complete(held)
        assert not two.check_epoch_complete()
        one.mark_chunk_complete(held)
        assert two.check_epoch_complete()
        assert sorted((c.block_id, c.start) for c in seen) == [(0, 0), (0, 150), (1, 0), (1, 150), (2, 0)]
        assert one.get_progress_stats()["done_samples"] == len(ROWS)
        one.start_new_epoch()
        two.start_new_epoch()
        assert two.get_progress_stats() == {
            "epoch": 1, "total_chunks": 5, "done_chunks": 0, "claimed_chunks": 0, "done_samples": 0, "workers": 0,
        }  # fmt: skip
        one.close()
        two.close()
