"""Random schedules of kills, zombies and outages for the real worker's code, on a virtual clock.

Each worker is a thread, but only one runs at a time: at every request to the store and at every sleep a scheduler
decides who goes on, who dies, who stands still for minutes, and whose request fails, before or after it was carried
out. The trainer counts how often each position went into the weights, so exactly once is visible there: a merged
model is a vector of ones.
"""

import itertools
import random
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import torch

from metaflow_hf.config import RoundsConfig
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import MetaflowHFError, NotFound, StoreUnavailable
from metaflow_hf.store.objects import CreateResult, Digest, ObjectInfo
from metaflow_hf.train.assembly import assemble_worker
from metaflow_hf.train.closing import Pace
from metaflow_hf.train.delta import delta_layouts, encode_delta
from metaflow_hf.train.heartbeat import Heartbeat, Patience
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Round
from metaflow_hf.train.schedule import Budget, Schedule
from metaflow_hf.train.tensors import TensorReader, write_all, write_tensors
from metaflow_hf.train.trainer import Step
from metaflow_hf.train.worker import Plan

TOKENS = 10
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Killed(BaseException):
    """The process is gone: nothing of it runs any more, not even its cleaning up."""


class Process:
    """One simulated process: a thread that waits for its turn."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.turn = threading.Semaphore(0)
        self.wakes_at = 0.0
        self.killed = False
        self.ended = False
        self.outcome: BaseException | None = None
        self.store = SimStore(world, self)
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _main(self) -> None:
        self.turn.acquire()
        try:
            if self.killed:
                raise Killed
            self.world.run_worker(self)
        except BaseException as error:
            self.outcome = error
        self.ended = True
        self.world.back.release()

    def pause(self, seconds: float = 0.0) -> None:
        """Gives the turn back, and goes on when the scheduler says so, ``seconds`` later at the earliest."""
        self.wakes_at = self.world.now + seconds
        self.world.back.release()
        self.turn.acquire()
        if self.killed:
            raise Killed


class World:
    """The store's content, the clock, the processes, and the dice."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.dice = random.Random(seed)
        self.directory = directory
        self.objects: dict[str, bytes] = {}
        self.now = 0.0
        self.back = threading.Semaphore(0)
        self.processes: list[Process] = []
        self.names = itertools.count()
        self.num_positions = self.dice.randint(3, 14)
        self.workers = self.dice.randint(1, 4)
        self.faults_left = self.dice.randint(0, 8)
        self.rate = self.dice.choice([0.002, 0.01, 0.03])
        self.solo_start = self.dice.choice([0.0, 0.0, 0.4])
        self.seen_rounds = 0
        self.start()

    def start(self) -> None:
        store = SimStore(self, None)
        path = self.directory / "initial"
        digest = write_all(path, {"counts": torch.zeros(self.num_positions)})
        lineage = Lineage(store)
        weights = lineage.upload_payload(path, "weights", 0, digest)
        lineage.create_round(Round(nonce="0", round=0, parent=None, weights=weights))
        for _ in range(self.workers):
            self.spawn()

    def spawn(self) -> Process:
        process = Process(self, f"w{next(self.names)}")
        process.wakes_at = self.now + self.dice.choice([0.0, 0.0, 5.0])
        self.processes.append(process)
        return process

    def run_worker(self, process: Process) -> None:
        rng = random.Random(process.name)
        order = ClaimOrder([self.num_positions], self.num_positions, 1, shuffle=False)
        patience = Patience(minimum=60, first_step=90)
        scratch = self.directory / process.name
        worker = assemble_worker(
            plan=Plan(
                budget=Budget(self.num_positions),
                schedule=Schedule(1.0, "constant", 0.0, 1.0),
                workers=self.workers,
                solo_start=self.solo_start,
                max_failures=10_000,
            ),
            lineage=Lineage(process.store),
            blocks=None,
            order=order,
            trainer=Counter(process, self.num_positions),
            heartbeat=Heartbeat(
                process.store, process.name, patience=patience, process=None, clock=lambda: self.now
            ),
            scratch=scratch,
            attempt=process.name,
            rounds=RoundsConfig(encoding="fp32", seconds=30.0, claim_samples=1),
            pace=Pace(),
            rng=rng,
            clock=lambda: self.now,
            sleep=process.pause,
            outer_step=add_up,
        )
        worker.run()

    def run(self) -> None:
        """One event after the other, until nobody is left; whoever fails is started again, as ``@retry`` does."""
        for _ in range(100_000):
            alive = [process for process in self.processes if not process.ended]
            if not alive:
                return
            ready = [process for process in alive if process.wakes_at <= self.now]
            if not ready:
                self.now = min(process.wakes_at for process in alive)
                continue
            process = self.dice.choice(ready)
            self.now += 0.001
            if self.is_fault() and self.disturb(process):
                continue
            self.resume(process)
            self.check_chain()
        raise AssertionError("no end in sight: the workers wait for each other for ever")

    def resume(self, process: Process) -> None:
        process.turn.release()
        self.back.acquire()
        if process.ended and process.outcome is not None:
            if not isinstance(process.outcome, (Killed, StoreUnavailable)):
                raise process.outcome
            self.spawn()

    def is_fault(self) -> bool:
        if self.faults_left and self.dice.random() < self.rate:
            self.faults_left -= 1
            return True
        return False

    def disturb(self, process: Process) -> bool:
        kind = self.dice.choice(["kill", "zombie", "outage before", "outage after", "another"])
        if kind == "kill":
            process.killed = True
        elif kind == "zombie":
            process.wakes_at = self.now + self.dice.choice([20.0, 70.0, 400.0])
            return True
        elif kind == "another":
            self.spawn()
        else:
            process.store.outage = kind
        return False

    # ---- what must hold after every event, seen from the store's content alone

    def check_chain(self) -> None:
        keys = sorted(key for key in self.objects if key.startswith("rounds/"))
        while self.seen_rounds < len(keys):
            self.check_round(keys, self.seen_rounds)
            self.seen_rounds += 1

    def check_round(self, keys: list[str], number: int) -> None:
        manifest = msgspec.json.decode(self.objects[keys[number]])
        assert manifest["round"] == number
        done = expand(manifest["done"])
        if number:
            parent = msgspec.json.decode(self.objects[keys[number - 1]])
            assert not parent["final"], "a final round has a successor"
            added = [p for item in manifest["accepted"] for p in expand(item["positions"])]
            assert len(added) == len(set(added)), "two contributions cover one position"
            assert not {*added} & {*expand(parent["done"])}, "a position went in twice"
            assert sorted(done) == sorted([*expand(parent["done"]), *added])
        expected = torch.zeros(self.num_positions)
        expected[list(done)] = 1
        assert torch.equal(self.read_weights(manifest["weights"]["key"]), expected)
        assert manifest["final"] == (len(done) == self.num_positions)

    def read_weights(self, key: str) -> torch.Tensor:
        path = self.directory / "check"
        path.write_bytes(self.objects[key])
        with TensorReader(path) as reader:
            return reader["counts"].clone()

    def verdict(self) -> None:
        keys = sorted(key for key in self.objects if key.startswith("rounds/"))
        assert msgspec.json.decode(self.objects[keys[-1]])["final"]
        assert any(process.outcome is None for process in self.processes)


