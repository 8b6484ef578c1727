"""The real worker's code under any order of events, on a virtual clock: see ``simulation``."""

import collections

import pytest
import torch
from simulation.schedules import in_a_world, pair_schedules, play_random
from simulation.world import Scenario

RANDOM_SCHEDULES = 20_000
PARTS = 20
# Has no divisor in common with the numbers of turns, faults and victims: of each something is played.
PAIR_STRIDE = 23


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    # Hundreds of thousands of expected warnings.
    caplog.set_level("CRITICAL", logger="metaflow_hf")


@pytest.mark.parametrize("part", range(PARTS))
def test_any_schedule_ends_with_every_position_in_the_model_exactly_once(part):
    for seed in range(part, RANDOM_SCHEDULES, PARTS):
        try:
            play_random(seed)
        except BaseException as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


@pytest.mark.parametrize("part", range(4))
def test_two_workers_switched_anywhere_and_hurt_anywhere(part):
    scenario = Scenario(num_positions=3, workers=2)
    for number, schedule in enumerate(pair_schedules(stride=PAIR_STRIDE)):
        if number % 4 != part:
            continue
        try:
            in_a_world(scenario, 0, schedule.play)
        except BaseException as error:
            raise AssertionError(f"{schedule}: {error}") from error


def test_the_same_seed_is_the_same_schedule():
    first, second = play_random(7), play_random(7)
    assert first.objects == second.objects
    assert (first.turns, first.now) == (second.turns, second.now)


def test_the_schedules_do_contain_faults():
    worlds = [play_random(seed) for seed in range(200)]
    outcomes = collections.Counter(
        type(process.outcome).__name__ for world in worlds for process in world.processes
    )
    assert {"Killed", "StoreUnavailable", "StopRequested", "NoneType"} <= outcomes.keys()
    assert min(outcomes[name] for name in ("Killed", "StoreUnavailable", "StopRequested")) > 20
    manifests = [manifest for world in worlds for manifest in world.auditor.manifests]
    assert max(len(manifest["accepted"]) for manifest in manifests) >= 5
    assert any(manifest["empty_rounds"] for manifest in manifests)
    assert any(manifest["failures"] for manifest in manifests)
    assert max(world.scenario.workers for world in worlds) == 8
    assert any(world.now > 150 for world in worlds)


def test_waiting_until_a_lone_worker_is_given_up_asks_the_store_less_and_less():
    def play(world):
        first, second = world.processes
        while world.auditor.newest["round"] < 1:
            world.now = max(world.now, first.wakes_at)
            world.turn(first)
        first.killed = True
        world.turn(first)
        while world.auditor.newest["round"] < 2:
            world.now = max(world.now, second.wakes_at)
            world.turn(second)
        assert world.now > 40
        assert second.turns < 150

    in_a_world(Scenario(workers=2, solo_start=0.9, num_positions=20, round_seconds=2.0), 0, play_after(play))


def play_after(play):
    """The given schedule, then whoever is left takes turns to the end."""

    def whole(world):
        play(world)
        while ready := world.ready():
            world.turn(ready[0])

    return whole
