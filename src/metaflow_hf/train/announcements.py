"""The events of one worker, made from what it has at hand."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from metaflow_hf.events import (
    ClaimDone,
    DeltaPublished,
    Event,
    Notice,
    OnEvent,
    RoundClosed,
    StepDone,
    WorkLost,
    ignore,
)
from metaflow_hf.train.contribution import Published, Work
from metaflow_hf.train.lineage import ClosedRound
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.schedule import Budget
from metaflow_hf.train.trainer import Step


@dataclass(kw_only=True)
class Announcer:
    """Tells whoever listens what the worker ``attempt`` does; what is done for a round carries the number it closes with."""

    attempt: str
    budget: Budget
    on_event: OnEvent = ignore
    wall_clock: Callable[[], float] = time.time
    steps: int = 0

    def step(
        self, base: ClosedRound, step: Step, *, positions: float, tokens: int, seconds: float, memory: int
    ) -> None:
        """One optimiser step; ``positions`` and ``tokens`` are committed ones plus this worker's own since."""
        self.steps += 1
        self._tell(
            StepDone,
            round=base.number + 1,
            step=self.steps,
            loss=step.loss,
            learning_rate=step.learning_rate,
            tokens=step.tokens,
            seconds=seconds,
            tokens_total=tokens,
            tokens_planned=self.budget.planned_tokens(positions, tokens),
            memory_bytes=memory,
        )

    def claim(self, base: ClosedRound, position: int, done: Work) -> None:
        """One finished claim."""
        self._tell(ClaimDone, round=base.number + 1, position=position, tokens=done.tokens, loss=done.loss)

    def published(self, base: ClosedRound, work: Work, positions: int, what: Published) -> None:
        """A contribution is stored."""
        payloads = (what.tensors, what.inner)
        self._tell(
            DeltaPublished,
            round=base.number + 1,
            positions=positions,
            tokens=work.tokens,
            bytes=sum(payload.size for payload in payloads if payload is not None),
            seconds=what.seconds,
        )

    def closed(self, base: ClosedRound, closed: ClosedRound, *, seconds: float, waited: float) -> None:
        """The round after ``base`` is closed, whoever did it."""
        manifest = closed.manifest
        tokens = sum(item.tokens for item in manifest.accepted)
        loss = sum(item.loss * item.tokens for item in manifest.accepted) / tokens if tokens else None
        self._tell(
            RoundClosed,
            round=closed.number,
            contributors=len(manifest.accepted),
            tokens=tokens,
            tokens_total=manifest.tokens,
            positions_done=len(Positions.from_ranges(manifest.done)),
            positions_total=self.budget.num_positions,
            loss=loss,
            seconds=seconds,
            waited_seconds=waited,
            final=manifest.final,
            positions_lost=manifest.lost_since(base.manifest),
            stopped=manifest.stopped,
        )
        for attempt, reason in manifest.rejected.items():
            self.notice(f"round {closed.number}: the work of {attempt} is not used: {reason}")
        if manifest.empty_rounds >= 2:
            self.notice(
                f"{manifest.empty_rounds} rounds in a row committed nothing: workers die, or are slower than others "
                "wait for; everybody now waits longer."
            )

    def lost(self, base: ClosedRound, work: Work, reason: str) -> None:
        """Work of this worker is in no model; others train it again."""
        if work.claims:
            self._tell(WorkLost, round=base.number + 1, positions=len(work.claims), reason=reason)

    def notice(self, message: str) -> None:
        """A sentence for people."""
        self._tell(Notice, message=message)

    def _tell(self, kind: type[Event], **facts: object) -> None:
        self.on_event(kind(time=self.wall_clock(), worker=self.attempt, **facts))
