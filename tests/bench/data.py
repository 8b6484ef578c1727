"""Speed of reading blocks against the plainest code that does the same, in one run on one machine.

    python tests/bench/data.py [--rows 1000000] [--rivals | --rival-python litdata=/path/to/python …]

Ratios are seconds of ours to seconds of the other: below 1 ours is faster. The plain code knows the offset of
each line beforehand and checks nothing. Works are measured in turns, so that what else the machine does hits all.
``--rivals`` installs other libraries, each into an environment of its own below ``--environments``.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from data_writing import make_raw
from parts.report import seconds, show
from parts.rivals import CHUNK, RIVALS
from parts.servers import running

from metaflow_hf.data import BlockManager, Claim, build_blocks
from metaflow_hf.data.manifest import BlockEntry, BlockManifest
from metaflow_hf.data.standalone import StandaloneLedger
from metaflow_hf.store import ObjectStore, open_store

BLOCK = 100_000
# What else the machine does hardly changes the processor's time of this process, which leaves out waiting.
_CLOCKS = {time.perf_counter: "", time.process_time: ", by the processor's time"}
PARTS = Path(__file__).parent / "parts"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--rival-python", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "bench-rivals")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _print_memory(options.memory_of)
        return
    rivals = dict(item.split("=", 1) for item in options.rival_python)
    if options.rivals:
        rivals |= {name: _environment(options.environments, name) for name in RIVALS if name not in rivals}
    directory = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        raw = make_raw(directory, options.rows)
        blocks = directory / "s3" / "bench" / "dataset"
        build_blocks(raw, blocks, samples_per_block=BLOCK)
        chance = random.Random(1)
        starts = [
            CHUNK * chunk
            for chunk in chance.sample(range(options.rows // CHUNK), min(100, options.rows // CHUNK))
        ]
        chunk, whole = _bench_reading(blocks, _Plain(raw), starts, options.repeats)
        _bench_memory(blocks)
        _bench_s3(directory / "s3", raw, starts[:40], options.repeats)
        _bench_tracker(directory)
        for name, python in rivals.items():
            _bench_rival(name, python, raw, directory, options.rows, starts[:10], chunk, whole)
    finally:
        shutil.rmtree(directory)


class _Plain:
    """Chunks of a file of lines whose offsets are known: one read and one decode each."""

    def __init__(self, raw: Path) -> None:
        self._file = raw.open("rb")
        self.offsets = [0]
        for line in self._file:
            self.offsets.append(self.offsets[-1] + len(line))
        self._decode = msgspec.json.Decoder().decode_lines

    def span(self, start: int) -> tuple[int, int]:
        return self.offsets[start], self.offsets[min(start + CHUNK, len(self.offsets) - 1)]

    def chunk(self, start: int) -> list[str]:
        first, stop = self.span(start)
        return self.texts(os.pread(self._file.fileno(), stop - first, first))

    def texts(self, data: bytes) -> list[str]:
        return [row["text"] for row in self._decode(data)]


def _bench_reading(blocks: Path, plain: _Plain, starts: Sequence[int], repeats: int) -> tuple[float, float]:
    with BlockManager(blocks, enable_prefetch=False) as manager:
        _open_all(manager)
        works = [partial(_read_all, read, starts) for read in (_chunk_of(manager), plain.chunk)]
        for clock in (time.process_time, time.perf_counter):
            both = _in_turns(repeats, *works, clock=clock)
            ours, theirs = ([1000 * s / len(starts) for s in part] for part in both)
            what = f"chunk of 4,000 rows at a random place / pread and one decode{_CLOCKS[clock]}"
            show(what, ours, theirs, unit="ms", goal_ratio=1.2)
    chunk, every = min(ours), range(0, len(plain.offsets) - 1, CHUNK)

    def in_order() -> None:
        with BlockManager(blocks) as manager:
            _read_all(_chunk_of(manager), every)

    for clock in (time.process_time, time.perf_counter):
        ours, theirs = _in_turns(repeats, in_order, lambda: _read_all(plain.chunk, every), clock=clock)
        show(
            f"all chunks in order / reading and decoding them{_CLOCKS[clock]}",
            ours,
            theirs,
            goal_ratio=1 / 0.7,
        )
    return chunk / 1000, min(ours)


def _bench_memory(blocks: Path) -> None:
    out = subprocess.run(
        [sys.executable, __file__, "--memory-of", str(blocks)], check=True, capture_output=True, text=True
    ).stdout
    show("memory that 100 random chunks take", [float(out)], unit="MB", goal=60)


def _print_memory(blocks: Path) -> None:
    with BlockManager(blocks) as manager:
        chunks = manager.manifest.total_samples // CHUNK
        before = _peak_megabytes()
        read = _chunk_of(manager)
        for start in random.Random(2).choices(range(chunks), k=100):
            read(start * CHUNK)
        print(_peak_megabytes() - before)


def _bench_s3(root: Path, raw: Path, starts: Sequence[int], repeats: int) -> None:
    """Ranged reads of an object store: a server in another process, 20 ms from each question to its answer."""
    plain = _Plain(raw)
    shutil.copy(raw, root / "bench" / "raw.jsonl")
    every = range(0, min(30 * CHUNK, len(plain.offsets) - 1), CHUNK)
    for latency in (0.0, 0.02):
        with running("s3", root, latency) as url:
            connection = http.client.HTTPConnection(urlsplit(url).netloc)

            def theirs(start: int, connection: http.client.HTTPConnection = connection) -> list[str]:
                first, stop = plain.span(start)
                connection.request("GET", "/bench/raw.jsonl", headers={"Range": f"bytes={first}-{stop - 1}"})
                return plain.texts(connection.getresponse().read())

            with BlockManager(_s3_store(url), enable_prefetch=False) as manager:
                _open_all(manager)
                ours = _chunk_of(manager)
                both = _in_turns(
                    repeats, *(lambda read=read: _read_all(read, starts) for read in (ours, theirs))
                )
            show(
                f"S3, {1000 * latency:.0f} ms away: random chunk / ranged GET and one decode",
                *([1000 * s / len(starts) for s in part] for part in both), unit="ms", goal_ratio=1.2,
            )  # fmt: skip

            def in_order(url: str = url) -> None:
                with BlockManager(_s3_store(url)) as manager:
                    _read_all(_chunk_of(manager), every)

            both = _in_turns(repeats, in_order, lambda read=theirs: _read_all(read, every))
            show(
                f"S3, {1000 * latency:.0f} ms away: the first chunks in order, opened anew / the same", *both
            )
            connection.close()


def _s3_store(url: str) -> ObjectStore:
    options = {
        "endpoint": url,
        "access_key_id": "key",
        "secret_access_key": "secret",
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True},
    }
    return open_store("s3://bench/dataset", backend_options=options)


def _bench_tracker(directory: Path) -> None:
    """10,000 blocks, 250,000 chunks, 64 workers on this disk: its beginning against its middle."""
    blocks = tuple(
        BlockEntry(block_id=i, sample_count=BLOCK, start_index=i * BLOCK, end_index=(i + 1) * BLOCK,
                   file_path=f"blocks/block_{i:05d}.jsonl", size_bytes=1)
        for i in range(10_000)
    )  # fmt: skip
    manifest = BlockManifest(
        dataset_name="d", total_samples=BLOCK * len(blocks), total_blocks=len(blocks), block_size=BLOCK,
        blocks=blocks, digest="d",
    )  # fmt: skip
    middle, beginning = (
        _track(open_store(directory / f"tracker-{done}"), manifest, done) for done in (125, 0)
    )
    for what, goal in (("resume", 20), ("claim", 200), ("completion", 200)):
        show(
            f"tracker of 250,000 chunks, 64 workers, {what} in the middle / at the beginning",
            middle[what], beginning[what], unit="ms", goal=goal,
        )  # fmt: skip


def _track(store: ObjectStore, manifest: BlockManifest, done: int) -> dict[str, list[float]]:
    """Milliseconds of each of 64 workers, after so many thousands are done."""

    def start(name: str) -> StandaloneLedger:
        return StandaloneLedger(store, lambda: manifest, worker_id=name, chunk_size=CHUNK)

    first = start("first")
    for thousand in range(done):
        store.put(first._records._full_key(thousand), b"{}")
    ledgers: list[StandaloneLedger] = []
    claims: list[Claim | None] = []
    figures = {
        "resume": [seconds(lambda i=i: ledgers.append(start(str(i)))) for i in range(64)],
        "claim": [seconds(lambda ledger=ledger: claims.append(ledger.claim())) for ledger in ledgers],
        "completion": [seconds(w.complete, claim, 1) for w, claim in zip(ledgers, claims, strict=True)],
    }
    return {what: [1000 * s for s in found] for what, found in figures.items()}


def _bench_rival(
    name: str,
    python: str,
    raw: Path,
    directory: Path,
    rows: int,
    starts: Sequence[int],
    chunk: float,
    whole: float,
) -> None:
    place = directory / f"rival-{name}"
    place.mkdir()
    run = subprocess.run(
        [python, str(PARTS / "rivals.py"), name, str(raw), str(place), json.dumps(list(starts))],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    if run.returncode:
        print(f"{name} failed: {run.stderr.strip().splitlines()[-1]}")
        return
    figures = json.loads(run.stdout.splitlines()[-1])
    # datasets maps Arrow into memory: no JSON is decoded and no byte is checked, which no file of lines can match.
    goal = None if name == "datasets" else 1
    show(f"random chunk / {name}", [1000 * chunk], [1000 * figures["chunk"]], unit="ms", goal_ratio=goal)
    show(f"all rows in order / {name}", [whole], [rows * figures["row"]], goal_ratio=goal)
    shutil.rmtree(place)


def _environment(root: Path, name: str) -> str:
    """The Python of an environment that has the library, made if there is none."""
    place = root / name
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, clear=True, with_pip=True)
        # The project's PyTorch, which has no GPU's libraries; everything else as the library wants it.
        pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
        torch = [pin for pin in pins if pin.startswith("torch==")]
        command = [python, "-m", "pip", "install", "--quiet", name, *torch]
        subprocess.run(command, check=True)
        (place / "complete").touch()
    return str(python)


def _open_all(manager: BlockManager) -> None:
    """What is done once per block: its index is read."""
    for block in range(manager.get_total_blocks()):
        manager.get_chunk(block, 0, 1)


def _chunk_of(manager: BlockManager) -> Callable[[int], list[str]]:
    return lambda start: manager.get_chunk(start // BLOCK, start % BLOCK // CHUNK)


def _read_all(read: Callable[[int], object], starts: Iterable[int]) -> None:
    for start in starts:
        read(start)


def _in_turns(
    repeats: int, *works: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    def spent(work: Callable[[], object]) -> float:
        began = clock()
        work()
        return clock() - began

    rounds = [[spent(work) for work in works] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def _peak_megabytes() -> float:
    """Of this program alone; what getrusage says was perhaps that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
