"""Chunks are what was written: one ranged read each, cached, prefetched, thread-safe, never silently less."""

import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_hf.data import BlockManager, build_blocks
from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.reader import CACHED_CHUNKS
from metaflow_hf.errors import ConfigError, IntegrityError, SelectionError, StoreUnavailable
from metaflow_hf.store import open_store


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """5 blocks of 1,000 rows and one of 345; the rows themselves beside it. For reading only."""
    directory = tmp_path_factory.mktemp("built")
    rows = [
        {"text": f"row {i} \u2028 \x85 \x00" + "x" * (i * 7 % 50), "n": i, "t": [i, None]}
        for i in range(5345)
    ]
    (directory / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_blocks(directory / "raw.jsonl", directory / "out", samples_per_block=1000)
    return directory / "out", rows


@pytest.fixture
def blocks(built):
    return built


@pytest.fixture
def own_blocks(built, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(built[0], tmp_path / "own")
    return tmp_path / "own", built[1]


def test_metadata_needs_no_data(blocks, recording_store):
    directory, _ = blocks
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=300) as manager:
        block = manager.get_block(5)
        assert (block.block_id, block.total_samples, block.is_last_block) == (5, 345, True)
        assert block.chunk_count(300) == 2
        assert not manager.is_last_block(4)
        assert manager.get_total_blocks() == 6
        assert manager.manifest.total_samples == 5345
    assert [call for call in store.calls if "block_0" in call[1]] == []


@pytest.mark.parametrize("chunk", [1, 7, 249, 250, 251, 333, 1000, 5000])
def test_chunks_are_the_rows_of_the_source(chunk, blocks):
    directory, rows = blocks
    with BlockManager(directory, dataset_chunk_size=chunk, enable_prefetch=False) as manager:
        for block_id in (0, 3, 5):
            count = manager.get_block(block_id).chunk_count(chunk)
            for chunk_id in {0, count // 2, count - 1}:
                first = block_id * 1000 + chunk_id * chunk
                expected = rows[first : min(first + chunk, block_id * 1000 + 1000)]
                assert manager.get_chunk(block_id, chunk_id) == [row["text"] for row in expected]
                assert manager.get_rows(block_id, chunk_id) == expected


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (249, 251), (990, 1000), (0, 1000), (500, 500), (333, 777)]
)
def test_rows_by_number(start, stop, blocks):
    directory, rows = blocks
    with BlockManager(directory, dataset_chunk_size=300) as manager:
        assert manager.read_rows(2, start, stop) == rows[2000 + start : 2000 + stop]
        manager.get_rows(2, start // 300)
        assert manager.read_rows(2, start, stop) == rows[2000 + start : 2000 + stop]


def test_a_chunk_is_one_ranged_read_of_its_segments(blocks, recording_store):
    directory, _ = blocks
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=250, enable_prefetch=False) as manager:
        manager.get_chunk(1, 0)
        store.calls.clear()
        manager.get_chunk(1, 2)
        assert store.calls == [("get_range", "blocks/block_00001.jsonl")]
        manager.get_chunk(1, 2)
        manager.get_rows(1, 3)
        manager.read_rows(1, 760, 800)
        assert len(store.calls) == 2, "a cached chunk, and rows of one, are not read again"


def test_a_sequential_reader_reads_each_chunk_once_ahead_of_time(blocks, recording_store):
    directory, rows = blocks
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=250) as manager:
        texts = []
        for block_id in range(6):
            for chunk_id in range(manager.get_block(block_id).chunk_count(250)):
                texts += manager.get_chunk(block_id, chunk_id)
        assert texts == [row["text"] for row in rows]
    reads = [call for call in store.calls if call[0] == "get_range"]
    assert len(reads) == 5 * 4 + 2


def test_a_chunk_whose_reading_ahead_failed_is_read_again(blocks, recording_store):
    directory, rows = blocks
    failed = []

    def before(method, key, _):
        if method == "get_range" and threading.current_thread().name.startswith("chunk ahead"):
            failed.append(key)
            raise StoreUnavailable("as if the store were away for a moment")

    with BlockManager(recording_store(open_store(directory), before), dataset_chunk_size=250) as manager:
        for chunk_id in range(3):
            texts = manager.get_chunk(0, chunk_id)
            assert texts == [row["text"] for row in rows[250 * chunk_id : 250 * chunk_id + 250]]
    assert failed, "something was read ahead"


