"""What a worker does with a claim: rows -> documents -> batches -> optimiser steps.

Training a claim is a function of weights, optimiser state, position and learning rates alone: dropout is seeded
by the run's seed and the position, so it does not matter which worker trains it, or after which restart.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.batches import Batch
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import Order
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.errors import NonFiniteLoss
from metaflow_hf.store.objects import Digest
from metaflow_hf.train.engine import Engine
from metaflow_hf.train.feed import Feed, RowReader
from metaflow_hf.train.isolation import require_isolation
from metaflow_hf.train.models import known_positions, known_tokens
from metaflow_hf.train.nonfinite import MOST_IN_A_ROW, BadStep
from metaflow_hf.train.records import Encoding
from metaflow_hf.train.sides import NOTHING_HELD_OUT, HeldOut
from metaflow_hf.train.team import Team

logger = logging.getLogger("metaflow_hf.train")

LearningRate = Callable[[float, int], float]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: mean loss in nats per counted token, tokens, and the part of the claim it ends at."""

    loss: float
    tokens: int
    learning_rate: float
    part: float


class Trainer(Protocol):
    """What the loop of a worker needs of whatever is trained."""

    def load(self, weights: Path, inner: Path | None) -> None:
        """Continues from a round's weights, and from a stored optimiser state where one is given."""
        ...

    def train(self, claim: Claim, learning_rate: LearningRate) -> Iterator[Step]:
        """Trains one claim, step by step; ``learning_rate(part, tokens)`` gives that of the next step."""
        ...

    def keep(self) -> None:
        """Remembers the weights of this moment as those to write: all claims up to now are finished."""
        ...

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        """Writes the kept weights as a contribution against ``base``."""
        ...

    def write_inner(self, path: Path) -> Digest:
        """Writes the optimiser's state of this moment."""
        ...

    def memory_bytes(self) -> int:
        """The most memory used so far: the GPU's, else the process's."""
        ...


class ModelTrainer:
    """The ``Trainer`` of a causal language model with AdamW.

    ``foresee`` names the claim that will probably come next: its rows are read and tokenized in a thread while the
    one in hand is trained. A wrong guess costs that work and changes nothing else. ``save_bad`` keeps a step that is
    not finite and says where, before training stops or goes on without it. ``close`` ends the thread.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: ExampleEncoder,
        rows: RowReader,
        order: Order,
        config: TrainConfig,
        *,
        device: torch.device,
        held_out: HeldOut = NOTHING_HELD_OUT,
        progress: Callable[[], None] = lambda: None,
        save_bad: Callable[[BadStep], str] = lambda _: "",
        team: Team | None = None,
    ) -> None:
        if config.data.packing == "isolated":
            require_isolation(model)
        self._feed = Feed(
            rows,
            order,
            encoder,
            config,
            max_positions=known_positions(model),
            max_tokens=known_tokens(model),
            held_out=held_out,
        )
        self.foresee: Callable[[], Claim | None] = lambda: None
        self._team = team
        self._save_bad = save_bad
        self._config = config
        self._settings = config.optimizer
        self._device = device
        with team.together() if team else nullcontext():
            self._engine = Engine(
                model, config, device, replicas=team.replicas if team else None, progress=progress
            )
        self._bad_in_a_row = 0

    def load(self, weights: Path, inner: Path | None) -> None:
        self._all("load", weights, inner)

    def train(self, claim: Claim, learning_rate: LearningRate) -> Iterator[Step]:
        steps = _grouped(self._feed.take(claim), self._settings.gradient_accumulation_steps)
        if (following := self.foresee()) is not None:
            self._feed.prepare(following)
        tokens = 0
        seed_devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=seed_devices):
            self._all("seed", _seed(self._config.data.seed, claim.position))
            for number, batches in enumerate(steps):
                rate = learning_rate(number / len(steps), tokens)
                loss, norm = self._step(batches, rate)
                if not self._is_finite(loss, norm):
                    self._refuse(BadStep.of(claim, number + 1, loss, norm, rate, _sequences(batches)))
                    continue
                counted = sum(batch.num_tokens for batch in batches)
                tokens += counted
                yield Step(loss, counted, rate, (number + 1) / len(steps))

    def batches(self, claim: Claim) -> list[Batch]:
        """The batches of a claim: a function of its rows, the tokenizer and the configuration."""
        return self._feed.batches(claim)

    def close(self) -> None:
        """Ends the thread that works ahead; idempotent."""
        self._feed.close()

    def keep(self) -> None:
        self._all("keep")

    def write(self, path: Path, base: Path, encoding: Encoding) -> Digest:
        return self._engine.write(path, base, encoding)

    def write_inner(self, path: Path) -> Digest:
        digest: Digest = self._all("write_inner", path)
        return digest

    def memory_bytes(self) -> int:
        return self._engine.memory_bytes()

    def _step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        loss, norm = self._all("step", batches, learning_rate)
        return loss, norm

    def _all(self, method: str, *arguments: Any) -> Any:
        """The same call of the engine in every process of this worker."""
        with self._team.together(method, *arguments) if self._team else nullcontext():
            return getattr(self._engine, method)(*arguments)

    def _is_finite(self, loss: float, norm: float) -> bool:
        if math.isfinite(loss) and math.isfinite(norm):
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        return False

    def _refuse(self, bad: BadStep) -> None:
        """Stops, or goes on without the step where that is configured."""
        place = self._save_bad(bad)
        kept = f" Its tokens are kept in {place}." if place else ""
        if self._settings.on_non_finite == "skip" and self._bad_in_a_row <= MOST_IN_A_ROW:
            logger.warning(
                f"{bad.sentence()}: training goes on without it (optimizer.on_non_finite: skip).{kept}"
            )
            return
        many = f", the {self._bad_in_a_row}th in a row" if self._bad_in_a_row > 1 else ""
        raise NonFiniteLoss(
            f"{bad.sentence()}{many}: lower optimizer.learning_rate or optimizer.max_grad_norm, look at these rows, or "
            f"set optimizer.on_non_finite: skip.{kept}"
        )


def _grouped(batches: Sequence[Batch], size: int) -> list[list[Batch]]:
    """The batches of each step, without those in which nothing is learned."""
    learned = [batch for batch in batches if batch.num_tokens]
    return [learned[start : start + size] for start in range(0, len(learned), size)]


def _sequences(batches: Sequence[Batch]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def _seed(seed: int, position: int) -> int:
    # Any two runs with seeds below 2**31 draw differently at every position.
    return (seed << 32) + position
