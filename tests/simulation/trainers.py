"""A trainer whose weights count how often each position was trained: a merged model is a vector of ones."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from metaflow_hf.data.ledger import Claim
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.delta import delta_layouts, encode_delta
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.tensors import TensorReader, write_all, write_tensors
from metaflow_hf.train.trainer import Step

from .processes import Process

if TYPE_CHECKING:
    from .world import World

TOKENS = 10
STEPS = 2


class PoisonedRow(RuntimeError):
    """A row at which training fails, whoever tries."""


class Counter:
    """The ``Trainer`` of a simulated process; ``momentum`` stands for the optimiser's state."""

    def __init__(self, world: "World", process: Process) -> None:
        self._world = world
        self._process = process
        self.counts = [0.0] * world.num_positions
        self._kept = self.counts.copy()

    def load(self, weights: Path, inner: Path | None) -> None:
        with TensorReader(weights) as reader:
            self.counts = reader["counts"].tolist()

    def train(self, claim: Claim, learning_rate: Callable[[float, int], float]) -> Iterator[Step]:
        self._world.training_begins(claim)
        if claim.position in self._world.scenario.poison:
            raise PoisonedRow(f"position {claim.position}")
        self.counts[claim.position] += 1
        for number in range(1, STEPS + 1):
            self._world.pause(self._process, self._world.step_seconds(self._process))
            part = number / STEPS
            yield Step(loss=1.0, tokens=TOKENS // STEPS, learning_rate=learning_rate(part, 0), part=part)

    def keep(self) -> None:
        self._kept = self.counts.copy()

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        with TensorReader(base) as reader:
            kept = torch.tensor(self._kept)
            layouts = delta_layouts({"counts": tuple(kept.shape)}, encoding)
            return write_tensors(path, layouts, encode_delta({"counts": kept}, reader, encoding))

    def write_inner(self, path: Path) -> Digest:
        return write_all(path, {"steps": torch.tensor(self.counts)})

    def memory_bytes(self) -> int:
        return 0
