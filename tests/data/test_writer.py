"""What is committed stays; what is interrupted goes on to the same bytes; nothing else is ever overwritten."""

import contextlib
import itertools
import json
import threading

import msgspec
import pytest

from metaflow_hf.data import (
    BlockManager,
    StreamingBlockWriter,
    build_blocks,
    process_raw_dataset_to_blocks,
    streaming,
    verify_blocks,
)
from metaflow_hf.data.build import plan_dataset, write_dataset
from metaflow_hf.data.encoding import RowEncoder
from metaflow_hf.data.manifest import DatasetSpec
from metaflow_hf.data.records import encode, read_commit, read_manifest
from metaflow_hf.data.rows import AfterRow, InputRows
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.writer import LEASE_KEY, DatasetWriter, hold_lease
from metaflow_hf.errors import (
    BadRowError,
    ClaimLost,
    ConfigError,
    DatasetMismatch,
    StoreUnavailable,
    UserError,
)
from metaflow_hf.store import open_store
from metaflow_hf.store.leases import Observer, acquire


def test_the_layout_is_what_other_readers_expect(tmp_path, write_jsonl, make_rows):
    manifest = process_raw_dataset_to_blocks(
        write_jsonl(make_rows(25)), tmp_path / "out", "mine", block_size=10
    )
    stored = json.loads((tmp_path / "out/block_manifest.json").read_text())
    assert {key: value for key, value in stored.items() if key != "checksum"} == manifest.to_json()
    assert {k: stored[k] for k in ("dataset_name", "total_samples", "total_blocks", "block_size", "text_column")} == {
        "dataset_name": "mine", "total_samples": 25, "total_blocks": 3, "block_size": 10, "text_column": "text",
    }  # fmt: skip
    last = stored["blocks"][2]
    size = (tmp_path / "out/blocks/block_00002.jsonl").stat().st_size
    assert last | {"sha256": ""} == {
        "block_id": 2, "sample_count": 5, "start_index": 20, "end_index": 25, "size_bytes": size, "sha256": "",
        "file_path": "blocks/block_00002.jsonl", "is_complete": True,
    }  # fmt: skip
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").rglob("*.json"))


def test_a_second_build_returns_at_once_and_changes_nothing(tmp_path, write_jsonl, make_rows):
    raw = write_jsonl(make_rows(100))
    first = build_blocks(raw, tmp_path / "out", samples_per_block=30)
    before = _contents(tmp_path / "out")
    assert build_blocks(raw, tmp_path / "out", samples_per_block=30) == first
    assert {k: v for k, v in _contents(tmp_path / "out").items() if "leases" not in k} == {
        k: v for k, v in before.items() if "leases" not in k
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"samples_per_block": 20}, "block_size"), ({"ascii_only": True}, "ascii_only"), ({"max_rows": 5}, "max_rows"),
     ({"text_column": "other"}, "text_column"), ({"compression": "zstd"}, "compression")],
)  # fmt: skip
def test_other_settings_in_the_same_directory_are_a_mismatch_that_says_what(
    settings, named, tmp_path, write_jsonl
):
    raw = write_jsonl([{"text": "a", "other": "b"}] * 40)
    build_blocks(raw, tmp_path / "out", samples_per_block=30)
    with pytest.raises(DatasetMismatch, match=named):
        build_blocks(raw, tmp_path / "out", **{"samples_per_block": 30, **settings})


def test_a_changed_source_is_a_mismatch(tmp_path, write_jsonl, make_rows):
    build_blocks(write_jsonl(make_rows(40)), tmp_path / "out", samples_per_block=10)
    with pytest.raises(DatasetMismatch, match="source_digest"):
        build_blocks(
            write_jsonl([*make_rows(39), {"text": "changed"}]), tmp_path / "out", samples_per_block=10
        )


def test_blocks_of_other_software_are_not_written_into(tmp_path, write_jsonl, make_rows):
    raw = write_jsonl(make_rows(4))
    (tmp_path / "out/blocks").mkdir(parents=True)
    (tmp_path / "out/blocks/block_00000.jsonl").write_bytes(raw.read_bytes())
    manifest = {"dataset_name": "x", "total_samples": 4, "total_blocks": 1, "block_size": 4, "blocks": [
        {"block_id": 0, "sample_count": 4, "start_index": 0, "end_index": 4, "file_path": "/a/block_00000.jsonl", "size_bytes": 0}
    ]}  # fmt: skip
    (tmp_path / "out/block_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetMismatch, match="other software"):
        build_blocks(raw, tmp_path / "out")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "csv"])