class SimStore:
    """An object store in a dict, one request at a time, that may fail before or after it did what was asked."""

    uri = "memory://simulation"

    def __init__(self, world: World, process: Process | None) -> None:
        self.world = world
        self.process = process
        self.outage = ""

    def _request(self) -> None:
        if self.process is None:
            return
        if self.process.killed:
            raise Killed
        self.process.pause()
        if self.outage == "outage before":
            self.outage = ""
            raise StoreUnavailable("the request did not arrive")

    def _answer(self) -> None:
        if self.process is None:
            return
        if self.outage == "outage after":
            self.outage = ""
            raise StoreUnavailable("the answer did not arrive")

    def create(self, key: str, data: bytes) -> CreateResult:
        self._request()
        content = self.world.objects.setdefault(key, data)
        self._answer()
        return CreateResult(created=content == data, content=content)

    def put(self, key: str, data: bytes) -> None:
        self._request()
        self.world.objects[key] = data
        self._answer()

    def get(self, key: str) -> bytes:
        self._request()
        if key not in self.world.objects:
            raise NotFound(key)
        return self.world.objects[key]

    def delete(self, key: str) -> None:
        self._request()
        self.world.objects.pop(key, None)
        self._answer()

    def children(self, prefix: str = "") -> list[str]:
        self._request()
        start = f"{prefix}/"
        return sorted({k[len(start) :].split("/")[0] for k in self.world.objects if k.startswith(start)})

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectInfo]:
        self._request()
        keys = sorted(key for key in self.world.objects if key.startswith(f"{prefix}/"))
        return iter(
            [ObjectInfo(k, len(self.world.objects[k]), EPOCH) for k in keys if after is None or k > after]
        )

    def upload(self, path: Path, key: str, *, expected: Digest | None = None) -> Digest:
        self._request()
        assert expected is not None
        self.world.objects[key] = path.read_bytes()
        self._answer()
        return expected

    def download(self, key: str, path: Path, *, expected: Digest | None = None) -> Digest:
        path.write_bytes(self.get(key))
        assert expected is not None
        return expected


