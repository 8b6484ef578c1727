"""Each protection of the rounds, taken out, makes a simulated run fail: none of them is decoration.

A case names a protection, the lines that make it, what stands there without it, and the worlds in which its absence
must show. The same worlds are played with the protection in place first, and must end well.
"""

import inspect
import json
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from simulation.audit import read_tensor
from simulation.processes import Process
from simulation.schedules import Dice, Fault, PairSchedule, in_a_world, pair_schedules, play_random
from simulation.stores import SimStore
from simulation.world import Scenario, World

from metaflow_hf.errors import TrainingIncomplete
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.closing import StopRequested
from metaflow_hf.train.judging import Judge
from metaflow_hf.train.ledger import RoundsLedger
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.merge import Merger
from metaflow_hf.train.records import Delta
from metaflow_hf.train.tensors import write_all
from metaflow_hf.train.worker import Worker

FOREVER = 1e9
PAIR = Scenario(num_positions=3, workers=2)


class HonestWorld(World):
    """Nobody publishes anything wrong, so nothing is ever rejected."""

    def verdict(self) -> None:
        super().verdict()
        for manifest in self.auditor.manifests:
            assert not manifest["rejected"], manifest["rejected"]


class FaultlessWorld(HonestWorld):
    """No worker is lost, so no position ever fails."""

    def verdict(self) -> None:
        super().verdict()
        for manifest in self.auditor.manifests:
            assert not manifest["failures"], "a claim was lost although nobody died"


class BranchNames(HonestWorld):
    """Attempts are named by their branch: whoever is restarted has the name of who was killed."""

    def name_of(self, process: Process, rng: random.Random) -> str:
        return f"branch-{process.slot}"


class BeatingWorld(HonestWorld):
    """A thread in every process moves its heartbeat, whether the process gets on or not."""

    def turn(self, process: Process) -> None:
        super().turn(process)
        for key, content in list(self.objects.items()):
            if key.startswith("heartbeats/"):
                self.objects[key] = json.dumps(json.loads(content) | {"beats": self.turns}).encode()


class PoisonedWorld(World):
    """Training fails at position 1, whoever tries; the run must end and name it, or go on without it."""

    def verdict(self) -> None:
        self.auditor.look(self.objects)
        newest = self.auditor.newest
        if self.scenario.skip_failing:
            assert newest["final"]
            assert newest["skipped"] == [[1, 2]]
            return
        assert not newest["final"]
        assert newest["failures"]["1"] >= self.scenario.max_failures
        ends = [p.outcome for p in self.processes if isinstance(p.outcome, TrainingIncomplete)]
        messages = [str(end) for end in ends if not isinstance(end, StopRequested)]
        assert messages
        assert all("position 1" in message for message in messages)


def dice(count: int, *, kind: type[World] = HonestWorld, **scenario: Any) -> Callable[[], None]:
    """So many random schedules."""

    def play() -> None:
        for seed in range(count):
            play_random(seed, kind=kind, scenario=Scenario(**scenario) if scenario else None)

    return play


def pairs(fault: Fault, *, most: int = 70, kind: type[World] = HonestWorld) -> Callable[[], None]:
    """Two workers, one of them hurt in one way, at some pairs of places."""

    def play() -> None:
        for schedule in pair_schedules(stride=53, most=most):
            if schedule.fault == fault:
                in_a_world(PAIR, 0, schedule.play, kind)

    return play


def answers_lost() -> None:
    """The client repeats creates that were carried out already; nothing else happens."""
    for seed in range(40):
        scheduler = Dice(random.Random(seed), faults=("sent twice",), num_faults=20, rate=0.2)
        in_a_world(Scenario(num_positions=5, workers=2), seed, scheduler.play, FaultlessWorld)


def hangs(kind: type[World] = HonestWorld) -> None:
    """A worker stands still for ever in the middle of its work."""

    def play(world: World) -> None:
        for _ in range(30):
            world.turn(world.ready()[0])
        next(p for p in world.alive if p.turns > 10).wakes_at = FOREVER
        while ready := world.ready():
            world.turn(ready[0])

    in_a_world(PAIR, 0, play, kind)


def poisoned(*, skip: bool) -> Callable[[], None]:
    scenario = Scenario(poison=frozenset({1}), max_failures=3, skip_failing=skip, workers=2)
    return dice(5, kind=PoisonedWorld, **{name: getattr(scenario, name) for name in scenario.__slots__})


