"""Hours of what the test suite does for minutes: random schedules in the simulation, then kills of real processes, then
trainings on schedulers whose containers are hurt.

    make soak                                     100,000 schedules, every pair of context switches, 1,000 faults,
                                                  10 trainings on each scheduler
    python -m soak --schedules 0 --faults 50 --seed 7 --s3      (in tests/)

Ends with the first run that breaks an invariant, and says how to repeat it.
"""

import argparse
import logging
import os
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from s3_server import running_s3_server
from simulation.schedules import in_a_world, pair_schedules, play_random
from simulation.world import Scenario

from . import deployments
from .chaos import Chaos
from .contents import Bucket, Directory
from .recompute import RecomputingAuditor
from .trainings import NUM_POSITIONS, Training

PART = 1_000
FAULTS_PER_TRAINING = 25


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=100_000, help="random schedules of the simulation")
    parser.add_argument(
        "--pairs", type=int, default=1, metavar="N", help="each N-th pair of switches; 0: none"
    )
    parser.add_argument("--faults", type=int, default=1_000, help="signals sent to real processes")
    parser.add_argument("--deployments", type=int, default=10, help="trainings on each scheduler")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument(
        "--s3", action="store_true", help="real processes on S3 only; else in turns with a disk"
    )
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with ProcessPoolExecutor(initializer=_quiet) as pool:
        starts = range(0, arguments.schedules, PART)
        for number, turns in enumerate(pool.map(_random_part, starts), 1):
            print(f"{number * PART:,} random schedules, {turns:,} turns in the last {PART:,}", flush=True)
        if arguments.pairs:
            played = sum(pool.map(_pairs_part, [(arguments.pairs, part) for part in range(16)]))
            print(f"{played:,} pairs of context switches")
    _real_processes(arguments)
    for number in range(arguments.deployments):
        seed = arguments.seed + number
        try:
            done = deployments.soak(seed)
        except BaseException as error:
            raise AssertionError(f"deployments with seed {seed}: {error}") from error
        print(f"trainings on both schedulers, seed {seed}: {dict(done)}", flush=True)


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def _random_part(first: int) -> int:
    turns = 0
    for seed in range(first, first + PART):
        try:
            turns += play_random(seed).turns
        except BaseException as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    return turns


def _pairs_part(which: tuple[int, int]) -> int:
    stride, part = which
    played = 0
    for number, schedule in enumerate(pair_schedules(stride=stride)):
        if number % 16 != part:
            continue
        played += 1
        try:
            in_a_world(Scenario(num_positions=3, workers=2), 0, schedule.play)
        except BaseException as error:
            raise AssertionError(f"{schedule}: {error}") from error
    return played


def _real_processes(arguments: argparse.Namespace) -> None:
    left, number, total = arguments.faults, 0, Counter[str]()
    began = time.monotonic()
    while left > 0:
        seed = arguments.seed + number
        faults = min(left, FAULTS_PER_TRAINING)
        done = _one_training(seed, faults, on_s3=arguments.s3 or number % 2 == 1)
        left -= sum(done.values())
        total += done
        number += 1
        print(f"{number} trainings, {dict(total)}, seed {seed}, {time.monotonic() - began:.0f} s", flush=True)


def _one_training(seed: int, faults: int, *, on_s3: bool) -> Counter[str]:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        training = Training(root=root, store=str(root / "store"))
        contents = Directory(root / "store")
        if on_s3:
            server = stack.enter_context(running_s3_server())
            os.environ.update(server.environment)
            _use(server.url)
            training = Training(root=root, store=server.new_bucket(), environment=server.environment)
            contents = Bucket(training.store, server.url)
        stack.callback(training.kill_all)
        training.prepare()
        chaos = Chaos(training=training, rng=random.Random(seed), faults_left=faults)
        try:
            chaos.run()
            auditor = RecomputingAuditor(NUM_POSITIONS)
            auditor.look(contents)
            assert auditor.newest["final"]
        except BaseException as error:
            raise AssertionError(f"training with seed {seed}, s3: {on_s3}: {error}") from error
    return chaos.done


def _use(endpoint: str) -> None:
    from metaflow import metaflow_config

    # Metaflow reads its settings once, at import; each training has a server of its own.
    metaflow_config.S3_ENDPOINT_URL = endpoint
    metaflow_config.DATATOOLS_CLIENT_PARAMS["endpoint_url"] = endpoint


if __name__ == "__main__":
    main()