def test_a_failure_at_any_operation_of_the_store_is_gone_on_from(
    ending, tmp_path, write_any, make_rows, recording_store, memory_store
):
    rows = make_rows(51)
    for blank in (3, 10, 11, 50):
        rows[blank]["text"] = ""
    source = open_source(write_any(rows, ending))
    spec = plan_dataset(source, samples_per_block=10)
    whole = recording_store(memory_store.child("whole"))
    write_dataset(source, spec, whole, lease_seconds=1)
    expected = _objects(memory_store.child("whole"))
    steps = sum(_changes_the_dataset(*call) for call in whole.calls)
    assert steps > 15
    for step in range(0, steps, 1 if ending == "jsonl" else 7):
        store = memory_store.child(f"broken-{step}")
        with pytest.raises(_Injected):
            write_dataset(source, spec, recording_store(store, _fail_at(step)), lease_seconds=1)
        manifest = write_dataset(source, spec, store, lease_seconds=1)
        assert _objects(store) == expected, f"after a failure at operation {step}"
        assert manifest.is_complete
        assert verify_blocks(store) == []


@pytest.mark.parametrize("stop_after", [0, 1, 9, 10, 11, 25, 46, 47])
def test_rows_of_ones_own_go_on_after_a_restart(stop_after, tmp_path, make_rows):
    rows = make_rows(47)
    rows[5]["text"] = rows[30]["text"] = None
    with StreamingBlockWriter(tmp_path / "whole", "mine", 10, text_column="text") as writer:
        for row in rows:
            writer.write(row)
    with (
        pytest.raises(_Injected),
        StreamingBlockWriter(tmp_path / "out", "mine", 10, text_column="text") as writer,
    ):
        for row in rows[:stop_after]:
            writer.write(row)
        raise _Injected
    with StreamingBlockWriter(tmp_path / "out", "mine", 10, text_column="text") as writer:
        assert writer.next_cursor <= stop_after
        for row in rows[writer.next_cursor :]:
            writer.write(row)
    assert _without_leases(tmp_path / "out") == _without_leases(tmp_path / "whole")


def test_the_writer_knows_what_is_committed_and_finds_its_column_again(tmp_path):
    with pytest.raises(_Injected), StreamingBlockWriter(tmp_path, "mine", 300) as writer:
        for i in range(1000):
            writer.write({"body": f"{i}", "id": "x"})
        raise _Injected
    manifest = read_manifest(open_store(tmp_path))
    assert manifest is not None
    assert (manifest.total_samples, manifest.is_complete) == (900, False)
    with StreamingBlockWriter(tmp_path, "mine", 300) as writer:
        assert writer.next_cursor == 900
        for i in range(900, 1000):
            writer.write({"body": f"{i}", "id": "x"})
    assert read_manifest(open_store(tmp_path)).text_column == "body"


def test_a_complete_dataset_takes_no_more_rows(tmp_path):
    with StreamingBlockWriter(tmp_path, "mine", 3) as writer:
        writer.write("one")
    with (
        pytest.raises(DatasetMismatch, match="complete"),
        StreamingBlockWriter(tmp_path, "mine", 3) as writer,
    ):
        assert writer.next_cursor == 1
        writer.write("two")
    with StreamingBlockWriter(tmp_path, "mine", 3) as writer:
        pass
    assert read_manifest(open_store(tmp_path)).total_samples == 1


def test_a_writer_without_rows_makes_an_empty_dataset(tmp_path):
    with StreamingBlockWriter(tmp_path, "mine") as writer:
        pass
    assert writer.close().total_samples == 0


def test_limits_take_the_first_rows(tmp_path, write_jsonl):
    raw = write_jsonl([{"text": "x" * 10}] * 50)
    line = len(raw.read_bytes()) // 50
    assert build_blocks(raw, tmp_path / "a", samples_per_block=20, max_rows=33).total_samples == 33
    assert (
        build_blocks(raw, tmp_path / "b", samples_per_block=20, max_bytes=line * 21 + 3).total_samples == 21
    )
    assert build_blocks(raw, tmp_path / "c", max_bytes=line - 1).total_samples == 0
    with StreamingBlockWriter(tmp_path / "d", "mine", max_rows=2) as writer:
        for _ in range(1000):
            writer.write("a")
    assert writer.close().total_samples == 2