def forged(*, base: str | None, copies: int) -> Callable[[], None]:
    """Contributions to round 0 that nobody claimed: from another round, or the same positions several times."""

    def play() -> None:
        def publish_then_play(world: World) -> None:
            lineage = Lineage(SimStore(world))
            for number in range(copies):
                path = world.directory / f"forged-{number}"
                counts = torch.zeros(world.num_positions)
                counts[0] = 1
                digest: Digest = write_all(path, {"counts": counts})
                attempt = f"{number:016x}"
                delta = Delta(
                    base=base or world.auditor.digests[0],
                    attempt=attempt,
                    positions=[(0, 1)],
                    tokens=10,
                    loss=1.0,
                    encoding="fp32",
                    tensors=lineage.upload_delta(path, 0, attempt, digest),
                )
                lineage.publish(0, delta)
            PairSchedule(0, 0, "zombie", 0).play(world)
            assert len(world.auditor.manifests[1]["rejected"]) == (copies if base else copies - 1)

        in_a_world(PAIR, 0, publish_then_play)

    return play


@dataclass(frozen=True)
class Protection:
    """``old`` in the source of ``owner.name`` is the protection, ``new`` is what stands there without it."""

    what: str
    worlds: Callable[[], None]
    owner: Any = None
    name: str = ""
    old: str = ""
    new: str = ""
    without: Callable[[], None] | None = None

    def take_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        function = getattr(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.old!r} is not in {self.name} any more"
        namespace: dict[str, Any] = {}
        code = compile(source.replace(self.old, self.new), f"<{self.what} taken out>", "exec")
        exec(code, function.__globals__, namespace)
        monkeypatch.setattr(self.owner, self.name, namespace[self.name])


PROTECTIONS = [
    Protection(
        "a round is created once",
        pairs("zombie"),
        Lineage,
        "create_round",
        "self._create(key, manifest).content",
        "(self.store.put(key, manifest.encode()), manifest.encode())[1]",
    ),
    Protection(
        "a claim is created once",
        dice(150),
        Lineage,
        "create_claim",
        "self._create(key, claim).created",
        "(self.store.put(key, claim.encode()), True)[1]",
    ),
    Protection(
        "a contribution names the round that it started from",
        forged(base="f" * 64, copies=1),
        Judge,
        "_check",
        "if delta.base != base.digest:",
        "if False:",
    ),
    Protection(
        "contributions are disjoint",
        forged(base=None, copies=2),
        Judge,
        "_check",
        "twice = candidate.positions & taken",
        "twice = None",
    ),
    Protection(
        "attempts have names of their own",
        dice(200),
        without=dice(200, kind=BranchNames),
    ),
    Protection(
        "after a lost answer the key is read, and equal bytes count as ours",
        answers_lost,
        SimStore,
        "read_winner",
        "created=content == data",
        "created=False",
    ),
    Protection(
        "a claim is checked again after it was created",
        dice(200),
        RoundsLedger,
        "claim",
        "if self._lineage.round(self.base.number + 1) is not None:",
        "if False:",
    ),
    Protection(
        "manifests are never deleted",
        dice(10),
        Lineage,
        "sweep",
        "    return deleted",
        "    return [self.store.delete(f'rounds/{n:010d}.json') for n in range(newest.number - 1)]",
    ),
    Protection(
        "heartbeats move by progress alone",
        hangs,
        without=lambda: hangs(BeatingWorld),
    ),
    Protection(
        "a branch ends well only when the lineage is final",
        pairs("stop"),
        Worker,
        "run",
        "except StopRequested:\n        raise",
        "except StopRequested:\n        return",
    ),
    Protection(
        "a position that fails again and again ends the run",
        poisoned(skip=False),
        Worker,
        "_refuse_hopeless",
        "if failing:",
        "if False:",
    ),
    Protection(
        "a position that fails again and again is skipped where that is wanted",
        poisoned(skip=True),
        Merger,
        "_manifest",
        "if self.skip_failing:",
        "if False:",
    ),
]


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: protection.what)
def test_without_it_a_run_goes_wrong(protection, monkeypatch, caplog):
    caplog.set_level("CRITICAL", logger="metaflow_hf")
    torch.set_num_threads(1)
    protection.worlds()
    if protection.owner is not None:
        protection.take_out(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 -- an invariant, or an error that no world expects
        (protection.without or protection.worlds)()


def test_the_auditor_reads_weights_by_itself(tmp_path):
    # The counts are what the library wrote, read by other code.
    path = tmp_path / "weights"
    write_all(path, {"counts": torch.arange(3.0)})
    assert read_tensor(path.read_bytes(), "counts") == (0, 1, 2)
