"""One worker: the loop of rounds, as the table in ``lineage`` needs it.

    (1) read the newest round; a final one ends the work
    (2) claim positions and train them, until there is enough or somebody has published
    (3) publish: the only claimant of a round its weights, otherwise everybody a delta
    (4) wait until all who claimed have published or are given up, then merge; the first to create wins
    (5) sweep what is two rounds old
    (6) every few rounds, whoever closed one measures its weights on held-out text; the others go on

Nothing but ``create`` is trusted: heartbeats, ranks, shares and time boxes decide only how much work is lost or
waited for. Clock, sleep, randomness, store and trainer are passed in, so that a scheduler can drive this very
code through any order of events.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.tracker import ChunkTracker
from metaflow_hf.errors import ClaimLost, NotFound, StoreError, TrainingIncomplete
from metaflow_hf.train.announcements import Announcer
from metaflow_hf.train.closing import Closer, StopRequested
from metaflow_hf.train.contribution import Publisher, Work
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.heartbeat import Heartbeat, Watch
from metaflow_hf.train.ledger import RoundsLedger
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.records import Payload
from metaflow_hf.train.schedule import Budget, Schedule
from metaflow_hf.train.stopping import GraceOver
from metaflow_hf.train.trainer import Trainer
from metaflow_hf.train.validation import Validator

logger = logging.getLogger("metaflow_hf.train")

ROUNDS_PER_INNER: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the workers of a lineage go by: ``workers`` are expected in the first round, and up to the fraction
    ``solo_start`` of the run one trains alone. Positions that failed ``max_failures`` times end the run, unless
    ``skip_failing``; ``keep_all`` sweeps nothing; ``describe`` says for people where a position lies.
    """

    budget: Budget
    schedule: Schedule
    workers: int = 1
    solo_start: float = 0.0
    max_failures: int = 5
    skip_failing: bool = False
    keep_all: bool = False
    describe: Callable[[int], str] = str