def test_limits_hold_over_an_interruption(tmp_path, write_jsonl, recording_store, memory_store):
    source = open_source(write_jsonl([{"text": "x" * 10}] * 50))
    spec = plan_dataset(source, samples_per_block=10, max_bytes=600, compression="zstd")
    expected = write_dataset(source, spec, memory_store.child("whole"), lease_seconds=1)
    for step in range(0, 10, 3):
        store = memory_store.child(f"broken-{step}")
        with pytest.raises(_Injected):
            write_dataset(source, spec, recording_store(store, _fail_at(step)), lease_seconds=1)
        assert write_dataset(source, spec, store, lease_seconds=1) == expected


def test_compressed_blocks_hold_the_same_rows(tmp_path, write_jsonl, make_rows, read_through_manager):
    rows = make_rows(1000)
    manifest = build_blocks(write_jsonl(rows), tmp_path / "out", samples_per_block=400, compression="zstd")
    assert read_through_manager(tmp_path / "out", chunk=77) == [row["text"] for row in rows]
    assert manifest.blocks[0].file_path == "blocks/block_00000.jsonl.zst"
    assert verify_blocks(tmp_path / "out") == []


def test_several_builders_of_one_dataset_write_it_once(tmp_path, write_jsonl, make_rows):
    raw = write_jsonl(make_rows(200))
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(build_blocks(raw, tmp_path / "out", samples_per_block=50))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert verify_blocks(tmp_path / "out") == []


def test_progress_tells_of_each_block(tmp_path, write_jsonl, make_rows):
    seen = []
    build_blocks(
        write_jsonl(make_rows(35)), tmp_path / "out", samples_per_block=10,
        progress=lambda manifest: seen.append((manifest.total_blocks, manifest.total_samples, manifest.is_complete)),
    )  # fmt: skip
    assert seen == [(1, 10, False), (2, 20, False), (3, 30, False), (4, 35, False)]


def test_without_a_place_the_dataset_goes_to_the_users_cache(
    tmp_path, write_jsonl, make_rows, read_through_manager
):
    raw = write_jsonl(make_rows(5))
    manifest = build_blocks(raw)
    places = list((tmp_path / "node-cache/datasets").iterdir())
    assert [place.name.rpartition("-")[0] for place in places] == ["raw"]
    assert read_through_manager(places[0]) == [row["text"] for row in make_rows(5)]
    assert build_blocks(raw) == manifest


