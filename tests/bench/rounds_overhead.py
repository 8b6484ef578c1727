"""What a round costs besides training: encoding and upload, waiting, merge, download, by real workers on one disk.

    python tests/bench/rounds_overhead.py [--millions 50] [--workers 4] [--rounds 4] [--seconds 8] [--encoding int8 fp32]

Each worker is a process of its own; its training sleeps, so that all that is measured is the rounds' own. Rounds are
short here, which is harder for the disk than long ones. Overhead is what a round lasts beyond its training, and is
shown as a part of a round of 60 s; the parts are those of one worker (the merge is done by one while others wait).
A processor's time is told for each as well: other work on the machine, and a disk's queue, are not in it.
The physical limit moves the same bytes in the same number of files by plain reads, writes, fsync and sha256.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from metaflow_hf.config import RoundsConfig
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.events import Event, RoundClosed
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.assembly import assemble_worker
from metaflow_hf.train.closing import Closer, Pace, StopRequested
from metaflow_hf.train.contribution import Publisher
from metaflow_hf.train.delta import delta_layouts, encode_delta
from metaflow_hf.train.heartbeat import Heartbeat, Patience, this_process
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Encoding, Round
from metaflow_hf.train.schedule import Budget, Schedule
from metaflow_hf.train.tensors import Layout, TensorReader, write_tensors
from metaflow_hf.train.trainer import LearningRate, Step
from metaflow_hf.train.worker import Plan, Worker

ROUND_SECONDS = 60.0
CLAIM_SECONDS = 0.1
MANY = 1_000_000


class Sleeper:
    """The ``Trainer`` of a model that learns nothing: training takes time and no work."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._changed = 0

    def load(self, weights: Path, inner: Path | None) -> None:
        del inner
        with TensorReader(weights) as reader:
            for name, tensor in self._weights.items():
                tensor.copy_(reader[name])

    def train(self, claim: Claim, learning_rate: LearningRate) -> Iterator[Step]:
        del claim
        time.sleep(CLAIM_SECONDS)
        yield Step(1.0, 1000, learning_rate(0.0, 0), 1.0)

    def keep(self) -> None:
        # Something to merge, at no cost: another tensor each time.
        tensor = self._weights[sorted(self._weights)[self._changed % len(self._weights)]]
        tensor.view(-1)[:1000] += 1e-3
        self._changed += 1

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        with TensorReader(base) as reader:
            return write_tensors(
                path, delta_layouts(self._shapes, encoding), encode_delta(self._weights, reader, encoding)
            )

    def write_inner(self, path: Path) -> Digest:
        layouts = {
            f"{kind}/{name}": Layout(shape)
            for kind in ("exp_avg", "exp_avg_sq")
            for name, shape in self._shapes.items()
        }
        return write_tensors(
            path, layouts, ((name, torch.zeros(layouts[name].shape)) for name in sorted(layouts))
        )

    def memory_bytes(self) -> int:
        return 0


