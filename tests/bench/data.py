"""Speed of reading blocks against the plainest code that does the same, in one run on one machine.

    python tests/bench/data.py [--rows 200000]

Prints one line per figure: seconds of ours, seconds of the plain code, and their ratio (1.0 = as fast).
"""

import argparse
import json
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from metaflow_hf.data import BlockManager, build_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    directory = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        raw = _make_raw(directory, rows)
        build_blocks(raw, directory / "converted", samples_per_block=100_000)
        _bench_reading(directory, raw, rows)
    finally:
        shutil.rmtree(directory)


def _make_raw(directory: Path, rows: int) -> Path:
    chance = random.Random(0)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(2000)
    ]
    raw = directory / "raw.jsonl"
    with raw.open("w") as file:
        for i in range(rows):
            file.write(
                json.dumps({"id": i, "text": " ".join(chance.choices(words, k=40)), "source": "bench"}) + "\n"
            )
    print(f"{rows:,} rows, {raw.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
    return raw


def _bench_reading(directory: Path, raw: Path, rows: int) -> None:
    decode = msgspec.json.Decoder().decode_lines
    offsets = _offsets(raw)
    chunk = 4000
    starts = [
        start * chunk for start in random.Random(1).sample(range(rows // chunk), min(50, rows // chunk))
    ]

    def plain_random() -> None:
        with raw.open("rb") as file:
            for start in starts:
                data = os.pread(file.fileno(), offsets[start + chunk] - offsets[start], offsets[start])
                [row["text"] for row in decode(data)]

    def plain_sequential() -> None:
        with raw.open("rb") as file:
            for start in range(0, rows, chunk):
                [row["text"] for row in decode(file.read(offsets[start + chunk] - offsets[start]))]

    with BlockManager(directory / "converted", dataset_chunk_size=chunk, enable_prefetch=False) as manager:
        for block in range(manager.get_total_blocks()):
            manager.get_chunk(block, 0)
        before = _memory_mb()

        def ours_random() -> None:
            for start in starts:
                manager.get_chunk(start // 100_000, start % 100_000 // chunk)

        _report(
            "random chunk of 4,000, against pread and one decode",
            _seconds(ours_random) / len(starts),
            _seconds(plain_random) / len(starts),
        )
        print(f"  peak memory grew by {_memory_mb() - before:.0f} MB")
    with BlockManager(directory / "converted", dataset_chunk_size=chunk) as manager:

        def ours_sequential() -> None:
            for block in range(manager.get_total_blocks()):
                for part in range(manager.get_block(block).chunk_count(chunk)):
                    manager.get_chunk(block, part)

        _report(
            "all chunks in order, against reading and decoding them",
            _seconds(ours_sequential),
            _seconds(plain_sequential),
        )


def _offsets(raw: Path) -> list[int]:
    offsets = [0]
    with raw.open("rb") as file:
        for line in file:
            offsets.append(offsets[-1] + len(line))
    return offsets


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _report(what: str, ours: float, plain: float) -> None:
    print(f"{what}: {ours:.4f} s, plain {plain:.4f} s, speed ratio {plain / ours:.2f}")


if __name__ == "__main__":
    main()