def test_after_closing_chunks_can_still_be_read(blocks):
    directory, rows = blocks
    manager = BlockManager(directory, dataset_chunk_size=250)
    manager.get_chunk(0, 0)
    manager.close()
    manager.close()
    assert manager.get_chunk(0, 1) == [row["text"] for row in rows[250:500]]


def test_a_random_reader_prefetches_nothing_in_vain(blocks, recording_store):
    directory, _ = blocks
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=100) as manager:
        for block_id, chunk_id in ((4, 4), (0, 9), (2, 2), (5, 0), (1, 7)):
            manager.get_chunk(block_id, chunk_id)
        time.sleep(0.1)
    reads = [call for call in store.calls if call[0] == "get_range"]
    assert len(reads) <= 6, "at most the one chunk after the first is read ahead"


def test_the_size_of_a_chunk_may_change_from_call_to_call(blocks):
    directory, rows = blocks
    with BlockManager(directory, dataset_chunk_size=10) as manager:
        for block_id, chunk_id, size in (
            (0, 67, 10),
            (0, 1, 400),
            (1, 9, 100),
            (1, 1, 999),
            (5, 0, 300),
            (5, 9, 30),
        ):
            first = block_id * 1000 + chunk_id * size
            expected = rows[first : min(first + size, block_id * 1000 + 1000)]
            assert manager.get_chunk(block_id, chunk_id, size) == [row["text"] for row in expected]


def test_the_cache_holds_ten_chunks(blocks, recording_store):
    directory, _ = blocks
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=50, enable_prefetch=False) as manager:
        for chunk_id in range(CACHED_CHUNKS + 1):
            manager.get_chunk(0, chunk_id)
        store.calls.clear()
        for chunk_id in range(1, CACHED_CHUNKS + 1):
            manager.get_chunk(0, chunk_id)
        assert store.calls == []
        manager.get_chunk(0, 0)
        assert len(store.calls) == 1


def test_the_cache_is_bounded_in_bytes_too(blocks, recording_store, monkeypatch):
    directory, _ = blocks
    monkeypatch.setattr("metaflow_hf.data.reader.CACHED_BYTES", 20_000)
    store = recording_store(open_store(directory))
    with BlockManager(store, dataset_chunk_size=50, enable_prefetch=False) as manager:
        for chunk_id in range(10):
            manager.get_chunk(0, chunk_id)
        kept = manager._reader._texts
        assert 0 < kept._bytes <= 20_000
        assert kept._bytes == sum(sys.getsizeof(text) for texts, _ in kept._items.values() for text in texts)
        store.calls.clear()
        manager.get_chunk(0, 9)
        assert store.calls == []
        manager.get_chunk(0, 0)
        assert len(store.calls) == 1


def test_each_call_returns_a_list_of_its_own(blocks):
    with BlockManager(blocks[0], dataset_chunk_size=10) as manager:
        first = manager.get_chunk(0, 0)
        first.clear()
        assert len(manager.get_chunk(0, 0)) == 10
        row = manager.get_rows(0, 0)[0]
        row["t"].append("changed")
        assert manager.get_rows(0, 0)[0]["t"] == [0, None]


def test_many_threads_read_the_same(blocks):
    directory, rows = blocks
    with BlockManager(directory, dataset_chunk_size=123) as manager, ThreadPoolExecutor(8) as pool:
        wanted = [(block, chunk) for block in range(5) for chunk in range(8)] * 3
        for (block, chunk), texts in zip(
            wanted, pool.map(lambda at: manager.get_chunk(*at), wanted), strict=True
        ):
            first = block * 1000 + chunk * 123
            assert texts == [row["text"] for row in rows[first : first + 123]]


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.get_block(6),
        lambda m: m.get_block(-1),
        lambda m: m.is_last_block(6),
        lambda m: m.get_chunk(0, 4),
        lambda m: m.get_chunk(0, -1),
        lambda m: m.get_chunk(6, 0),
        lambda m: m.get_chunk(5, 2),
        lambda m: m.read_rows(0, 5, 1001),
        lambda m: m.read_rows(5, 300, 350),
        lambda m: m.read_rows(5, 20, 10),
        lambda m: m.read_rows(0, -1, 5),
    ],
)
def test_out_of_range_raises(call, blocks):
    with BlockManager(blocks[0], dataset_chunk_size=300) as manager, pytest.raises(IndexError):
        call(manager)