def shapes_of(millions: int) -> dict[str, tuple[int, ...]]:
    """A language model's matrices: an embedding of a third, then layers."""
    width, inner = 512, 1376
    shapes = {"embed": (millions * 1_000_000 // 3 // width, width)}
    layer = {
        "q": (width, width),
        "k": (width, width),
        "v": (width, width),
        "o": (width, width),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
        "norm": (width,),
    }
    size = sum(torch.Size(shape).numel() for shape in layer.values())
    for number in range(max((millions * 1_000_000 - shapes["embed"][0] * width) // size, 1)):
        shapes |= {f"layers.{number:02d}.{name}": shape for name, shape in layer.items()}
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--encoding", nargs="*", choices=("int8", "fp32"), default=("int8", "fp32"))
    parser.add_argument("--directory", help="where to work; its file system is what is measured")
    options = parser.parse_args()
    shapes = shapes_of(options.millions)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    print(
        f"{parameters / 1e6:.1f} M parameters, {options.workers} workers, rounds of {options.seconds:g} s, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for encoding in options.encoding:
        with tempfile.TemporaryDirectory(prefix="bench-rounds-", dir=options.directory) as directory:
            measure(Path(directory), shapes, encoding, options)


def measure(directory: Path, shapes: dict[str, tuple[int, ...]], encoding: str, options: Any) -> None:
    store = open_store(directory / "store")
    lineage = Lineage(store)
    path = directory / "initial"
    generator = torch.Generator().manual_seed(0)
    layouts = {name: Layout(shape) for name, shape in shapes.items()}
    tensors = ((name, torch.randn(shapes[name], generator=generator)) for name in sorted(shapes))
    digest = write_tensors(path, layouts, tensors)
    weights = lineage.upload_payload(path, "weights", 0, digest)
    lineage.create_round(Round(nonce="0", round=0, parent=None, weights=weights))
    context = multiprocessing.get_context("spawn")
    workers = []
    for number in range(options.workers):
        arguments = (directory, number, shapes, encoding, options.workers, options.rounds, options.seconds)
        workers.append(context.Process(target=work, args=arguments))
        workers[-1].start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, f"a worker ended with {worker.exitcode}"
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("worker-*.json"))]
    largest = max(layout.num_bytes for layout in layouts.values())
    overhead = report(encoding, found, options.seconds, weights.size, largest)
    delta = min(min(item["moved"]["upload"]) for item in found)
    plain = limit(directory, options.workers, delta, weights.size)
    print(
        f"  limit     {plain:7.3f} s for the same bytes by plain calls, ratio {overhead / plain:.2f}",
        flush=True,
    )


def work(
    directory: Path,
    number: int,
    shapes: dict[str, tuple[int, ...]],
    encoding: Any,
    workers: int,
    rounds: int,
    seconds: float,
) -> None:
    """One worker until ``rounds`` rounds are closed; writes what it measured."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    watch.wrap(Publisher, "publish", "upload")
    watch.wrap(Closer, "_close", "merge")
    watch.wrap(Worker, "_load", "download")
    store = open_store(directory / "store")
    watch.count_bytes(store)
    heartbeat = Heartbeat(store, f"worker{number}", patience=Patience(), process=this_process())
    plan = Plan(budget=Budget(MANY, None), schedule=Schedule(1.0, "constant", 0.0, 1.0), workers=workers)
    closed: list[RoundClosed] = []

    def note(event: Event) -> None:
        if isinstance(event, RoundClosed):
            closed.append(event)
            watch.turn(event.waited_seconds)

    no_blocks = BlockManifest(
        dataset_name="none", total_samples=MANY, total_blocks=0, block_size=MANY, blocks=()
    )
    worker = assemble_worker(
        plan=plan,
        lineage=Lineage(store),
        blocks=no_blocks,
        order=ClaimOrder([MANY], MANY, 1, shuffle=False),
        trainer=Sleeper(shapes),
        heartbeat=heartbeat,
        scratch=directory / f"scratch-{number}",
        attempt=f"worker{number}",
        rounds=RoundsConfig(workers=workers, seconds=seconds, encoding=encoding),
        pace=Pace(),
        rng=random.Random(number),
        on_event=note,
        stop=lambda: "enough was measured" if len(closed) >= rounds else None,
    )
    with suppress(StopRequested):
        worker.run()
    assert len(closed) >= rounds
    found = {
        "rounds": watch.rounds,
        "seconds": [event.seconds for event in closed],
        "moved": watch.moved,
        "busy": watch.busy,
        "memory": {part: max(peaks) for part, peaks in watch.memory.items()},
    }
    (directory / f"worker-{number}.json").write_text(json.dumps(found))


@contextmanager
def watched_memory(peaks: list[int]) -> Iterator[None]:
    """Adds the most memory in use above that at the beginning; mapped files, which cost nothing, do not count."""
    before, most, over = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, own_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        peaks.append(max(most, own_memory() - before))


def own_memory() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


class Stopwatch:
    """Seconds of each part of each round, and the bytes that were moved."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self.moved: dict[str, list[int]] = defaultdict(list)
        self.memory: dict[str, list[int]] = defaultdict(list)
        self._current: dict[str, float] = defaultdict(float)
        self.busy: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: type, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            began, busy = time.perf_counter(), time.process_time()
            try:
                with watched_memory(self.memory[part]):
                    return plain(*arguments, **options)
            finally:
                self._current[part] += time.perf_counter() - began
                self.busy[part].append(time.process_time() - busy)

        setattr(owner, name, timed)

    def count_bytes(self, store: ObjectStore) -> None:
        share, download = store.share, store.download

        def shared(path: Path, key: str, digest: Digest) -> None:
            share(path, key, digest)
            self.moved["upload"].append(digest.size)

        def downloaded(*arguments: Any, **options: Any) -> Digest:
            digest = download(*arguments, **options)
            self.moved["download"].append(digest.size)
            return digest

        store.share, store.download = shared, downloaded

    def turn(self, waited: float) -> None:
        """A round is over."""
        self.rounds.append({**self._current, "wait": waited})
        self._current.clear()


def report(encoding: str, found: list[dict[str, Any]], box: float, weights: int, largest: int) -> float:
    """One line a part. The first round is left out: processes began it one after the other."""
    rounds = range(1, min(len(item["rounds"]) for item in found))
    overhead = median(mean(item["seconds"][n] for item in found) - box for n in rounds)
    print(f"{encoding}:")
    for part in ("upload", "wait", "merge", "download"):
        slowest = [max(item["rounds"][n].get(part, 0.0) for item in found) for n in rounds]
        busy = [seconds for item in found for seconds in item["busy"].get(part, ())]
        cores = f", {median(busy):.3f} s of a processor's time" if busy else ""
        print(f"  {part:9} {median(slowest):7.3f} s (slowest worker, median of {len(slowest)} rounds{cores})")
    delta = min(min(item["moved"]["upload"]) for item in found)
    share = overhead / ROUND_SECONDS
    print(
        f"  bytes     {delta / 1e6:.1f} MB a contribution, {weights / 1e6:.1f} MB the weights, and as many the momentum"
    )
    print(
        f"  overhead  {overhead:7.3f} s a round, {100 * share:.1f} % of {ROUND_SECONDS:g} s, "
        f"goal <= 5 %: {'holds' if share <= 0.05 else 'MISSED'}"
    )
    peaks = ((part, max(item["memory"].get(part, 0) for item in found)) for part in ("upload", "merge"))
    shown = ", ".join(f"{part} {peak / 1e6:.0f} MB" for part, peak in peaks)
    print(f"  memory    {shown} (largest tensor {largest / 1e6:.0f} MB)")
    return overhead


def limit(directory: Path, workers: int, delta: int, weights: int) -> float:
    """Seconds for the bytes of one round by plain calls, in the order in which they depend on each other."""
    place = directory / "limit"
    place.mkdir()
    data = {delta: os.urandom(delta), weights: os.urandom(weights)}
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda n: write(place / f"delta-{n}", data[delta]), range(workers)))
        list(map(lambda n: read(place / f"delta-{n}"), range(1, workers)))
        list(map(lambda name: write(place / name, data[weights]), ("weights", "outer")))
        list(pool.map(lambda _: read(place / "weights"), range(1, workers)))
    return time.perf_counter() - began


def write(path: Path, data: bytes) -> None:
    hashlib.sha256(data)
    with path.open("wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def read(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


if __name__ == "__main__":
    main()
