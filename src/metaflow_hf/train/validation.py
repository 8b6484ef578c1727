"""Held-out text while training runs: measured after every so many rounds, by whoever closed the round.

What was found is one small object, ``evaluations/<round>.json``. Early stopping reads these objects when a round is
closed, so the decision is part of the round's manifest like everything else that all workers go by. The weights of
the best round stay in the store until the run is over.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metaflow_hf.config import EarlyStopConfig, EvaluationConfig
from metaflow_hf.events import Evaluated, OnEvent, Sampled, ignore
from metaflow_hf.train.evaluation import Evaluation
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.records import Validation

logger = logging.getLogger("metaflow_hf.train")

NAME = "held_out"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one look at a model found: its figures and, for each prompt, what it writes."""

    evaluation: Evaluation
    samples: tuple[tuple[str, str], ...] = ()
    counted: str = ""


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Measures the weights of rounds for a lineage; ``measure`` looks at the model as the trainer holds it."""

    lineage: Lineage
    attempt: str
    settings: EvaluationConfig
    measure: Callable[[], Measured]
    on_event: OnEvent = ignore
    wall_clock: Callable[[], float] = time.time

    def is_due(self, closed: ClosedRound) -> bool:
        """Whether this worker is to measure a round: it closed it, and it is one of those to be measured."""
        manifest = closed.manifest
        return manifest.closer == self.attempt and (self._is_measured(closed.number) or manifest.final)

    def examine(self, closed: ClosedRound) -> None:
        """Measures the trainer's weights, which are those of ``closed``, and records it."""
        found, manifest = self.measure(), closed.manifest
        figures = found.evaluation
        record = Validation(
            round=closed.number,
            attempt=self.attempt,
            weights=manifest.weights,
            tokens_total=manifest.tokens,
            loss=_finite(figures.loss),
            bits_per_byte=_finite(figures.bits_per_byte),
            tokens=figures.tokens,
            bytes=figures.bytes,
        )
        self.lineage.create_validation(record)
        now = self.wall_clock()
        self.on_event(
            Evaluated(
                time=now,
                worker=self.attempt,
                name=NAME,
                loss=figures.loss,
                perplexity=figures.perplexity,
                bits_per_byte=figures.bits_per_byte,
                tokens=figures.tokens,
                bytes=figures.bytes,
                counted=found.counted,
                round=closed.number,
                tokens_total=manifest.tokens,
            )
        )
        for prompt, text in found.samples:
            self.on_event(
                Sampled(
                    time=now, worker=self.attempt, name=NAME, prompt=prompt, text=text, round=closed.number
                )
            )

    def kept(self, newest: ClosedRound) -> set[str]:
        """Keys of weights that a sweep leaves: the best round's, and those that somebody may be measuring now."""
        every = self.settings.every_rounds
        known = self.lineage.validations()
        best = best_of(known)
        keys = set() if best is None else {best.weights.key}
        if every is None:
            return keys
        last_due = newest.number // every * every
        measured = {item.round for item in known}
        for number in (last_due, last_due - every):
            if 0 < number <= newest.number - 2 and number not in measured:
                closed = self.lineage.round(number)
                keys |= set() if closed is None else {closed.manifest.weights.key}
        return keys

    def enough(self) -> str:
        """Why training is to stop with the round that is being closed; "" while it is to go on."""
        settings = self.settings.early_stop
        return "" if settings is None else stop_reason(self.lineage.validations(), settings)

    def _is_measured(self, number: int) -> bool:
        every = self.settings.every_rounds
        return every is not None and number > 0 and number % every == 0


def ranked(validations: Sequence[Validation]) -> list[tuple[float, Validation]]:
    """Those whose held-out loss is finite beside that loss: lowest first, the earliest of equals."""
    measured = [(item.loss, item) for item in validations if item.loss is not None]
    return sorted(measured, key=lambda pair: (pair[0], pair[1].round))


def best_of(validations: Sequence[Validation]) -> Validation | None:
    """The one with the lowest held-out loss, the earliest of equals; ``None`` of nothing finite."""
    return next((item for _, item in ranked(validations)), None)


def stop_reason(validations: Sequence[Validation], settings: EarlyStopConfig) -> str:
    """Why to stop: the last ``patience`` measurements, in the order of rounds, are none better by more than
    ``min_improvement`` than the best before them; else "".
    """
    ordered = sorted(validations, key=lambda item: item.round)
    before, last = ordered[: -settings.patience], ordered[-settings.patience :]
    best = next(iter(ranked(before)), None)
    if best is None or any(loss < best[0] - settings.min_improvement for loss, _ in ranked(last)):
        return ""
    return (
        f"the held-out loss {best[0]:.4f} of round {best[1].round} was not improved in {settings.patience} measurements "
        "(evaluation.early_stop)"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
