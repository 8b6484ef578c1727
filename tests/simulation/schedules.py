"""Who goes on, and what goes wrong: schedules drawn by dice, and all of a kind one after the other."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .processes import Process
from .world import Scenario, World

FAULTS = ("kill", "stop", "zombie", "join", "lost request", "lost answer", "sent twice")
Fault = Literal["kill", "stop", "zombie", "restart"]


def in_a_world(
    scenario: Scenario, seed: int, play: Callable[[World], None], kind: type[World] = World
) -> World:
    """Plays a schedule in a fresh world."""
    world = kind(scenario=scenario, seed=seed)
    play(world)
    world.verdict()
    return world


def random_scenario(dice: random.Random) -> Scenario:
    """A small lineage: 1 to 8 workers expected, mostly few."""
    return Scenario(
        num_positions=dice.choice([1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 8, 12]),
        workers=dice.choice([1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 8]),
        solo_start=dice.choice([0.0, 0.0, 0.4]),
        round_seconds=dice.choice([2.0, 30.0]),
    )


def play_random(seed: int, *, kind: type[World] = World, scenario: Scenario | None = None) -> World:
    """One schedule drawn from ``seed``: the same seed is the same schedule, turn by turn."""
    dice = random.Random(seed)
    scenario = scenario or random_scenario(dice)
    return in_a_world(scenario, seed, Dice(dice).play, kind)


class Dice:
    """A scheduler that throws dice at every turn."""

    def __init__(
        self,
        dice: random.Random,
        *,
        faults: Sequence[str] | None = None,
        num_faults: int | None = None,
        rate: float | None = None,
    ) -> None:
        self._dice = dice
        # Some worlds are dominated by one kind of fault.
        self._faults = faults or dice.choice([FAULTS, FAULTS, (dice.choice(FAULTS),)])
        self._faults_left = dice.randint(0, 8) if num_faults is None else num_faults
        self._rate = rate or dice.choice([0.003, 0.01, 0.03])

    def play(self, world: World) -> None:
        dice = self._dice
        throw = dice.random
        world.step_seconds = lambda process: dice.choice([1.0, 1.0, 9.0])
        for process in world.processes:
            process.wakes_at = dice.choice([0.0, 0.0, 5.0])
        until_fault = self._turns_until_fault()
        while ready := world.ready():
            process = ready[int(throw() * len(ready))]
            if world.turns >= until_fault and self._faults_left:
                self._faults_left -= 1
                until_fault = world.turns + self._turns_until_fault()
                if self._disturb(world, process):
                    continue
            world.turn(process)

    def _turns_until_fault(self) -> float:
        return self._dice.expovariate(self._rate)

    def _disturb(self, world: World, process: Process) -> bool:
        """Whether the process stands still now."""
        fault = self._dice.choice(self._faults)
        if fault == "kill":
            process.killed = True
        elif fault == "stop":
            process.told_to_stop = "it was told to"
        elif fault == "zombie":
            process.wakes_at = world.now + self._dice.choice([10.0, 45.0, 150.0])
            return True
        elif fault == "join":
            world.spawn()
        else:
            process.fault = fault
        return False


@dataclass(frozen=True, slots=True)
class PairSchedule:
    """Two workers: the first has ``first`` turns, then the second ``second``, then something happens to ``victim``,
    then they take turns.
    """

    first: int
    second: int
    fault: Fault
    victim: int

    def play(self, world: World) -> None:
        a, b = world.processes
        self._go(world, a, self.first)
        self._go(world, b, self.second)
        victim = world.processes[self.victim]
        if not victim.ended:
            self._hurt(world, victim)
        while ready := world.ready():
            # Who had the fewest turns goes first: everybody gets on.
            world.turn(min(ready, key=lambda process: (process.turns, process.name)))

    def _hurt(self, world: World, victim: Process) -> None:
        if self.fault == "zombie":
            victim.wakes_at = world.now + 150.0
        elif self.fault == "stop":
            victim.told_to_stop = "it was told to"
        else:
            victim.killed = True
        if self.fault == "restart":
            # Killed and started again at once, before anybody could notice.
            world.turn(victim)

    @staticmethod
    def _go(world: World, process: Process, turns: int) -> None:
        for _ in range(turns):
            if process.ended:
                return
            world.now = max(world.now, process.wakes_at)
            world.turn(process)


def pair_schedules(*, stride: int = 1, most: int = 70) -> Iterator[PairSchedule]:
    """Every pair of context switches within the first ``most`` turns of each, with every fault of either worker;
    ``stride`` takes each so-many-th of them.
    """
    faults: tuple[Fault, ...] = ("kill", "restart", "zombie", "stop")
    everything = (
        PairSchedule(first, second, fault, victim)
        for first in range(most)
        for second in range(most)
        for fault in faults
        for victim in (0, 1)
    )
    for number, schedule in enumerate(everything):
        if number % stride == 0:
            yield schedule