@pytest.mark.parametrize("at", [0, 1, 20_000, -2])
def test_a_flipped_bit_is_named_and_never_decoded(at, own_blocks):
    path = own_blocks[0] / "blocks/block_00001.jsonl"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with BlockManager(own_blocks[0], dataset_chunk_size=1000) as manager:
        with pytest.raises(IntegrityError, match=r"block_00001\.jsonl"):
            manager.get_chunk(1, 0)
        assert len(manager.get_chunk(0, 0)) == 1000


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "bit of the index", "index of another"])
def test_a_damaged_block_is_named(damage, own_blocks):
    directory, _ = own_blocks
    path, index = directory / "blocks/block_00001.jsonl", directory / "blocks/block_00001.idx"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    elif damage == "index":
        index.write_bytes(b"rubbish")
    elif damage == "bit of the index":
        data = bytearray(index.read_bytes())
        data[40] ^= 4
        index.write_bytes(data)
    else:
        index.write_bytes((directory / "blocks/block_00005.idx").read_bytes())
    with (
        BlockManager(directory, dataset_chunk_size=400) as manager,
        pytest.raises(IntegrityError, match="block_00001"),
    ):
        manager.get_chunk(1, 2)


@pytest.fixture(scope="module", params=[None, "zstd"])
def small(request, tmp_path_factory):
    """2 blocks of 600 rows, plain or compressed; the bytes of block 1, and the rows of its third chunk of 200."""
    directory = tmp_path_factory.mktemp("small")
    rows = [{"text": f"row {i} é\u2028", "n": i} for i in range(1200)]
    (directory / "raw.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    build_blocks(directory / "raw.jsonl", directory / "out", samples_per_block=600, compression=request.param)
    [path] = (directory / "out/blocks").glob("block_00001.jsonl*")
    return directory / "out", path, path.read_bytes(), rows[600:]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_a_block_a_chunk_is_right_or_refused(small, data):
    """Any bytes changed, cut off, put in or exchanged: no call ever answers with another text."""
    directory, path, whole, rows = small
    damaged = bytearray(whole)
    kind = data.draw(st.sampled_from(["bit", "byte", "many", "cut", "insert", "swap", "zeros"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "bit":
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "byte":
        damaged[at] = data.draw(st.integers(0, 255))
    elif kind == "many":
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=20)):
            damaged[place] ^= 0x20
    elif kind == "cut":
        del damaged[at:]
    elif kind == "insert":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=40))
    elif kind == "swap":
        other = data.draw(st.integers(0, len(whole) - 1))
        damaged[at], damaged[other] = damaged[other], damaged[at]
    else:
        damaged[at : at + 100] = bytes(len(damaged[at : at + 100]))
    path.write_bytes(damaged)
    refused = 0
    try:
        with BlockManager(directory, dataset_chunk_size=200, enable_prefetch=False) as manager:
            for chunk_id in range(3):
                try:
                    texts = manager.get_chunk(1, chunk_id)
                except IntegrityError as error:
                    refused += path.name in str(error)
                else:
                    assert texts == [row["text"] for row in rows[chunk_id * 200 : chunk_id * 200 + 200]]
    finally:
        path.write_bytes(whole)
    lasting = bytes(damaged[: len(whole)]) == whole
    assert refused or lasting, "damage that touches a row is found by whoever reads that row, and named"


def test_a_lost_index_is_built_again(own_blocks):
    directory, rows = own_blocks
    index = directory / "blocks/block_00001.idx"
    before = index.read_bytes()
    index.unlink()
    with BlockManager(directory, dataset_chunk_size=400) as manager:
        assert manager.get_rows(1, 1) == rows[1400:1800]
    assert index.read_bytes() == before