def test_the_cursor_of_a_commit_is_where_the_source_goes_on(tmp_path, write_jsonl):
    raw = write_jsonl([{"text": f"{i}"} for i in range(7)])
    build_blocks(raw, tmp_path / "out", samples_per_block=3)
    cursor = read_commit(open_store(tmp_path / "out"), 0).cursor
    assert raw.read_bytes()[cursor.offset :].startswith(b'{"text": "3"}')
    assert cursor.row == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples_per_block": 0},
        {"samples_per_block": "auto"},
        {"max_rows": 0},
        {"max_bytes": -1},
        {"on_bad_row": "ignore"},
        {"compression": "gzip"},
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(wrong, tmp_path, write_jsonl):
    with pytest.raises(ConfigError):
        build_blocks(write_jsonl([{"text": "a"}]), tmp_path / "out", **wrong)
    with pytest.raises(ConfigError):
        StreamingBlockWriter(tmp_path / "out", "mine", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_closed_writer_loses_no_row_silently(end, tmp_path):
    writer = StreamingBlockWriter(tmp_path, "mine", 3)
    writer.write({"text": "one"})
    getattr(writer, end)()
    with pytest.raises(UserError, match="closed"):
        writer.write({"text": "two"})
    assert (read_manifest(open_store(tmp_path)) is not None) is (end == "close")


@pytest.mark.parametrize("many", [True, False])
def test_after_an_outage_nothing_can_be_written_or_completed_and_the_next_writer_goes_on(
    many, tmp_path, make_rows, monkeypatch, recording_store
):
    """Whoever closes a writer in ``finally`` would else complete a dataset that lacks rows, or has them twice."""

    def fail(method, key, _number):
        if (method, key) == ("create", "commits/00001.json"):
            raise StoreUnavailable("an outage")

    rows = make_rows(47)
    monkeypatch.setattr(streaming, "open_store", lambda place: recording_store(open_store(place), fail))
    writer = StreamingBlockWriter(tmp_path, "mine", 10)
    with pytest.raises(StoreUnavailable):
        writer.write_many(rows) if many else [writer.write(row) for row in rows]
    with pytest.raises(UserError, match="closed"):
        writer.write(rows[0])
    for _ in range(2):
        with pytest.raises(UserError, match="aborted"):
            writer.close()
    monkeypatch.undo()
    with StreamingBlockWriter(tmp_path, "mine", 10) as writer:
        assert writer.next_cursor == 10
        writer.write_many(rows[10:])
    with BlockManager(tmp_path) as manager:
        assert [row for block in range(5) for row in manager.get_rows(block, 0)] == rows


def test_an_interrupted_call_leaves_no_part_of_its_row(tmp_path, monkeypatch):
    class Interrupted:
        """At the worst moment: the line is there, and not counted yet."""

        def __init__(self, column, **settings):
            self._inner, self._calls = RowEncoder(column, **settings), 0
            self.encode_row, self.plain_lines = self._inner.encode_row, self._inner.plain_lines
            self.left_out = self._inner.left_out

        def append_plain(self, row, lines, at):
            end, self._calls = self._inner.append_plain(row, lines, at), self._calls + 1
            if self._calls in (1, 4):
                raise KeyboardInterrupt
            return end

    monkeypatch.setattr(streaming, "RowEncoder", Interrupted)
    with StreamingBlockWriter(tmp_path, "mine", text_column="text") as writer:
        for i in range(5):
            with contextlib.suppress(KeyboardInterrupt):
                writer.write({"text": f"row {i}" + "." * (5 - i)})
        assert writer.next_cursor == 3
    assert verify_blocks(tmp_path) == []
    with BlockManager(tmp_path) as manager:
        assert manager.get_chunk(0, 0) == ["row 0.....", "row 2...", "row 3.."]


class _Injected(Exception):
    pass


def _batch(rows, first=0):
    return RowEncoder("text").encode(InputRows(rows, "rows", first, AfterRow(0, first)))


@pytest.mark.parametrize("asks", [True, False])
def test_a_writer_that_was_stopped_does_not_take_its_successors_open_block(tmp_path, monkeypatch, asks):
    store, rows = open_store(tmp_path), [{"text": f"{n}"} for n in range(8)]
    spec = DatasetSpec(dataset_name="d", source="rows", block_size=4, text_column="text")
    lease = acquire(store, LEASE_KEY, owner="a", ttl=1, renew=False)
    stopped = DatasetWriter(store, spec, lease=lease)
    stopped.append(_batch(rows[:3]))
    now = itertools.count(step=10)
    observer = Observer(clock=lambda: next(now))
    assert acquire(store, LEASE_KEY, owner="b", ttl=1, observer=observer) is None
    with acquire(store, LEASE_KEY, owner="b", ttl=1, observer=observer) as taken_over:
        successor = DatasetWriter(store, spec, lease=taken_over)
        successor.append(_batch(rows[:2]))
        successor._open._waiting[-1].result()
        if not asks:
            monkeypatch.setattr(lease, "renew", lambda: None)
        with pytest.raises(ClaimLost, match="took over"):
            stopped.append(_batch(rows[3:], 3))
        assert store.children("blocks") == [successor._open.path.name]
        stopped.discard()
        successor.append(_batch(rows[2:], 2))
        assert successor.finish().total_samples == 8
    assert verify_blocks(store) == []


def test_a_build_that_another_took_over_gives_what_both_wrote(
    memory_store, recording_store, write_jsonl, make_rows
):
    source = open_source(write_jsonl(make_rows(50)))
    spec = plan_dataset(source, samples_per_block=10)
    expected = write_dataset(source, spec, memory_store.child("whole"), lease_seconds=1)
    store, other = memory_store.child("held up"), []

    def take_over(method, key, _number):
        if (method, key) == ("take", "blocks/block_00001.jsonl"):
            observer = Observer(clock=itertools.count(step=10).__next__)
            while not other:
                lease = acquire(store, LEASE_KEY, owner="b", ttl=1, observer=observer)
                other.extend([] if lease is None else [lease])
            other[0].release()

    assert write_dataset(source, spec, recording_store(store, take_over), lease_seconds=60) == expected
    assert len(other) == 1
    assert _objects(store) == _objects(memory_store.child("whole"))


@pytest.mark.parametrize("limits", [{"max_rows": 2}, {"max_bytes": 26}, {"max_rows": 3}, {}])
def test_what_is_read_together_changes_no_count(memory_store, limits):
    texts = ["a", "", "b", "", "", "c", "d", ""]
    written = []
    for size in (1, 3, 4, 8):
        store = memory_store.child(f"{size}")
        spec = DatasetSpec(dataset_name="d", source="rows", block_size=2, text_column="text", **limits)
        with hold_lease(store, ttl=5) as lease:
            writer = DatasetWriter(store, spec, lease=lease)
            for at in range(0, len(texts), size):
                rows = [{"text": text} for text in texts[at : at + size]]
                if not writer.append(_batch(rows, at)):
                    break
            writer.finish()
        written.append(_objects(store))
    assert all(objects == written[0] for objects in written)


def _fail_at(step):
    counter = iter(range(10**6))

    def before(method, key, _number):
        if _changes_the_dataset(method, key) and next(counter) == step:
            raise _Injected(f"{method} {key}")

    return before


def _changes_the_dataset(method, key):
    # How often the lease is renewed depends on the load of the machine.
    return method in ("create", "put", "take") and not key.startswith("leases/")


def _objects(store):
    """All objects of a dataset but its leases."""
    return {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("leases")}


def _contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def _without_leases(directory):
    return {name: data for name, data in _contents(directory).items() if not name.startswith("leases")}


@pytest.fixture
def write_any(tmp_path, write_jsonl):
    import csv
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    def write(rows, ending):
        plain = write_jsonl(rows)
        path = tmp_path / f"raw.{ending}"
        if ending == "jsonl.gz":
            path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        elif ending == "parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
        elif ending == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["text"], *([row["text"]] for row in rows)])
        return path

    return write


