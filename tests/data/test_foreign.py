"""Blocks that other software wrote in this layout: no commits, no index, and habits of its own."""

import json

import pytest

from metaflow_hf.data import BlockManager, ChunkTracker, verify_blocks
from metaflow_hf.errors import IntegrityError, StoreUnavailable
from metaflow_hf.store import open_store


@pytest.fixture
def bare(tmp_path):
    """Writes files of lines below ``blocks/`` of one directory, which it returns."""

    def write(**files):
        (tmp_path / "bare/blocks").mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            data = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
            (tmp_path / f"bare/blocks/{name}.jsonl").write_bytes(data)
        return tmp_path / "bare"

    return write


def texts(*names):
    return [json.dumps({"text": name}) for name in names]


def test_a_place_that_cannot_be_written_is_read_all_the_same(bare, recording_store):
    directory = bare(block_00000=texts("a", "b"), block_00001=texts("c"))

    def refuse(method, key, _):
        if method in ("put", "create", "take"):
            raise StoreUnavailable("read-only")

    store = recording_store(open_store(directory), refuse)
    with BlockManager(store, dataset_chunk_size=1, enable_prefetch=False) as manager:
        assert manager.get_chunk(0, 1) == ["b"]
        before = len(store.calls)
        assert manager.get_chunk(0, 0) == ["a"]
        assert [method for method, _ in store.calls[before:]] == ["get_range"], "the index is kept in memory"
        assert manager.get_chunk(1, 0) == ["c"]
    assert not list(directory.glob("blocks/*.idx"))


def test_bare_blocks_are_scanned_once_and_tracked_as_the_same_dataset(bare, recording_store):
    directory = bare(block_00000=texts("a", "b"), block_00001=texts("c"))
    with BlockManager(directory, dataset_chunk_size=1) as manager:
        first = manager.manifest
        ChunkTracker(directory.parent / "tracker", manager).close()
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=1) as manager:
        assert manager.manifest == first
        ChunkTracker(directory.parent / "tracker", manager).close()
    assert [key for method, key in store.calls if method == "get_range"] == ["blocks/block_00000.jsonl"], (
        "only the rows by which the text column is found"
    )


def test_a_bare_block_that_grew_is_indexed_anew(bare):
    with BlockManager(bare(block_00000=texts("a"))) as manager:
        assert manager.get_chunk(0, 0) == ["a"]
    with BlockManager(bare(block_00000=texts("a", "b"))) as manager:
        assert manager.get_chunk(0, 0) == ["a", "b"]


def test_a_bare_block_changed_under_its_index_is_named(bare):
    directory = bare(block_00000=texts("abc"))
    BlockManager(directory).close()
    bare(block_00000=texts("abd"))
    with pytest.raises(IntegrityError, match=r"block_00000\.jsonl"):
        BlockManager(directory)


def test_a_gap_among_bare_blocks_is_a_lost_block(bare):
    with pytest.raises(IntegrityError, match="no block 1"):
        BlockManager(bare(block_00000=texts("a"), block_00002=texts("c")))


def test_blocks_are_in_the_order_of_their_numbers(bare):
    directory = bare(block_99999=texts("first"), block_100000=texts("second"))
    with BlockManager(directory) as manager:
        assert [manager.get_chunk(block, 0) for block in (0, 1)] == [["first"], ["second"]]


def test_blank_lines_and_a_missing_last_line_end_cancel_out(bare):
    """As many line ends as rows, although no row is where counting line ends would look for it."""
    rows = [f'{{"text":"{i}"}}' for i in range(4)]
    directory = bare(block_00000=(rows[0] + "\n\n" + "\n".join(rows[1:])).encode())
    with BlockManager(directory, enable_prefetch=False) as manager:
        for start in range(4):
            for stop in range(start + 1, 5):
                assert [row["text"] for row in manager.read_rows(0, start, stop)] == [
                    str(i) for i in range(start, stop)
                ]


@pytest.mark.parametrize("ends", ["\r\n", " \n", "\n\r\n \n"])
def test_line_ends_of_other_systems(bare, ends):
    directory = bare(block_00000=ends.join(texts("a", "b", "c")).encode())
    with BlockManager(directory, dataset_chunk_size=1) as manager:
        assert [manager.get_chunk(0, i) for i in range(3)] == [["a"], ["b"], ["c"]]


def test_what_python_writes_as_json_is_read(bare):
    directory = bare(
        block_00000=['{"text": "a", "score": NaN}', '{"text": "b", "big": 1e400}', '{"text": null}']
    )
    with BlockManager(directory) as manager:
        assert manager.get_chunk(0, 0) == ["a", "b", ""]
        assert manager.get_rows(0, 0)[1] == {"text": "b", "big": float("inf")}


@pytest.mark.parametrize("line", ['{"text": "b"', '["b"]', '"b"', '{"text": "b"} {"text": "c"}', "\x00"])
def test_a_line_that_is_no_object_is_named(bare, line):
    directory = bare(block_00000=[*texts("a"), line])
    with pytest.raises(IntegrityError, match=r"block_00000\.jsonl: rows 0 to 1"):
        BlockManager(directory, text_column="text")


def test_empty_blocks_have_no_chunks(bare):
    directory = bare(block_00000=texts("a"), block_00001=b"", block_00002=texts("c"))
    with BlockManager(directory) as manager:
        assert [manager.get_block(i).chunk_count(4000) for i in range(3)] == [1, 0, 1]
        assert manager.get_chunk(2, 0) == ["c"]
        with pytest.raises(IndexError):
            manager.get_chunk(1, 0)
        tracker = ChunkTracker(directory / "tracker", manager)
        claims = [tracker.claim_chunk(), tracker.claim_chunk()]
        assert {claim.block_id for claim in claims} == {0, 2}
        assert tracker.claim_chunk() is None
        tracker.close()


def test_empty_blocks_are_passed_over_by_who_reads_in_order(bare):
    directory = bare(block_00000=[], block_00001=texts("a", "b", "c"), block_00002=[], block_00003=texts("d"))
    with BlockManager(directory, dataset_chunk_size=2) as manager:
        assert [manager.get_chunk(*at) for at in ((1, 0), (1, 1), (3, 0))] == [["a", "b"], ["c"], ["d"]]


def test_a_block_of_nothing_but_blank_lines_is_not_damaged(bare):
    directory = bare(block_00000=texts("a"), block_00001=b"\n \n")
    with BlockManager(directory) as manager:
        assert manager.manifest.total_samples == 1
    assert verify_blocks(directory) == []


def test_an_incomplete_dataset_without_commits_is_what_it_lists(bare, caplog):
    directory = bare(block_00000=texts("a", "b"))
    block = {"block_id": 0, "sample_count": 2, "start_index": 0, "end_index": 2, "file_path": "x/block_00000.jsonl",
             "size_bytes": 0, "is_complete": True}  # fmt: skip
    manifest = {"dataset_name": "theirs", "total_samples": 2, "total_blocks": 1, "block_size": 2, "blocks": [block],
                "is_complete": False}  # fmt: skip
    (directory / "block_manifest.json").write_text(json.dumps(manifest))
    with BlockManager(directory) as manager:
        assert manager.get_total_blocks() == 1
        assert manager.get_block(0).is_last_block
    assert "not complete" in caplog.text
