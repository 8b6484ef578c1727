"""Several processes read one source: the result does not depend on how many, nor on what becomes of them."""

import csv
import gzip
import io
import json
import logging
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from metaflow_hf.data import build_blocks, reading, verify_blocks
from metaflow_hf.data.build import plan_dataset, write_dataset
from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.reading_pool import ReadingProcess
from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.sources import open_source, parts
from metaflow_hf.errors import (
    BadRowError,
    HubUnavailable,
    IntegrityError,
    MetaflowHFError,
    SelectionError,
    StoreUnavailable,
)
from metaflow_hf.hub.client import HubClient, RetryPolicy
from metaflow_hf.store import open_store
from metaflow_hf_cli.fixtures import datasets as given

ROWS = 3000
SETTINGS = {"samples_per_block": 400, "compression": None}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Small files in several parts, read by several processes."""
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    monkeypatch.setattr(reading, "MIN_BYTES", 2)


@pytest.fixture
def only_others_read(monkeypatch):
    """The builder reads nothing itself, so that the reading processes must read everything."""
    monkeypatch.setattr(reading._PartsReader, "_read_here", lambda _self: False)


@pytest.fixture(params=["builder", "others", "both"])
def who_reads(request, monkeypatch):
    """Who reads the most: the builder while the others start, only the others, or both at once."""
    if request.param == "others":
        request.getfixturevalue("only_others_read")
    if request.param == "both":
        read_here = reading._PartsReader._read_here

        def read_here_when_all_are_ready(self):
            while not all(process._is_ready for process in self._pool.processes):
                self._serve_processes(is_urgent=True)
            return read_here(self)

        monkeypatch.setattr(reading._PartsReader, "_read_here", read_here_when_all_are_ready)
    return request.param


def _lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _parquet(rows):
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=170)
    return buffer.getvalue()


def _csv(rows):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["n", "text"], *([row["n"], row["text"]] for row in rows)])
    return buffer.getvalue().encode()


def _awkward_csv(rows):
    """A BOM, CRLF, line ends and doubled quotes inside cells, a header over two lines, a bad row, no last line feed."""
    buffer = io.StringIO(newline="")
    cells = [[row["n"], f'{row["text"]} "quoted",\nsecond line\r\n' * (row["n"] % 3 + 1)] for row in rows]
    cells[1500] = ["1500", "one", "too many"]
    csv.writer(buffer, lineterminator="\r\n").writerows([['n "of"\nrow', "text"], *cells])
    return b"\xef\xbb\xbf" + buffer.getvalue().removesuffix("\r\n").encode()


def _misleading_csv(rows):
    """A quote that is an ordinary character, before line ends inside of cells: cuts are guessed wrong behind it."""
    lines = _csv(rows).splitlines(keepends=True)
    lines[1200] = b'1199,a 5" disk\n'
    lines[1201:1800] = [b'%d,"a\nb\nc"\n' % number for number in range(1200, 1799)]
    return b"".join(lines)


def _awkward_lines(rows):
    """A BOM, blank lines, CRLF, rows without text, a row larger than a part, no line feed at the end."""
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    lines[7], lines[1500], lines[1501] = b"", lines[1500] + b"\r", b'{"text": null}'
    lines[2000] = json.dumps({"text": "x" * 70_000}).encode()
    lines[2500], lines[2700] = b'{"text": 7}', b"not JSON"
    return b"\xef\xbb\xbf" + b"\n".join(lines)


SOURCES = {
    "one.jsonl": lambda rows: {"one.jsonl": _lines(rows)},
    "awkward.jsonl": lambda rows: {"awkward.jsonl": _awkward_lines(rows)},
    "one.txt": lambda rows: {"one.txt": "\n".join(row["text"] for row in rows).encode()},
    "one.parquet": lambda rows: {"one.parquet": _parquet(rows)},
    "one.csv": lambda rows: {"one.csv": _csv(rows)},
    "awkward.csv": lambda rows: {"awkward.csv": _awkward_csv(rows)},
    "misleading.csv": lambda rows: {"misleading.csv": _misleading_csv(rows)},
    "one.csv.gz": lambda rows: {"one.csv.gz": gzip.compress(_csv(rows))},
    "shards": lambda rows: {
        f"shards/{n:02d}.{ending}": write(rows[n * 300 : n * 300 + 300])
        for n in range(10)
        for ending, write in [
            [("jsonl", _lines), ("jsonl.gz", lambda r: gzip.compress(_lines(r))), ("ndjson", _lines)][n % 2 or n % 4]
        ]
    },
    "parquet-shards": lambda rows: {f"parquet-shards/{n:02d}.parquet": _parquet(rows[n * 300 : n * 300 + 300]) for n in range(10)},
    "csv-shards": lambda rows: {f"csv-shards/{n}.csv": _csv(rows[n * 300 : n * 300 + 300]) for n in range(10)},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(name):
        rows = [{"n": i, "text": f"row {i} \u2028 é " + "x" * (i % 90)} for i in range(ROWS)]
        for path, data in SOURCES[name](rows).items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(data)
        return tmp_path / name

    return write


@pytest.mark.parametrize("num_proc", [2, 3])
@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"one.csv.gz"}))
def test_the_bytes_do_not_depend_on_the_number_of_processes(name, num_proc, who_reads, write, tmp_path):
    source = write(name)
    assert len(list(parts.split(open_source(source), Cursor()))) > 1
    build_blocks(source, tmp_path / "one", on_bad_row="skip", **SETTINGS)
    manifest = build_blocks(source, tmp_path / "two", num_proc=num_proc, on_bad_row="skip", **SETTINGS)
    assert manifest.total_samples > ROWS - 10
    assert _bytes(tmp_path / "two") == _bytes(tmp_path / "one")


@pytest.mark.parametrize("name", ["one.jsonl", "one.parquet", "awkward.csv"])
def test_many_batches_of_one_part(name, only_others_read, write, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 10**9)
    monkeypatch.setattr(reading, "_num_processes", lambda *_: 1)
    source = write(name)
    if name == "one.jsonl":
        # Five batches; the second is not the source's bytes, because a line is blank.
        lines = source.read_bytes().splitlines(keepends=True) * 5
        source.write_bytes(b"".join([*lines[:5000], b"\n", *lines[5000:]]))
    build_blocks(source, tmp_path / "one", on_bad_row="skip", **SETTINGS)
    build_blocks(source, tmp_path / "two", num_proc=2, on_bad_row="skip", **SETTINGS)
    assert _bytes(tmp_path / "two") == _bytes(tmp_path / "one")


def test_each_run_may_have_another_number_of_processes(who_reads, write, tmp_path):
    source = write("awkward.jsonl")
    settings = {**SETTINGS, "on_bad_row": "skip"}
    build_blocks(source, tmp_path / "whole", **settings)
    for num_proc in (2, 1):
        _stop_after_two_blocks(source, tmp_path / "out", num_proc, settings)
    build_blocks(source, tmp_path / "out", num_proc=2, **settings)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "min_bytes", "num_proc", "started"),
    [
        ("one.jsonl", 1000, 1, []),
        ("one.jsonl", 1000, 2, [1]),
        ("one.jsonl", 1000, 3, [2]),
        # No more processes than the size is worth: one for each half of the least size.
        ("one.jsonl", 160_000, 8, [3]),
        ("one.jsonl", 10**9, 8, []),
        # A byte of CSV or parquet counts three times.
        ("one.csv", 500_000, 2, [1]),
        ("one.csv", 800_000, 2, []),
        # A file that cannot be cut is read by one process.
        ("one.csv.gz", 1000, 8, []),
    ],
)
def test_the_size_decides_whether_processes_are_started(
    name, min_bytes, num_proc, started, write, tmp_path, monkeypatch
):
    counts = []

    class CountingPool(reading.ReadingPool):
        def __init__(self, source, spec, num_processes):
            counts.append(num_processes)
            super().__init__(source, spec, num_processes)

    monkeypatch.setattr(reading, "MIN_BYTES", min_bytes)
    monkeypatch.setattr(reading, "ReadingPool", CountingPool)
    source = write(name)
    assert name != "one.jsonl" or 240_000 < source.stat().st_size < 320_000
    build_blocks(source, tmp_path / "out", num_proc=num_proc, **SETTINGS)
    assert counts == started


def test_what_is_left_after_a_resume_decides_too(write, tmp_path, monkeypatch):
    source = open_source(write("one.jsonl"))
    size = source.files[0].size
    monkeypatch.setattr(reading, "MIN_BYTES", size // 2)
    assert reading._num_processes(source, Cursor(row=100, offset=size // 4), 2) == 1
    assert reading._num_processes(source, Cursor(row=2000, offset=size * 3 // 4), 2) == 0


@pytest.mark.parametrize("name", ["one.jsonl", "shards"])
def test_a_bad_row_keeps_its_number(name, who_reads, write, tmp_path):
    source = write(name)
    place = source if source.is_file() else source / "08.jsonl"
    data = place.read_bytes()
    at = data.index(b"row 2500 " if source.is_file() else b"row 2600 ")
    place.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
    errors = []
    for num_proc in (1, 2):
        with pytest.raises(BadRowError) as error:
            build_blocks(source, tmp_path / f"out-{num_proc}", num_proc=num_proc, **SETTINGS)
        errors.append(str(error.value))
        assert not (tmp_path / f"out-{num_proc}/commits/complete.json").exists()
    assert errors[0] == errors[1]
    assert f"{place.name}: row {2500 if source.is_file() else 200}" in errors[0]
    one, two = (
        build_blocks(source, tmp_path / f"skip-{n}", num_proc=n, on_bad_row="skip", **SETTINGS)
        for n in (1, 2)
    )
    assert one == two
    assert (one.total_samples, one.skipped_rows) == (ROWS - 1, 1)


def test_a_damaged_file_is_named_behind_the_rows_before_it(who_reads, write, tmp_path):
    source = write("parquet-shards")
    damaged = source / "06.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"06\.parquet"):
        build_blocks(source, tmp_path / "out", num_proc=2, **SETTINGS)
    assert read_manifest(open_store(tmp_path / "out")).total_samples == 1600


def test_a_csv_file_that_cannot_be_parsed_is_refused_at_the_same_line(who_reads, write, tmp_path):
    source = write("awkward.csv")
    data = source.read_bytes()
    at = data.index(b'"row 2500 ')
    source.write_bytes(data[:at] + b'"no" comma' + data[at:])
    errors = []
    for num_proc in (1, 2):
        with pytest.raises(SelectionError) as error:
            build_blocks(source, tmp_path / f"{num_proc}", num_proc=num_proc, on_bad_row="skip", **SETTINGS)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "line " in errors[0]
    one, two = (_bytes(tmp_path / f"{n}") for n in (1, 2))
    committed = {name for name in one if name.startswith(("blocks", "commits"))}
    assert len(committed) >= 9
    assert all(one[name] == two[name] for name in committed)


def test_wrong_cuts_of_a_csv_file_are_noticed(only_others_read, write, tmp_path, monkeypatch):
    abandoned = []
    read_again = reading._PartsReader._read_again

    def record(self, rest, first_row):
        abandoned.append(first_row + rest.begin.row)
        return read_again(self, rest, first_row)

    monkeypatch.setattr(reading._PartsReader, "_read_again", record)
    build_blocks(write("misleading.csv"), tmp_path / "out", num_proc=2, **SETTINGS)
    assert len(abandoned) == 1
    assert abandoned[0] >= 1000


def test_limits_are_exact(write, tmp_path):
    source = write("one.jsonl")
    one, two = (
        build_blocks(source, tmp_path / f"{n}", num_proc=n, max_bytes=50_000, **SETTINGS) for n in (1, 2)
    )
    assert one == two
    assert build_blocks(source, tmp_path / "c", num_proc=2, max_rows=1234, **SETTINGS).total_samples == 1234


def test_a_killed_process_is_replaced(only_others_read, write, tmp_path, caplog):
    source = write("one.jsonl")
    build_blocks(source, tmp_path / "whole", **SETTINGS)
    killed = []

    def kill_one(_manifest):
        if not killed:
            killed.append(_reading_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    with caplog.at_level(logging.WARNING, logger="metaflow_hf.data"):
        build_blocks(source, tmp_path / "out", num_proc=2, progress=kill_one, **SETTINGS)
    assert "exit code -9" in caplog.text
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")
    assert _reading_processes() == []


def test_what_came_of_a_part_before_the_kill_is_not_read_again(only_others_read, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 10**9)
    monkeypatch.setattr(reading, "_num_processes", lambda *_: 1)
    build_blocks(f"hf://{given.GZIP_ID}", tmp_path / "whole", samples_per_block=50)
    gate = hub.faults.hold_next(path="*train-00001-of-00002*")
    killed, begins = [], []
    begin = ReadingProcess.begin

    def record_begin(self, reading, spool):
        begins.append(reading.rest.begin)
        begin(self, reading, spool)

    monkeypatch.setattr(ReadingProcess, "begin", record_begin)

    def kill_at_the_second_file(_manifest):
        if not killed:
            assert gate.wait_until_held()
            killed.extend(_reading_processes())
            os.kill(killed[0], signal.SIGKILL)
            gate.open()

    build_blocks(
        f"hf://{given.GZIP_ID}",
        tmp_path / "out",
        samples_per_block=50,
        num_proc=2,
        progress=kill_at_the_second_file,
    )
    assert len(killed) == 1
    assert [begin.row > 0 for begin in begins] == [False, True]
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_processes_that_are_killed_again_and_again_are_an_error_and_no_hang(
    only_others_read, write, tmp_path
):
    source = write("one.jsonl")

    def kill_all(_manifest):
        for process in _reading_processes():
            os.kill(process, signal.SIGKILL)

    with pytest.raises(MetaflowHFError, match=r"exit code -9.*smaller num_proc"):
        build_blocks(source, tmp_path / "out", num_proc=2, progress=kill_all, **SETTINGS)
    assert _reading_processes() == []
    assert not list((tmp_path / "out/blocks").glob(".*"))
    manifest = build_blocks(source, tmp_path / "out", num_proc=2, **SETTINGS)
    assert manifest.total_samples == ROWS
    assert verify_blocks(tmp_path / "out") == []


def test_no_process_is_left_when_the_store_fails(who_reads, write, tmp_path, recording_store):
    source = open_source(write("one.jsonl"))

    def fail(method, key, _number):
        if key == "commits/00002.json" and method == "create":
            raise StoreUnavailable("gone")

    store = recording_store(open_store(tmp_path / "out"), fail)
    with pytest.raises(StoreUnavailable, match="gone"):
        write_dataset(source, plan_dataset(source, samples_per_block=400), store, num_proc=2, lease_seconds=1)
    assert _reading_processes() == []
    assert not list((tmp_path / "out/blocks").glob(".*"))


@pytest.mark.parametrize("repo_id", [given.PARQUET_ID, given.CHAT_ID])
def test_datasets_of_the_hub(repo_id, hub, tmp_path):
    build_blocks(f"hf://{repo_id}", tmp_path / "one", samples_per_block=50)
    build_blocks(f"hf://{repo_id}", tmp_path / "two", samples_per_block=50, num_proc=2)
    assert _bytes(tmp_path / "two") == _bytes(tmp_path / "one")


def test_an_outage_of_the_hub_is_one_here_too(hub, tmp_path, monkeypatch):
    retry = RetryPolicy(attempts=2, seconds=5.0, first_wait_seconds=0.01, max_wait_seconds=0.02)
    monkeypatch.setattr(
        "metaflow_hf.data.sources.hub.HubClient", lambda endpoint: HubClient(endpoint, retry=retry)
    )
    hub.faults.fail_next(1000, status=503, path="*train-00001*")
    with pytest.raises(HubUnavailable, match="train-00001"):
        build_blocks(f"hf://{given.GZIP_ID}", tmp_path / "out", samples_per_block=30, num_proc=2)
    hub.faults.clear()
    hub.log.clear()
    assert build_blocks(
        f"hf://{given.GZIP_ID}", tmp_path / "out", samples_per_block=30, num_proc=2
    ).is_complete
    build_blocks(f"hf://{given.GZIP_ID}", tmp_path / "whole", samples_per_block=30)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def _stop_after_two_blocks(source, out, num_proc, settings):
    done = []
    opened = open_source(source)
    write_dataset(
        opened, plan_dataset(opened, **settings), open_store(out), num_proc=num_proc,
        progress=done.append, stop=lambda: len(done) >= 2,
    )  # fmt: skip


def _reading_processes() -> list[int]:
    """Those of this process, by Linux's own records."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            command = (place / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and b"reading_process" in command:
            found.append(int(place.name))
    return sorted(found)


def _bytes(directory):
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("leases")}