def test_manifest_of_a_growing_dataset_is_the_file_plus_later_commits(tmp_path, write_jsonl, make_rows):
    build_blocks(write_jsonl(make_rows(35)), tmp_path / "out", samples_per_block=10)
    store = open_store(tmp_path / "out")
    whole = read_manifest(store)
    store.delete("block_manifest.json")
    assert read_manifest(store) == whole
    older = msgspec.structs.replace(
        whole, blocks=whole.blocks[:2], total_blocks=2, total_samples=20, is_complete=False
    )
    store.put("block_manifest.json", encode(older))
    assert read_manifest(store) == whole


ODD_ROWS = [
    {"text": "None beside text", "n": None},
    {"text": None},
    {"text": " \n"},
    {"text": "\u2028"},
    {"text": "a\nb\u0085", "n": 1.5},
    "a plain string",
    {"text": "nested", "of": {"lists": [1, [2]]}},
    {"other": "no text"},
    {"text": ""},
]


@pytest.mark.parametrize("odd_at", [0, 1, 1_500, 2_003])
def test_many_rows_at_once_are_the_rows_one_by_one(odd_at, tmp_path, make_rows):
    rows = make_rows(2_100)
    rows[odd_at:odd_at] = ODD_ROWS
    with StreamingBlockWriter(tmp_path / "one", "rows", 400, text_column="text") as one:
        for row in rows:
            one.write(row)
    with StreamingBlockWriter(tmp_path / "many", "rows", 400, text_column="text") as many:
        many.write(rows[0])
        many.write_many(rows[1:])
        many.write_many([])
    assert _without_leases(tmp_path / "many") == _without_leases(tmp_path / "one")


def test_of_many_rows_those_before_a_bad_one_are_kept_and_it_is_named(tmp_path, make_rows):
    rows = [*make_rows(1_200), {"text": "a lone surrogate \ud800"}, *make_rows(5)]
    with StreamingBlockWriter(tmp_path, "rows", 100) as writer:
        with pytest.raises(BadRowError, match="row 1200 .*column 'text'"):
            writer.write_many(rows)
        assert writer.next_cursor == 1_200
        manifest = writer.close()
        with pytest.raises(UserError, match="closed"):
            writer.write_many(rows[:3])
    assert manifest.total_samples == 1_200


def test_many_rows_end_where_the_limit_is(tmp_path, make_rows):
    with StreamingBlockWriter(tmp_path, "rows", 100, max_rows=1_050) as writer:
        writer.write_many(make_rows(3_000))
        writer.write_many(make_rows(10))
        assert writer.close().total_samples == 1_050
