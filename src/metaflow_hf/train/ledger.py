"""`RoundsLedger`: claims of positions within one round, where "done" means "in the model".

A claim is one created object, so no two workers ever hold a position in the same round; it dies with its round,
so nothing has to be given back after a crash. Trained claims go into the delta in hand and become done when a
round that accepts the delta is closed.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.order import Order
from metaflow_hf.errors import ClaimLost
from metaflow_hf.store.objects import new_nonce
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import ClaimRecord
from metaflow_hf.train.schedule import Budget

logger = logging.getLogger("metaflow_hf.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLimits:
    """When a worker has enough of a round: ``budget`` is the run's, ``seconds`` the round's time box,
    ``max_failures`` how often a position may fail before it is left alone.
    """

    budget: Budget
    seconds: float
    max_failures: int = 5


class RoundsLedger:
    """The ``Ledger`` of one worker in one round at a time; ``enter`` begins a round.

    ``claim`` answers ``None`` when this worker has enough of the round: its share or the time box is used up,
    somebody has published, the round is closed, or nothing is free. ``clock`` and ``rng`` are passed in.
    """

    def __init__(
        self,
        lineage: Lineage,
        order: Order,
        *,
        attempt: str,
        limits: RoundLimits,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        nonce: Callable[[], str] = new_nonce,
    ) -> None:
        self.attempt = attempt
        self.done = Positions()
        self.tokens = 0
        self._lineage = lineage
        self._order = order
        self._limits = limits
        self._clock = clock
        self._rng = rng or random.Random()
        self._nonce = nonce
        self._base: ClosedRound | None = None
        self._in_hand: Claim | None = None
        self._deadline = 0.0
        self._contributors = 1
        self._goal = 1.0
        self._alone = False
        self._window = 1
        self._tried: set[int] = set()
        self._foreseen: int | None = None

    @property
    def base(self) -> ClosedRound:
        """The round that this worker trains from. Raises ``RuntimeError`` before ``enter``."""
        if self._base is None:
            raise RuntimeError("the ledger is in no round yet: call enter() with the newest closed one.")
        return self._base

    def fraction(self, *, more_positions: float = 0.0, more_tokens: float = 0.0) -> float:
        """How much of the run is over if every contributor of this round has done what this worker has.

        ``more_…`` is what this worker did of the claim in hand.
        """
        manifest = self.base.manifest
        return self._limits.budget.fraction(
            len(manifest.settled) + self._contributors * (len(self.done) + more_positions),
            manifest.tokens + self._contributors * (self.tokens + more_tokens),
        )

    @property
    def in_hand(self) -> Claim | None:
        """The claim that is being trained."""
        return self._in_hand

    def enter(self, base: ClosedRound, *, contributors: int, goal: float = 1.0, alone: bool = False) -> None:
        """Begins the round that starts from ``base``, with nothing done.

        ``contributors`` workers are expected to share it; it is over for this one when, as far as it can tell,
        they have brought the run to the fraction ``goal``. ``alone`` gives way to whoever claimed first.
        """
        self._base = base
        self._contributors = contributors
        self._goal = goal
        self._alone = alone
        self.done = Positions()
        self.tokens = 0
        self._in_hand = None
        self._tried = set()
        self._foreseen = None
        self._deadline = self._clock() + self._limits.seconds
        self._window = 1 if contributors == 1 else 2 * contributors

    def free(self) -> Positions:
        """Positions that are neither settled nor known to be claimed in this round."""
        return self._unsettled() - Positions.of(self._tried)

    def claim(self) -> Claim | None:
        """The next position for this worker, or ``None`` when it has enough of this round."""
        if self._in_hand is not None:
            raise RuntimeError(
                f"position {self._in_hand.position} is still in hand: complete or release it first."
            )
        if self._has_enough():
            return None
        claims = self._lineage.claims(self.base.number)
        if self._alone and {*claims.values()} - {self.attempt}:
            return None
        self._tried.update(claims)
        first_try = True
        while (position := self._next(first_try=first_try)) is not None:
            first_try = False
            token = self._nonce()
            record = ClaimRecord(attempt=self.attempt, nonce=token)
            self._tried.add(position)
            if not self._lineage.create_claim(self.base.number, position, record):
                if self._alone:
                    return None
                # More workers than expected: look further ahead.
                self._window *= 2
                continue
            if self._lineage.round(self.base.number + 1) is not None:
                return None
            self._in_hand = self._claim_of(position, token)
            return self._in_hand
        return None

    def foresee(self) -> Claim | None:
        """What ``claim`` will try first in this round; nothing is claimed by that, and others may be faster."""
        if self._foreseen is None:
            self._foreseen = self._choose(first_try=False)
        return None if self._foreseen is None else self._claim_of(self._foreseen, "")

    def record(self, claim: Claim, *, tokens: int) -> None:
        """Notes how many tokens a claim had, before it is completed."""
        self._check(claim)
        self.tokens += tokens

    def complete(self, claim: Claim, steps: int) -> None:
        """Adds the claim to the delta in hand. Raises ``ClaimLost`` when its round was closed meanwhile."""
        del steps
        self._check(claim)
        self._in_hand = None
        if self._lineage.round(self.base.number + 1) is not None:
            raise ClaimLost(
                f"position {claim.position}: round {self.base.number + 1} was closed without this worker, which was "
                "thought to be dead; its work since is dropped and trained again by others."
            )
        self.done |= Positions.of((claim.position,))

    def release(self, claim: Claim) -> None:
        """Drops the claim untrained; it is free again in the next round."""
        self._check(claim)
        self._in_hand = None

    def is_chunk_trained(self, block_id: int, chunk_id: int) -> bool:
        """Whether all rows of the chunk are in the newest model, for every epoch. Raises ``IndexError``."""
        chunks = {
            (span.block_id, span.chunk_id)
            for span in map(self._order.locate, range(self._order.positions_per_epoch))
        }
        if (block_id, chunk_id) not in chunks:
            raise IndexError(
                f"there is no chunk {chunk_id} of block {block_id} among those that are trained."
            )
        remaining = self._everything() - self.base.manifest.settled
        spans = (self._order.locate(position) for position in remaining)
        return not any((span.block_id, span.chunk_id) == (block_id, chunk_id) for span in spans)

    def progress(self) -> dict[str, Any]:
        """What is in the newest model, counted in positions; ``workers`` counts those at work in it."""
        manifest = self.base.manifest
        done = Positions.from_ranges(manifest.done)
        per_epoch = max(self._order.positions_per_epoch, 1)
        claims = self._lineage.claims(self.base.number)
        return {
            "round": self.base.number,
            "epoch": min(len(manifest.settled) // per_epoch, self._order.epochs - 1),
            "total_chunks": self._order.num_positions,
            "done_chunks": len(done),
            "claimed_chunks": len(claims),
            "skipped_chunks": len(Positions.from_ranges(manifest.skipped)),
            "tokens": manifest.tokens,
            "done_samples": sum(span.stop - span.start for span in map(self._order.locate, done)),
            "workers": len({*(item.attempt for item in manifest.accepted), *claims.values()}),
        }

    def is_epoch_complete(self) -> bool:
        """Whether the lineage is final: positions run over all epochs."""
        newest = self._lineage.newest(after=self.base.number) or self.base
        return newest.manifest.final

    def start_new_epoch(self) -> None:
        """Nothing: positions run over all epochs."""

    def _next(self, *, first_try: bool) -> int | None:
        """The position foreseen, unless somebody else has it by now; else a fresh choice."""
        position, self._foreseen = self._foreseen, None
        if position is not None and position not in self._tried:
            return position
        return self._choose(first_try=first_try)

    def _claim_of(self, position: int, token: str) -> Claim:
        span = self._order.locate(position)
        return Claim(span.block_id, span.chunk_id, span.start, span.stop, span.epoch, position, token)

    def _unsettled(self) -> Positions:
        manifest = self.base.manifest
        failing = (p for p, count in manifest.failures.items() if count >= self._limits.max_failures)
        return self._everything() - manifest.settled - Positions.of(failing)

    def _everything(self) -> Positions:
        return Positions.from_ranges([(0, self._order.num_positions)])

    def _has_enough(self) -> bool:
        number = self.base.number
        if self.done and (self._clock() >= self._deadline or self.fraction() >= self._goal):
            return True
        return bool(self._lineage.published(number)) or self._lineage.round(number + 1) is not None

    def _choose(self, *, first_try: bool) -> int | None:
        """A contributor of the last round first tries the free position at its rank; else one of the lowest few."""
        last = sorted(item.attempt for item in self.base.manifest.accepted)
        if first_try and not self.done and self.attempt in last:
            place = last.index(self.attempt)
            mine = next(islice(self._unsettled(), place, None), None)
            if mine is not None and mine not in self._tried:
                return mine
        lowest = list(islice(self.free(), self._window))
        if len(lowest) <= 1:
            return lowest[0] if lowest else None
        return lowest[self._rng.randrange(len(lowest))]

    def _check(self, claim: Claim) -> None:
        if claim != self._in_hand:
            raise ClaimLost(f"position {claim.position} is not the claim in hand of this worker.")
