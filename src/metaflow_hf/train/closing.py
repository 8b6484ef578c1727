"""Waiting for a round to end, and ending it: by the first in rank at once, by others if that one does not."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from metaflow_hf.errors import TrainingIncomplete
from metaflow_hf.train.heartbeat import Watch
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.merge import Merger
from metaflow_hf.train.records import Payload

logger = logging.getLogger("metaflow_hf.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a worker divides its time, in seconds.

    ``grace`` is how long a claim in hand may go on after a request to stop; pauses between two looks at the store
    while waiting grow from ``first_pause`` to ``longest_pause``; ``merge_turn`` is how long the next in rank waits for a
    merge at least.
    """

    grace: float = 10.0
    first_pause: float = 0.01
    longest_pause: float = 1.0
    merge_turn: float = 2.0


class StopRequested(TrainingIncomplete):
    """The worker was asked to stop before the lineage was final."""


@dataclass(kw_only=True)
class Closer:
    """Waits for the others of a round, and merges when it is this worker's turn."""

    lineage: Lineage
    merger: Merger
    watch: Watch
    attempt: str
    pace: Pace = field(default_factory=Pace)
    stop: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    waited_seconds: float = 0.0
    merge_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._idle_round = -1
        self._idle_pause = self.pauses()

    def await_close(
        self, base: ClosedRound, *, store_inner: Callable[[], Payload] | None, nothing_left: bool
    ) -> ClosedRound | None:
        """The round after ``base``, closed by this worker or another one; ``None`` if nobody has begun it.

        ``store_inner`` stores this worker's optimiser state when it is the one that merges; ``nothing_left`` says that
        no position is free, so that a round without claims is to be closed too. Raises ``StopRequested``.
        """
        pause = self.pauses()
        ready_since: float | None = None
        while True:
            closed = self.lineage.round(base.number + 1)
            if closed is not None:
                return closed
            self.raise_if_stopped()
            claims = self.lineage.claims(base.number)
            published = self.lineage.published(base.number)
            if not claims and not published and not nothing_left:
                self._idle(base)
                return None
            if self._is_awaited(base, claims.values(), published):
                ready_since = None
            else:
                ready_since = self.clock() if ready_since is None else ready_since
                # Who has published and left will not merge.
                present = [a for a in published if a == self.attempt or not self.watch.expired(a)]
                turn = rank(self.attempt, base.number, present)
                patience = turn * max(self.pace.merge_turn, 1.5 * self.merge_seconds)
                if self.clock() - ready_since >= patience:
                    return self._close(base, claims, store_inner)
            pause()

    def is_alive(self, attempt: str, base: ClosedRound) -> bool:
        """Whether a claimant was seen to make progress; waits until that is known.

        False once it has published, was given up, or the round is closed. Raises ``StopRequested``.
        """
        pause = self.pauses()
        while not self.watch.moves(attempt):
            if attempt in self.lineage.published(base.number) or self.lineage.round(base.number + 1):
                return False
            if self.watch.expired(attempt, factor=_patience_factor(base)):
                return False
            self.raise_if_stopped()
            pause()
        return True

    def raise_if_stopped(self) -> None:
        """Raises ``StopRequested`` when this worker was asked to stop."""
        reason = self.stop()
        if reason is not None:
            raise StopRequested(
                f"stopped before the lineage was final: {reason}. What was finished is published; run again to go on."
            )

    def pauses(self) -> Callable[[], None]:
        """Pauses that begin short and grow, so that quick rounds are quick and long waits are cheap."""
        length = self.pace.first_pause

        def pause() -> None:
            nonlocal length
            began = self.clock()
            self.sleep(length)
            self.waited_seconds += self.clock() - began
            length = min(length * 1.2, self.pace.longest_pause)

        return pause

    def _idle(self, base: ClosedRound) -> None:
        """A pause while nobody has begun the round; longer each time, for this may last until somebody is given up."""
        if self._idle_round != base.number:
            self._idle_round, self._idle_pause = base.number, self.pauses()
        self._idle_pause()

    def _is_awaited(self, base: ClosedRound, claimants: Iterable[str], published: Sequence[str]) -> bool:
        factor = _patience_factor(base)
        unpublished = {*claimants} - {*published, self.attempt}
        return any(not self.watch.expired(attempt, factor=factor) for attempt in sorted(unpublished))

    def _close(
        self, base: ClosedRound, claims: dict[int, str], store_inner: Callable[[], Payload] | None
    ) -> ClosedRound:
        began = self.clock()
        inner = store_inner() if store_inner is not None else None
        closed = self.merger.close(base, claims, inner=inner)
        self.merge_seconds = self.clock() - began
        return closed


def rank(attempt: str, number: int, published: Sequence[str]) -> int:
    """The turn of ``attempt`` in merging round ``number``: a shuffle of who published, then everybody else."""
    order = sorted(published, key=lambda a: hashlib.sha256(f"{a}/{number}".encode()).digest())
    return order.index(attempt) if attempt in order else len(order)


def _patience_factor(base: ClosedRound) -> float:
    # Rounds that stay empty although workers live mean that everybody is given up too early.
    return float(2 ** min(base.manifest.empty_rounds // 2, 6))
