"""A deterministic world for the real worker's code: one clock, one store, processes that take turns, and faults.

Only one process runs at a time. At every request to the store, at every step of training and at every pause the
scheduler decides who goes on, who dies, who stands still for minutes, who is told to stop, and whose request or answer
is lost. After every turn the store's content must satisfy ``audit.Auditor``.
"""

import functools
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from metaflow_hf.config import RoundsConfig
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import ClaimOrder
from metaflow_hf.errors import StoreUnavailable, TrainingIncomplete
from metaflow_hf.train.assembly import assemble_worker
from metaflow_hf.train.closing import Pace, StopRequested
from metaflow_hf.train.heartbeat import Heartbeat, Patience
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Round
from metaflow_hf.train.schedule import Budget, Schedule
from metaflow_hf.train.tensors import write_all
from metaflow_hf.train.worker import Plan, new_attempt

from .audit import Auditor
from .memory import MemoryPath
from .processes import Killed, Process
from .stores import Objects, SimStore
from .trainers import Counter, PoisonedRow

TURN_SECONDS = 0.001
MAX_TURNS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a world consists of; everything else is the scheduler's."""

    num_positions: int = 6
    workers: int = 2
    solo_start: float = 0.0
    round_seconds: float = 30.0
    poison: frozenset[int] = frozenset()
    max_failures: int = 10_000
    skip_failing: bool = False


@dataclass(kw_only=True)
class World:
    """Processes over one store; a ``scheduler`` drives it turn by turn with ``play``."""

    scenario: Scenario
    directory: Any = field(default_factory=MemoryPath)
    seed: int = 0
    step_seconds: Callable[[Process], float] = lambda process: 1.0
    objects: Objects = field(default_factory=Objects)
    processes: list[Process] = field(default_factory=list)
    now: float = 0.0
    turns: int = 0
    writes: int = 0

    def __post_init__(self) -> None:
        self._names = itertools.count()
        self._alive: list[Process] = []
        self._rounds_changed = False
        self._claims: dict[str, tuple[int, int]] = {}
        self._closed_at: dict[int, int] = {}
        self._patience = Patience(minimum=40, first_step=60)
        self._rounds = rounds_of(self.scenario.round_seconds)
        self.num_positions = self.scenario.num_positions
        self.auditor = Auditor(self.num_positions)
        path = self.directory / "initial"
        digest = write_all(path, {"counts": torch.zeros(self.num_positions)})
        lineage = Lineage(SimStore(self))
        weights = lineage.upload_payload(path, "weights", 0, digest)
        lineage.create_round(Round(nonce="0", round=0, parent=None, weights=weights))
        self.auditor.look(self.objects)
        for slot in range(self.scenario.workers):
            self.spawn(slot)

    # ---- what a scheduler does

    def spawn(self, slot: int = -1) -> Process:
        """Starts another process, which may go on at once; ``slot`` is the branch that it runs."""
        process = Process(f"w{next(self._names)}", slot, self._work)
        process.wakes_at = self.now
        self.processes.append(process)
        self._alive.append(process)
        return process

    @property
    def alive(self) -> Sequence[Process]:
        return self._alive

    def ready(self) -> list[Process]:
        """The processes that may go on; the clock moves to when the first one may."""
        now = self.now
        ready = [process for process in self._alive if process.wakes_at <= now]
        if not ready and self._alive:
            self.now = min([process.wakes_at for process in self._alive])
            return self.ready()
        return ready

    def turn(self, process: Process) -> None:
        """Lets one process go on, looks at the rounds, and starts who failed again, as ``@retry`` does."""
        self.turns += 1
        assert self.turns < MAX_TURNS, "no end in sight: the workers wait for each other for ever"
        self.now += TURN_SECONDS
        process.resume()
        if self._rounds_changed:
            self._rounds_changed = False
            self.auditor.look(self.objects)
            self._closed_at.setdefault(self.auditor.newest["round"], self.turns)
        if process.ended:
            self._alive.remove(process)
            self._bury(process)

    def verdict(self) -> None:
        """What must hold when nobody is left: the lineage is final, whole, and somebody ended well."""
        self.auditor.look(self.objects)
        assert self.auditor.newest["final"], "nobody is left, and the lineage is not final"
        assert any(process.outcome is None for process in self.processes)

    # ---- what the processes do

    def pause(self, process: Process, seconds: float = 0.0) -> None:
        process.wakes_at = self.now + seconds
        process.pause()

    def wrote(self, key: str) -> None:
        """The store is about to change what stands under ``key``."""
        self.writes += 1
        if key.startswith("rounds/"):
            self._rounds_changed = True

    def claimed(self, key: str, record: bytes) -> None:
        """The store took a claim."""
        self._claims[json.loads(record)["nonce"]] = (int(key.split("/")[1]), self.turns)

    def training_begins(self, claim: Claim) -> None:
        """A worker begins with a claim: when it took it, its round was open."""
        number, turn = self._claims[claim.token]
        closed = self._closed_at.get(number + 1, MAX_TURNS)
        assert turn <= closed, f"position {claim.position} was claimed in a closed round, and is trained"

    def name_of(self, process: Process, rng: random.Random) -> str:
        """The attempt that a process calls itself."""
        return new_attempt(rng)

    def _bury(self, process: Process) -> None:
        if process.outcome is None:
            assert self.auditor.newest["final"], f"{process.name} ended well before the lineage was final"
            return
        expected = (Killed, StoreUnavailable, StopRequested, PoisonedRow)
        if isinstance(process.outcome, expected):
            self.spawn(process.slot)
        elif not isinstance(process.outcome, TrainingIncomplete) or not self.scenario.poison:
            raise process.outcome

    def _work(self, process: Process) -> None:
        rng = random.Random(f"{self.seed}/{process.name}")
        attempt = self.name_of(process, rng)
        store = SimStore(self, process)
        budget = Budget(self.num_positions)

        def clock() -> float:
            return self.now

        assemble_worker(
            plan=Plan(
                budget=budget,
                schedule=Schedule(1.0, "constant", 0.0, 1.0),
                workers=self.scenario.workers,
                solo_start=self.scenario.solo_start,
                max_failures=self.scenario.max_failures,
                skip_failing=self.scenario.skip_failing,
            ),
            lineage=Lineage(store),
            blocks=None,
            order=order_of(self.num_positions),
            trainer=Counter(self, process),
            heartbeat=Heartbeat(store, attempt, patience=self._patience, process=None, clock=clock),
            scratch=self.directory / process.name,
            attempt=attempt,
            rounds=self._rounds,
            pace=Pace(first_pause=2.0, longest_pause=20.0),
            rng=rng,
            stop=lambda: process.told_to_stop,
            clock=clock,
            sleep=lambda seconds: self.pause(process, seconds),
            outer_step=add_up,
            nonce=lambda: f"{rng.getrandbits(128):032x}",
        ).run()


@functools.cache
def rounds_of(seconds: float) -> RoundsConfig:
    return RoundsConfig(encoding="fp32", seconds=seconds, claim_samples=1)


@functools.cache
def order_of(num_positions: int) -> ClaimOrder:
    return ClaimOrder([num_positions], num_positions, 1, shuffle=False)


def add_up(base, changes, tokens, momentum, /):
    """The outer step of a model that counts."""
    return base + sum(changes), None