def test_a_lost_index_is_not_built_from_another_block_than_was_written(own_blocks):
    directory, _ = own_blocks
    path = directory / "blocks/block_00001.jsonl"
    (directory / "blocks/block_00001.idx").unlink()
    path.write_bytes(path.read_bytes().replace(b"row 1500", b"row 1501", 1))
    with (
        BlockManager(directory, dataset_chunk_size=400) as manager,
        pytest.raises(IntegrityError, match=r"block_00001\.jsonl is damaged"),
    ):
        manager.get_chunk(1, 0)


@pytest.fixture
def foreign(tmp_path, make_rows):
    """The same layout as other software writes it: no commits, no index, absolute paths, blank lines, no text."""
    rows = [*make_rows(700), {"text": None, "n": 1}, {"n": 2}, {"text": "last"}]
    directory = tmp_path / "foreign"
    (directory / "blocks").mkdir(parents=True)
    entries = []
    for number, start in enumerate(range(0, len(rows), 300)):
        part = rows[start : start + 300]
        lines = "\n\n".join(json.dumps(row) for row in part) + ("\n" if number else "")
        (directory / f"blocks/block_{number:05d}.jsonl").write_text(lines)
        entries.append({"block_id": number, "sample_count": len(part), "start_index": start, "end_index": start + len(part),
                        "file_path": f"C:\\data\\blocks\\block_{number:05d}.jsonl", "size_bytes": 0})  # fmt: skip
    manifest = {"dataset_name": "theirs", "total_samples": len(rows), "total_blocks": len(entries), "block_size": 300,
                "blocks": entries, "text_column": None, "output_dir": "C:\\data"}  # fmt: skip
    (directory / "block_manifest.json").write_text(json.dumps(manifest))
    return directory, rows


@pytest.mark.parametrize("with_manifest", [True, False])
def test_datasets_of_other_software_are_read(with_manifest, foreign, read_through_manager):
    directory, rows = foreign
    if not with_manifest:
        (directory / "block_manifest.json").unlink()
    texts = read_through_manager(directory, chunk=77)
    assert texts == [row.get("text") or "" for row in rows]
    assert len(list((directory / "blocks").glob("*.idx"))) == 3
    with BlockManager(directory, dataset_chunk_size=100) as manager:
        assert manager.read_rows(1, 37, 263) == rows[337:563]
        assert manager.get_rows(1, 1) == rows[400:500]
        assert manager.read_rows(1, 103, 171) == rows[403:471], "out of a cached chunk with blank lines"
        assert manager.manifest.total_samples == len(rows)


def test_a_foreign_block_that_lost_or_gained_rows_is_named(foreign):
    directory, _ = foreign
    path = directory / "blocks/block_00001.jsonl"
    whole = path.read_text()
    for other in (whole[:-900], whole + '{"text": "one more"}\n'):
        path.write_text(other)
        with (
            BlockManager(directory) as manager,
            pytest.raises(IntegrityError, match=r"block_00001\.jsonl holds \d+ rows"),
        ):
            manager.get_chunk(1, 0)


def test_a_raw_file_is_built_under_the_cache_directory_while_it_is_read(tmp_path, write_jsonl, make_rows):
    rows = make_rows(2500)
    raw = write_jsonl(rows)
    with BlockManager(
        raw, samples_per_block=400, dataset_chunk_size=100, cache_dir=tmp_path / "cache"
    ) as manager:
        assert manager.get_chunk(0, 0) == [row["text"] for row in rows[:100]]
        assert manager.get_total_blocks() == 7
        assert manager.manifest.is_complete
        place = manager.uri
    with BlockManager(raw, samples_per_block=400, cache_dir=tmp_path / "cache") as manager:
        assert manager.manifest.is_complete
        assert manager.uri == place


class _SlowSource:
    """Rows that come when they are let through; then an end, or an error."""

    name, source, source_digest, commit_hash = "slow", "slow", "", None

    def __init__(self, source, error=None):
        self._source = source
        self._error = error
        self.gate = threading.Semaphore(0)

    def first_rows(self):
        return self._source.first_rows()

    def batches(self, cursor: Cursor):
        for batch in self._source.batches(cursor):
            self.gate.acquire()
            yield batch
        self.gate.acquire()
        if self._error is not None:
            raise self._error


