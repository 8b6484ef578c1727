"""A writer killed with SIGKILL at any point: the next run goes on, and the bytes are those of an uninterrupted run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metaflow_hf.data import build_blocks, verify_blocks
from metaflow_hf.data.records import read_manifest
from metaflow_hf.store import open_store

ROWS = 4_000
# Only one process writes at a time, so whoever waits need not wait long.
LEASE_SECONDS = 0.3
SETTINGS = {"samples_per_block": 700, "lease_seconds": LEASE_SECONDS}

KILLED = """
import os, signal
from metaflow_hf.data import reading
from metaflow_hf.data.build import plan_dataset, write_dataset
from metaflow_hf.data.sources import open_source, parts
from metaflow_hf.store import open_store

# With several processes, all rows come from the others, in parts that small files have too.
reading.MIN_BYTES, parts.PART_BYTES = 2, 20_000
if num_proc > 1:
    reading._PartsReader._read_here = lambda _reader: False

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class KillingStore:
    "Dies before or after the n-th operation that changes the dataset; those of the lease do not count."

    def __init__(self, inner):
        self._inner, self._left = inner, int(step)

    def __getattr__(self, name):
        method = getattr(self._inner, name)
        if name not in ("create", "put", "take"):
            return method

        def call(*args, **kwargs):
            if any(str(argument).startswith("leases/") for argument in args):
                return method(*args, **kwargs)
            self._left -= 1
            if self._left == 0 and where == "before":
                die()
            result = method(*args, **kwargs)
            if self._left == 0 and where == "after":
                die()
            return result

        return call

class KillingSource:
    "Dies while rows are appended to the open block."

    def __init__(self, inner):
        self._inner, self._left = inner, int(step)

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def batches(self, cursor):
        for batch in self._inner.batches(cursor):
            self._left -= 1
            if self._left == 0 and where == "rows":
                die()
            yield batch

source = open_source(raw)
spec = plan_dataset(source, samples_per_block=700, compression=compression or None)
os.environ["BUILDER_OF"] = out
if where == "rows":
    source = KillingSource(source)
write_dataset(source, spec, KillingStore(open_store(out)), lease_seconds=lease_seconds, num_proc=num_proc)
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet

    directory = tmp_path_factory.mktemp("raw")
    rows = [{"text": f"row {i} " + "x" * (i % 97)} for i in range(ROWS)]
    rows[5]["text"] = rows[1999]["text"] = ""
    pa.parquet.write_table(pa.Table.from_pylist(rows), directory / "raw.parquet", row_group_size=900)
    (directory / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_blocks(directory / "raw.parquet", directory / "whole-parquet", **SETTINGS)
    build_blocks(directory / "raw.jsonl", directory / "whole-jsonl", compression="zstd", **SETTINGS)
    return directory


# A block is uploaded, then its index, then its commit, then (while it has grown by a tenth) the manifest. Each kill is
# of a process that goes on where the one before was killed: 20 kills, and each of the operations is met.
@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("before", [1, 2, 3, 4]),
        ("after", [1, 2, 3, 4]),
        ("rows", [1, 2, 4, 3]),
        ("before", [7, 5, 3, 8]),
        ("after", [11, 6, 5, 1]),
    ],
)
def test_killed_again_and_again_it_ends_with_the_same_bytes(where, steps, raw, tmp_path):
    for step in steps:
        assert _build(raw / "raw.parquet", tmp_path / "out", where, step) == -signal.SIGKILL
        done = read_manifest(open_store(tmp_path / "out"))
        assert done is None or not done.is_complete
    manifest = build_blocks(raw / "raw.parquet", tmp_path / "out", **SETTINGS)
    assert manifest.total_samples == ROWS - 2
    assert _bytes(tmp_path / "out") == _bytes(raw / "whole-parquet")
    assert verify_blocks(tmp_path / "out") == []


def test_killed_between_completion_and_manifest(raw, tmp_path):
    # Six blocks of four operations each, the last of which is the manifest; then the completion.
    step = 6 * 4 + 1
    assert _build(raw / "raw.jsonl", tmp_path / "out", "after", step, compression="zstd") == -signal.SIGKILL
    assert (tmp_path / "out/commits/complete.json").exists()
    assert not json.loads((tmp_path / "out/block_manifest.json").read_text())["is_complete"]
    build_blocks(raw / "raw.jsonl", tmp_path / "out", compression="zstd", **SETTINGS)
    assert _bytes(tmp_path / "out") == _bytes(raw / "whole-jsonl")


def test_processes_that_read_for_a_killed_writer_end_too(raw, tmp_path):
    for step in (2, 7):
        assert _build(raw / "raw.parquet", tmp_path / "out", "before", step, num_proc=2) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while _processes_of(tmp_path / "out"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    build_blocks(raw / "raw.parquet", tmp_path / "out", num_proc=2, **SETTINGS)
    assert _bytes(tmp_path / "out") == _bytes(raw / "whole-parquet")


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(raw, tmp_path):
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from metaflow_hf.data import build_blocks; import sys;"
        "build_blocks(sys.argv[1], sys.argv[2], samples_per_block=700, lease_seconds=0.3)"
    )
    process = _python(code, raw / "raw.parquet", tmp_path / "out")
    assert process.returncode == 1
    assert "File too large" in process.stderr.splitlines()[-1]
    assert build_blocks(raw / "raw.parquet", tmp_path / "out", **SETTINGS).is_complete
    assert _bytes(tmp_path / "out") == _bytes(raw / "whole-parquet")


def _build(
    source: Path, out: Path, where: str, step: int, compression: str = "", num_proc: int = 1
) -> int | None:
    """Runs a builder to its death in a process that is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["metaflow_hf.data.build", "metaflow_hf.store.obstore_backend", "pyarrow.parquet"]
    )
    names = {
        "raw": str(source), "out": str(out), "where": where, "step": step, "compression": compression,
        "lease_seconds": LEASE_SECONDS, "num_proc": num_proc,
    }  # fmt: skip
    process = context.Process(target=exec, args=(KILLED, names))
    process.start()
    process.join(60)
    return process.exitcode


def _processes_of(out: Path) -> list[str]:
    """Every living process that a builder of this dataset started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = (place / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"BUILDER_OF={out}".encode() in environment:
            found.append(place.name)
    return found


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONWARNINGS": "default"},
    )  # fmt: skip


def _bytes(directory: Path) -> dict[str, bytes]:
    """Every file of a dataset but its leases."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("leases")}