class Counter:
    """A trainer whose weights count how often each position was trained."""

    def __init__(self, process: Process, num_positions: int) -> None:
        self.process = process
        self.counts = torch.zeros(num_positions)
        self.kept = self.counts.clone()

    def load(self, weights: Path, inner: Path | None) -> None:
        with TensorReader(weights) as reader:
            self.counts = reader["counts"].clone()

    def train(self, claim, learning_rate):
        for part in (0.5, 1.0):
            self.process.pause(self.process.world.dice.choice([1.0, 1.0, 9.0]))
            if part == 0.5:
                self.counts[claim.position] += 1
            yield Step(loss=1.0, tokens=TOKENS // 2, learning_rate=learning_rate(part, 0), part=part)

    def keep(self) -> None:
        self.kept = self.counts.clone()

    def write(self, path: Path, base: Path, encoding) -> Digest:
        with TensorReader(base) as reader:
            layouts = delta_layouts({"counts": tuple(self.kept.shape)}, encoding)
            return write_tensors(path, layouts, encode_delta({"counts": self.kept}, reader, encoding))

    def write_inner(self, path: Path) -> Digest:
        return write_all(path, {"steps": self.counts})

    def memory_bytes(self) -> int:
        return 0


def add_up(base, changes, tokens, momentum, /):
    return base + sum(changes), None


def expand(ranges) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


def play(seed: int) -> World:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        world = World(seed, Path(directory))
        try:
            world.run()
            world.verdict()
        finally:
            for process in world.processes:
                process.killed = True
                if not process.ended:
                    process.turn.release()
                    process.thread.join(5)
        return world


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_any_schedule_ends_with_every_position_in_the_model_exactly_once(first):
    torch.set_num_threads(1)
    for seed in range(first, first + 50):
        try:
            play(seed)
        except (AssertionError, MetaflowHFError, OSError) as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


def test_the_schedules_do_contain_faults():
    worlds = [play(seed) for seed in range(40)]
    outcomes = [type(process.outcome).__name__ for world in worlds for process in world.processes]
    assert outcomes.count("Killed") > 5
    assert outcomes.count("StoreUnavailable") > 5
    assert any(world.now > 90 for world in worlds)
    rounds = [
        msgspec.json.decode(data) for w in worlds for key, data in w.objects.items() if key[:6] == "rounds"
    ]
    assert max(len(item["accepted"]) for item in rounds) > 1
    assert any(item["empty_rounds"] for item in rounds)
