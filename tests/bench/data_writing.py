"""Speed and memory of making blocks, against the plainest code that does the same, in one run on one machine.

    python tests/bench/data_writing.py [--rows 200000] [--repeats 3] [--num-proc 2]

Prints one line per figure: seconds of ours, seconds of the plain code (the best of the repeats, taken in turns),
and their speed ratio (1.0 = as fast, 2.0 = twice as fast); the same for the processor's seconds of this process and
its children, which other work on the machine hardly changes, and which leave out waiting for the disk.

Several processes against one are measured for four forms of the same rows. Sources that are too small for them are
read by one process, so use at least ``--rows 700000`` (200 MB) to measure the gain.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from metaflow_hf.data import StreamingBlockWriter, build_blocks

NUM_SHARDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-proc", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory-of", choices=[*_MEMORY], help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _print_memory(_MEMORY[options.memory_of], options.raw)
        return
    directory = Path(tempfile.mkdtemp(prefix="bench-data-writing-"))
    try:
        raw = make_raw(directory, options.rows)
        _bench_conversion(directory, raw, options.repeats)
        _bench_writer(directory, raw, options.repeats)
        _bench_processes(directory, raw, options.repeats, options.num_proc)
        _bench_datasets(directory, raw, options.repeats)
        for name in _MEMORY:
            command = [sys.executable, __file__, "--memory-of", name, "--raw", str(raw)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")
    finally:
        shutil.rmtree(directory)


def make_raw(directory: Path, rows: int) -> Path:
    """JSON lines of about 300 bytes."""
    chance = random.Random(0)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(2000)
    ]
    raw = directory / "raw.jsonl"
    with raw.open("w") as file:
        for i in range(rows):
            text = " ".join(chance.choices(words, k=40))
            file.write(json.dumps({"id": i, "text": text, "source": "bench"}) + "\n")
    print(f"{rows:,} rows, {raw.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
    return raw


def _bench_conversion(directory: Path, raw: Path, repeats: int) -> None:
    ours, copying, checking = _in_turns(
        repeats,
        lambda: _build(raw, directory / "converted"),
        lambda: _copy_lines(raw, directory / "copy", None),
        lambda: _copy_lines(raw, directory / "copy", json.loads),
    )
    _report("JSONL -> blocks, against copying lines", ours, copying)
    _report("  against copying lines, each checked by json.loads", ours, checking)
    print(f"  {raw.stat().st_size / ours[0] / 1e6:,.0f} MB/s")


def _bench_writer(directory: Path, raw: Path, repeats: int) -> None:
    import orjson

    rows = [json.loads(line) for line in raw.open()]

    def write() -> None:
        shutil.rmtree(directory / "written", ignore_errors=True)
        with StreamingBlockWriter(directory / "written", "bench", 100_000) as writer:
            for row in rows:
                writer.write(row)

    def write_many() -> None:
        shutil.rmtree(directory / "written", ignore_errors=True)
        with StreamingBlockWriter(directory / "written", "bench", 100_000) as writer:
            for start in range(0, len(rows), 1_000):
                writer.write_many(rows[start : start + 1_000])

    def plain() -> None:
        offsets, at = [], 0
        with (directory / "plain.jsonl").open("wb") as file:
            for row in rows:
                line = orjson.dumps(row) + b"\n"
                offsets.append(at)
                at += len(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())

    one, many, orjson_ = _in_turns(repeats, write, write_many, plain)
    _report("rows of Python -> blocks one by one, against orjson with offsets", one, orjson_)
    _report("rows of Python -> blocks by the thousand, against orjson with offsets", many, orjson_)


def _bench_processes(directory: Path, raw: Path, repeats: int, num_proc: int) -> None:
    """Several processes against one, in turns. The ratio is the median of the pairs, so that drift cancels out."""
    for what, source in _forms(directory, raw).items():
        ratios, seconds = [], []
        for _ in range(repeats):
            one, many = _in_turns(
                1,
                lambda source=source: _build(source, directory / "one"),
                lambda source=source: _build(source, directory / "many", num_proc=num_proc),
            )
            ratios.append(one[0] / many[0])
            seconds.append((one, many))
        (one_wall, one_busy), (many_wall, many_busy) = (
            (
                statistics.median(pair[side][0] for pair in seconds),
                statistics.median(pair[side][1] for pair in seconds),
            )
            for side in (0, 1)
        )
        print(
            f"{what}, num_proc={num_proc} / num_proc=1: speed ratio {statistics.median(ratios):.2f} (wall "
            f"{many_wall:.2f} s / {one_wall:.2f} s, processor {many_busy:.2f} s / {one_busy:.2f} s)",
            flush=True,
        )


def _forms(directory: Path, raw: Path) -> dict[str, Path]:
    """The same rows as one JSONL file and one CSV file, and as eight shards of parquet and of compressed JSONL."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    table = pa.json.read_json(raw)
    shards, compressed, csv = directory / "shards", directory / "compressed", directory / "raw.csv"
    shards.mkdir()
    compressed.mkdir()
    lines = raw.read_bytes().splitlines(keepends=True)
    size = len(table) // NUM_SHARDS
    for number in range(NUM_SHARDS):
        pa.parquet.write_table(
            table.slice(number * size, size), shards / f"{number}.parquet", row_group_size=20_000
        )
        data = b"".join(lines[number * size : (number + 1) * size])
        (compressed / f"{number}.jsonl.gz").write_bytes(gzip.compress(data, compresslevel=1))
    pa.csv.write_csv(table, csv)
    return {
        "one JSONL file": raw,
        f"{NUM_SHARDS} shards of parquet": shards,
        f"{NUM_SHARDS} shards of JSONL.gz": compressed,
        "one CSV file": csv,
    }


