"""Processes that are killed, stopped and told to end at random moments, until their lineage is final all the same."""

import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from .trainings import Training, WorkerProcess

MOST_WORKERS = 6
MINIMUM_SECONDS = 2.0
# Without a closed round for so long nobody believes that there will be an end, however busy the machine is.
SILENCE_SECONDS = 240.0


@dataclass(kw_only=True)
class Chaos:
    """Throws faults at a training; ``done`` counts them by kind."""

    training: Training
    rng: random.Random
    faults_left: int
    done: Counter[str] = field(default_factory=Counter)
    _wakes: dict[WorkerProcess, float] = field(default_factory=dict)

    def run(self) -> None:
        """Until every process ended, the last ones well. Whoever fails is started again, as ``@retry`` does."""
        heard, deadline = 0, time.monotonic() + SILENCE_SECONDS
        running = self.training.start(self.rng.randint(1, MOST_WORKERS), minimum=MINIMUM_SECONDS)
        while running:
            rounds = sum(worker.events.count("RoundClosed") for worker in self.training.workers)
            if rounds > heard:
                heard, deadline = rounds, time.monotonic() + SILENCE_SECONDS
            assert time.monotonic() < deadline, (
                f"no end in sight after {dict(self.done)}; {self._last_words()}"
            )
            time.sleep(self.rng.uniform(0.05, 0.3))
            self._wake()
            running = [self._followed(worker) for worker in running if worker.process.exitcode != 0]
            awake = [worker for worker in running if worker not in self._wakes and worker.events]
            if awake and self.faults_left:
                self.faults_left -= 1
                self._hurt(self.rng.choice(awake))

    def _last_words(self) -> str:
        ended = [worker for worker in self.training.workers if worker.has_ended]
        return f"the last that ended said {ended[-1].last_words!r}" if ended else "none ended"

    def _followed(self, worker: WorkerProcess) -> WorkerProcess:
        if not worker.has_ended:
            return worker
        self._wakes.pop(worker, None)
        return self.training.start(1, minimum=MINIMUM_SECONDS)[0]

    def _hurt(self, worker: WorkerProcess) -> None:
        kind = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
        self.done[kind.name] += 1
        worker.send(kind)
        if kind is signal.SIGSTOP:
            self._wakes[worker] = time.monotonic() + self.rng.uniform(0.3, 2.5 * MINIMUM_SECONDS)

    def _wake(self) -> None:
        for worker, moment in list(self._wakes.items()):
            if time.monotonic() >= moment:
                del self._wakes[worker]
                worker.send(signal.SIGCONT)