@pytest.fixture
def slow(tmp_path, make_rows, monkeypatch):
    """A manager over a source of 2,500 rows that arrive 1,000 at a time, each when ``gate`` is released."""
    import pyarrow as pa
    import pyarrow.parquet

    from metaflow_hf.data import places as module
    from metaflow_hf.data.sources import open_source

    pa.parquet.write_table(
        pa.Table.from_pylist(make_rows(2500)), tmp_path / "raw.parquet", row_group_size=2500
    )

    def make(error=None):
        source = _SlowSource(open_source(tmp_path / "raw.parquet"), error)
        monkeypatch.setattr(module, "open_source", lambda _, **__: source)
        return source, BlockManager(
            "hf://slow", samples_per_block=1000, dataset_chunk_size=500, cache_dir=tmp_path / "c"
        )

    return make


def test_the_first_block_is_usable_while_the_rest_is_still_coming(slow):
    source, manager = slow()
    with manager:
        source.gate.release()
        assert len(manager.get_chunk(0, 1)) == 500
        assert manager.get_block(0).total_samples == 1000
        assert not manager.manifest.is_complete
        waiting = ThreadPoolExecutor(1)
        last = waiting.submit(manager.is_last_block, 1)
        with pytest.raises(TimeoutError):
            last.result(timeout=0.1)
        for _ in range(3):
            source.gate.release()
        assert last.result(timeout=10) is False
        assert manager.get_block(2).is_last_block
        with pytest.raises(IndexError, match="3 blocks; there is no block 3"):
            manager.get_chunk(3, 0)
        waiting.shutdown()


def test_an_outage_while_it_grows_reaches_the_reader_and_is_no_end(slow):
    from metaflow_hf.errors import HubUnavailable

    source, manager = slow(HubUnavailable("the hub went away"))
    with manager:
        for _ in range(4):
            source.gate.release()
        assert len(manager.get_chunk(1, 0)) == 500
        with pytest.raises(HubUnavailable, match="went away"):
            manager.get_block(2)


def test_closing_stops_the_builder_and_the_next_reader_goes_on(slow):
    source, manager = slow()
    source.gate.release()
    assert len(manager.get_chunk(0, 0)) == 500
    threading.Timer(0.2, source.gate.release).start()
    manager.close()
    source, manager = slow()
    for _ in range(5):
        source.gate.release()
    with manager:
        assert manager.get_total_blocks() == 3


def test_ascii_only_is_refused_on_blocks_that_were_built_without(blocks):
    with pytest.raises(ConfigError, match="ascii_only"):
        BlockManager(blocks[0], ascii_only=True)


def test_what_filters_rows_is_part_of_what_is_built(tmp_path):
    (tmp_path / "raw.jsonl").write_bytes(b'{"text":"a"}\nbroken\n{"text":"b"}\n{"text":"c"}\n')
    settings = {"cache_dir": tmp_path / "cache", "on_bad_row": "skip"}
    with (
        BlockManager(tmp_path / "raw.jsonl", max_rows=2, **settings) as few,
        BlockManager(tmp_path / "raw.jsonl", **settings) as all_rows,
    ):
        assert (few.wait_complete().total_samples, all_rows.wait_complete().total_samples) == (2, 3)
        assert few.uri != all_rows.uri


def test_another_text_column_can_be_named(tmp_path, write_jsonl):
    build_blocks(write_jsonl([{"text": "a", "title": "b"}, {"text": "c", "title": None}]), tmp_path / "out")
    with BlockManager(tmp_path / "out", text_column="title") as manager:
        assert manager.get_chunk(0, 0) == ["b", ""]
    with pytest.raises(ConfigError, match="txet.*text"):
        BlockManager(tmp_path / "out", text_column="txet")


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(SelectionError, match="no dataset of blocks"):
        BlockManager(open_store(tmp_path / "empty"))
    with pytest.raises(SelectionError, match="missing"):
        BlockManager(tmp_path / "missing")
    with pytest.raises(ConfigError):
        BlockManager(tmp_path, dataset_chunk_size=0)


@pytest.mark.parametrize("size", [0, -1, "auto", 2.5])
def test_a_chunk_has_a_number_of_rows(size, tmp_path):
    with pytest.raises(ConfigError, match="at least 1 sample"):
        BlockManager(tmp_path, dataset_chunk_size=size)
