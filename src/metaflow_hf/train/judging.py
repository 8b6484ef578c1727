"""Which contributions of a round count.

One does when it started from this very round, its bytes are as recorded, every value is finite, its change is not
absurdly larger than the others', and its positions are neither in the model already nor in another contribution. Files
are mapped and read in slabs of values.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

import torch

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.train.delta import check_delta, decoder, slabs
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Delta
from metaflow_hf.train.tensors import TensorReader

logger = logging.getLogger("metaflow_hf.train")

# Adam moves every value by the learning rate at most, so healthy workers differ by no more than their steps do.
ABSURD: Final = 100.0


@dataclass(frozen=True, slots=True)
class Contribution:
    """A published delta with its digest and, fetched and verified, its tensors; ``norm`` is that of its change."""

    delta: Delta
    digest: str
    path: Path
    norm: float = 0.0

    @property
    def positions(self) -> Positions:
        return Positions.from_ranges(self.delta.positions)


@dataclass(frozen=True, slots=True)
class Judge:
    """Looks at what was published for a round; ``progress`` is called while it reads."""

    lineage: Lineage
    files: PayloadFiles
    num_positions: int
    progress: Callable[[], None]

    def gather(self, base: ClosedRound) -> tuple[list[Contribution], dict[str, str], Positions]:
        """The contributions that count, why others do not, and the positions that were given up unharmed."""
        good: list[Contribution] = []
        rejected: dict[str, str] = {}
        released = Positions()
        taken = Positions.from_ranges(base.manifest.done)
        with TensorReader(self.files.fetch(base.manifest.weights)) as weights:
            for attempt in self.lineage.published(base.number):
                try:
                    delta, digest = self.lineage.delta(base.number, attempt)
                    released |= Positions.from_ranges(delta.released)
                    if delta.tensors is None:
                        continue
                    candidate = Contribution(delta, digest, self.files.fetch(delta.tensors))
                    self._check(candidate, base, taken)
                    norm = self._norm(candidate, weights)
                except (NotFound, IntegrityError) as error:
                    rejected[attempt] = str(error)
                    continue
                taken |= candidate.positions
                good.append(replace(candidate, norm=norm))
            rejected |= _absurd(good, lambda: _norm_of(weights))
        for attempt, reason in rejected.items():
            logger.warning("round %d: the work of %s is not used: %s", base.number, attempt, reason)
        return [item for item in good if item.delta.attempt not in rejected], rejected, released

    def _check(self, candidate: Contribution, base: ClosedRound, taken: Positions) -> None:
        delta = candidate.delta
        if delta.base != base.digest:
            raise IntegrityError(f"it started from {delta.base[:12]}, not from {base.digest[:12]}")
        if (
            not candidate.positions
            or delta.tokens < 0
            or candidate.positions.ranges[-1][1] > self.num_positions
        ):
            raise IntegrityError(f"positions {delta.positions} with {delta.tokens} tokens are not possible")
        twice = candidate.positions & taken
        if twice:
            raise IntegrityError(
                f"positions {twice.to_json()} are in the model already or in another contribution"
            )

    def _norm(self, candidate: Contribution, weights: TensorReader) -> float:
        """The norm of a contribution's change. Raises ``IntegrityError`` for tensors that do not fit or are not finite."""
        squares = 0.0
        with TensorReader(candidate.path) as tensors:
            check_delta(tensors, weights, candidate.delta.encoding)
            for name in sorted(weights.names):
                decode = decoder(tensors, name, candidate.delta.encoding)
                for start, before in slabs(weights[name]):
                    change = decode(start, before)
                    norm = float(torch.linalg.vector_norm(change))
                    # Squares of large values overflow, so the values have the last word.
                    if not math.isfinite(norm) and not bool(torch.isfinite(change).all()):
                        raise IntegrityError(f"{name} holds values that are not finite")
                    squares += norm * norm
                self.progress()
        return math.sqrt(squares)


def _absurd(items: Sequence[Contribution], weights_norm: Callable[[], float]) -> dict[str, str]:
    """Why the change of some contributions cannot be true, by attempt.

    The bound is a hundred times the median of the others, as a whole and per token: who trained a hundred times as
    much as others may well have moved a hundred times as far. How large weights are says nothing by itself, for in
    early training a round moves them further than their own size. Where there is no majority to compare with (one
    other contribution, or others without any change) both signs are needed.
    """
    trained = [item for item in items if item.delta.tokens > 0]
    reasons = {}
    for item in trained:
        others = [other for other in trained if other is not item]
        if not others or math.isnan(item.norm):
            continue
        usual = median(other.norm for other in others)
        usual_per_token = median(other.norm / other.delta.tokens for other in others)
        if item.norm <= ABSURD * usual or item.norm / item.delta.tokens <= ABSURD * usual_per_token:
            continue
        if (len(others) == 1 or usual == 0) and item.norm <= weights_norm():
            continue
        reasons[item.delta.attempt] = (
            f"its change has norm {item.norm:.3g}, absurd beside {usual:.3g}, the median of the others'"
        )
    return reasons


def _norm_of(tensors: TensorReader) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensors[name])) for name in tensors.names))