@dataclass(kw_only=True)
class Worker:
    """Everything one worker needs; ``run`` returns when the newest round is final and raises otherwise."""

    plan: Plan
    lineage: Lineage
    ledger: RoundsLedger
    tracker: ChunkTracker
    trainer: Trainer
    files: PayloadFiles
    publisher: Publisher
    closer: Closer
    heartbeat: Heartbeat
    watch: Watch
    announcer: Announcer
    validator: Validator | None = None
    stop: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.attempt = self.ledger.attempt
        # The digest of the weights at which the trainer stands, if it stands at any round's.
        self._holds: str | None = None
        self._has_trained = False
        self._lost_work = False
        self._work = Work()

    def run(self) -> None:
        """Works until the lineage is final.

        Raises ``TrainingIncomplete`` when it was asked to stop or a position fails again and again, and whatever the
        training raised; what was finished before is published.
        """
        self.heartbeat.begin()
        try:
            base = self.lineage.newest()
            if base is None:
                raise TrainingIncomplete(
                    f"the lineage at {self.lineage.store.uri} has no round yet: start it first."
                )
            while not base.manifest.final:
                self._refuse_hopeless(base)
                base = self._one_round_or_newer(base)
        except StopRequested:
            raise
        except Exception:
            self._give_up()
            raise
        finally:
            self.heartbeat.leave()

    def _one_round_or_newer(self, base: ClosedRound) -> ClosedRound:
        try:
            return self._one_round(base)
        except NotFound as error:
            # Files of a round are swept when the lineage is two rounds ahead: this worker stood still meanwhile.
            newest = self.lineage.newest(after=base.number)
            if newest is None:
                raise
            self._lose(base, f"the lineage went on without this worker: {error}")
            return newest

    def _one_round(self, base: ClosedRound) -> ClosedRound:
        began, self.closer.waited_seconds = self.clock(), 0.0
        self._work = Work()
        if self._may_claim(base):
            try:
                self._train(base)
            except ClaimLost as lost:
                self._lose(base, str(lost))
            else:
                self._publish(base)
        self.closer.raise_if_stopped()
        closed = self.closer.await_close(
            base, store_inner=self._inner_to_store(base), nothing_left=not self.ledger.free()
        )
        if closed is None:
            return self.lineage.newest(after=base.number) or base
        self._follow(closed)
        self.announcer.closed(base, closed, seconds=self.clock() - began, waited=self.closer.waited_seconds)
        self._validate(closed)
        return closed

    # ---- (2) claim and train

    def _may_claim(self, base: ClosedRound) -> bool:
        """Enters the round; whether to claim in it, which may take a look at how others are doing."""
        last = [item.attempt for item in base.manifest.accepted]
        contributors = max(self.plan.workers if base.number == 0 else len(last), 1)
        settled, tokens = len(base.manifest.settled), base.manifest.tokens
        solo = self.plan.budget.fraction(settled, tokens) < self.plan.solo_start
        self.ledger.enter(
            base,
            contributors=1 if solo else contributors,
            goal=self.plan.solo_start if solo else 1.0,
            alone=solo,
        )
        if self.attempt in last or (contributors > 1 and not solo):
            return True
        others = {a for a in self.lineage.claims(base.number).values() if a != self.attempt}
        if solo:
            return not others and all(self.watch.expired(attempt) for attempt in last)
        # After a round of one worker only its continuation is exact: if the claimant is dead, the round is closed
        # empty and begun anew, otherwise this process joins.
        return all(self.closer.is_alive(attempt, base) for attempt in sorted(others))

    def _train(self, base: ClosedRound) -> None:
        while self.stop() is None and (claim := self.tracker.claim_chunk()) is not None:
            if not self._work.claims:
                self._load(base)
            self._train_claim(base, claim)

    def _load(self, base: ClosedRound) -> None:
        """Makes the trainer continue from ``base``; nothing to do when it stands there already."""
        manifest = base.manifest
        if self._holds == manifest.weights.digest:
            return
        # Moments of one's own are kept from round to round, unless they include work that is lost.
        wanted = manifest.inner if not self._has_trained or self._lost_work else None
        self.heartbeat.expect(num_bytes=manifest.weights.size + (wanted.size if wanted else 0))
        inner = self.files.fetch(wanted) if wanted else None
        self.trainer.load(self.files.fetch(manifest.weights), inner)
        self.heartbeat.progress()
        self._lost_work = False

    def _train_claim(self, base: ClosedRound, claim: Claim) -> None:
        done = Work()
        self._work.claims.append(claim.position)
        self._holds, self._has_trained = None, True
        try:
            self._train_steps(base, claim, done)
        except GraceOver:
            self._work.whole = False
            self.tracker.release(claim)
            return
        self.ledger.record(claim, tokens=done.tokens)
        self.tracker.mark_chunk_complete(claim)
        self.trainer.keep()
        self._work.add(done)
        self.announcer.claim(base, claim.position, done)

    def _train_steps(self, base: ClosedRound, claim: Claim, done: Work) -> None:
        """All steps of a claim, counted in ``done``; ``GraceOver`` when they would last longer than a stop allows."""
        began = self.clock()
        stopping_since: float | None = None

        def learning_rate(part: float, tokens: int) -> float:
            return self.plan.schedule.at(self.ledger.fraction(more_positions=part, more_tokens=tokens))

        for step in self.trainer.train(claim, learning_rate):
            done.add_step(step)
            self.heartbeat.progress(step=True)
            now = self.clock()
            self.announcer.step(
                base,
                step,
                positions=len(base.manifest.settled) + len(self.ledger.done) + step.part,
                tokens=base.manifest.tokens + self._work.tokens + done.tokens,
                seconds=now - began,
                memory=self.trainer.memory_bytes(),
            )
            began = now
            if (reason := self.stop()) is not None:
                stopping_since = now if stopping_since is None else stopping_since
                if step.part < 1 and now - stopping_since >= self.closer.pace.grace:
                    raise GraceOver(f"position {claim.position} was given up: {reason}.")

    # ---- (3) publish

    def _publish(self, base: ClosedRound) -> None:
        if not self._work.claims:
            return
        if self.lineage.round(base.number + 1) is not None:
            self._lose(base, "the round was closed without this worker")
            return
        finished = self.ledger.done
        published = self.publisher.publish(base, self._work, finished)
        if published.inner is not None and published.tensors is not None:
            self._holds = published.tensors.digest
        if finished:
            self.announcer.published(base, self._work, len(finished), published)

    def _give_up(self) -> None:
        """After an error: publishes what was finished, and names the claim in hand as failed."""
        claim = self.ledger.in_hand
        if claim is None or self._work.published:
            return
        self._work.claims.append(claim.position)
        self._work.failed.append(claim.position)
        self._work.whole = False
        try:
            self._publish(self.ledger.base)
        except StoreError as error:
            logger.warning(f"what was finished of round {self.ledger.base.number} is lost: {error}")

    def _lose(self, base: ClosedRound, reason: str) -> None:
        self._lost_work = True
        self.announcer.lost(base, self._work, reason)

    # ---- (4) to (6)

    def _inner_to_store(self, base: ClosedRound) -> Callable[[], Payload] | None:
        """Every few rounds of several workers, the one that merges leaves its optimiser's state for newcomers."""
        due = (base.number + 1) % ROUNDS_PER_INNER == 0
        if not due or not self._work.published or not self._work.whole or self._holds is not None:
            return None
        return lambda: self.publisher.upload_inner(base)

    def _follow(self, closed: ClosedRound) -> None:
        """Takes note of a closed round: work of this worker that is not in it is lost, and old files go."""
        manifest = closed.manifest
        accepted = {item.attempt for item in manifest.accepted}
        if self._work.published and self.ledger.done and self.attempt not in accepted:
            reason = manifest.rejected.get(self.attempt, "it was published too late")
            self._lose(self.ledger.base, reason)
        self.files.keep_only((manifest.weights, manifest.outer, manifest.inner, manifest.ema))
        self.lineage.forget_claims()
        if manifest.closer == self.attempt and not self.plan.keep_all:
            self.lineage.sweep(closed, keep=self.validator.kept(closed) if self.validator is not None else ())

    def _validate(self, closed: ClosedRound) -> None:
        """Measures the round's weights if that is up to this worker; a request to stop goes first."""
        if self.validator is None or not self.validator.is_due(closed) or self.stop() is not None:
            return
        try:
            self._load(closed)
            self.validator.examine(closed)
        except GraceOver as over:
            logger.info(f"round {closed.number} was not measured: {over}")

    def _refuse_hopeless(self, base: ClosedRound) -> None:
        if self.plan.skip_failing:
            return
        failing = [p for p, n in base.manifest.failures.items() if n >= self.plan.max_failures]
        if failing:
            places = "; ".join(f"position {p} ({self.plan.describe(p)})" for p in failing[:3])
            raise TrainingIncomplete(
                f"training failed {self.plan.max_failures} times at {places}: look at these rows and at the logs of "
                "the workers that tried them, or set rounds.on_failure: skip to train without them."
            )


def new_attempt(rng: random.Random) -> str:
    """A fresh name for a process; never that of a branch, which may live twice."""
    return f"{rng.getrandbits(64):016x}"