def _bench_datasets(directory: Path, raw: Path, repeats: int) -> None:
    """The nearest that `datasets` has: from a parquet file to JSON lines."""
    import datasets

    datasets.disable_progress_bars()
    shards = directory / "shards"

    def theirs() -> None:
        loaded = datasets.load_dataset(
            "parquet", data_dir=str(shards), split="train", cache_dir=str(directory / "cache")
        )
        loaded.to_json(directory / "theirs.jsonl")
        shutil.rmtree(directory / "cache")

    _report(
        "parquet -> blocks, against load_dataset and to_json",
        *_in_turns(repeats, lambda: _build(shards, directory / "parquet"), theirs),
    )


def _convert(raw: Path, out: Path) -> None:
    build_blocks(raw, out)


def _write_rows(raw: Path, out: Path) -> None:
    with StreamingBlockWriter(out, "bench") as writer, raw.open("rb") as lines:
        for line in lines:
            writer.write(json.loads(line))


_MEMORY: dict[str, Callable[[Path, Path], None]] = {"JSONL -> blocks": _convert, "writer": _write_rows}


def _print_memory(work: Callable[[Path, Path], None], raw: Path) -> None:
    """In a process of its own: how much the peak grows after a small first run, which imports everything."""
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory, "small.jsonl")
        with raw.open("rb") as lines:
            small.write_bytes(b"".join(line for _, line in zip(range(100), lines, strict=False)))
        work(small, Path(directory, "first"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = _peak_kilobytes()
        work(raw, Path(directory, "second"))
        grown = _peak_kilobytes() - before
    name = next(name for name, value in _MEMORY.items() if value is work)
    print(f"{name}: peak memory grew by {grown / 1024:.1f} MB")


def _peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def _build(source: Path, out: Path, num_proc: int = 1) -> None:
    shutil.rmtree(out, ignore_errors=True)
    build_blocks(source, out, num_proc=num_proc)


def _copy_lines(source: Path, target: Path, check: Callable[[bytes], object] | None) -> None:
    with source.open("rb") as lines, target.open("wb") as out:
        for line in lines:
            if check is not None:
                check(line)
            out.write(line)
        out.flush()
        os.fsync(out.fileno())


Seconds = tuple[float, float]


def _in_turns(repeats: int, *works: Callable[[], object]) -> list[Seconds]:
    """The best seconds of each, on the wall's clock and on the processor's."""
    best = [(float("inf"), float("inf"))] * len(works)
    for _ in range(repeats):
        for number, work in enumerate(works):
            wall, busy = time.perf_counter(), _busy_seconds()
            work()
            wall, busy = time.perf_counter() - wall, _busy_seconds() - busy
            best[number] = (min(best[number][0], wall), min(best[number][1], busy))
    return best


def _busy_seconds() -> float:
    """The processor's seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _report(what: str, ours: Seconds, plain: Seconds) -> None:
    print(
        f"{what}: {ours[0]:.3f} s, plain {plain[0]:.3f} s, speed ratio {plain[0] / ours[0]:.2f} "
        f"(processor {ours[1]:.3f} s, {plain[1]:.3f} s, {plain[1] / ours[1]:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
