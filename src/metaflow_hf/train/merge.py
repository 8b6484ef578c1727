"""Closing a round: which contributions count, and what becomes of them. Any worker can do it, and one wins.

A contribution counts when it started from this very round, its bytes are as recorded, every value is finite,
its change is not absurdly larger than the others', and its positions are neither in the model already nor in
another contribution. The merge streams: it holds a slab of values of the base and of each contribution at a time;
the files are mapped, not read.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.objects import new_nonce
from metaflow_hf.train.delta import check_delta, decoder, slabs
from metaflow_hf.train.ema import next_average
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.outer import OuterStep
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Accepted, Delta, Payload, Round
from metaflow_hf.train.tensors import Layout, TensorReader, TensorWriter

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
class States:
    """Weights, outer and inner state and average of the next round, stored already."""

    weights: Payload
    outer: Payload | None
    inner: Payload | None
    ema: Payload | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merger:
    """Makes the next round of what was published; ``nonce`` and all inputs decide every byte of the manifest.

    ``enough`` says why the run is to end with this round, "" while it is to go on.
    """

    lineage: Lineage
    files: PayloadFiles
    attempt: str
    num_positions: int
    max_tokens: int | None
    outer_step: OuterStep
    max_failures: int = 5
    skip_failing: bool = False
    ema_half_life: int | None = None
    enough: Callable[[], str] = lambda: ""
    progress: Callable[[], None] = lambda: None
    nonce: Callable[[], str] = new_nonce

    def close(
        self, base: ClosedRound, claims: Mapping[int, str], *, inner: Payload | None = None
    ) -> ClosedRound:
        """The round after ``base``, committed by this call or by another closer.

        ``claims`` are those of the round as the caller saw them; a claim that is in no accepted contribution and
        was not released counts as a failure of its position. ``inner`` is the caller's own inner state, stored
        already. Safe to call by several workers at once.
        """
        good, rejected, released = self._gather(base)
        states = self._averaged(base, self._merge(base, good), good)
        manifest = self._manifest(base, states, good, rejected, _lost(claims, good, released), inner)
        return self.lineage.create_round(manifest)

    def _gather(self, base: ClosedRound) -> tuple[list[Contribution], dict[str, str], Positions]:
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

    def _merge(self, base: ClosedRound, good: Sequence[Contribution]) -> States:
        manifest = base.manifest
        trained = [item for item in good if item.delta.tokens > 0]
        if not trained:
            return States(manifest.weights, manifest.outer, manifest.inner)
        if len(trained) == 1 and trained[0].delta.encoding == "weights":
            # Base + change is not exact in floating point; the weights themselves are.
            only = trained[0]
            assert only.delta.tensors is not None
            weights = self.lineage.upload_payload(
                only.path, "weights", base.number + 1, only.delta.tensors.expected
            )
            return States(weights, manifest.outer, only.delta.inner or manifest.inner)
        return self._step(base, trained)

    def _averaged(self, base: ClosedRound, states: States, good: Sequence[Contribution]) -> States:
        tokens = sum(item.delta.tokens for item in good)
        if self.ema_half_life is None or tokens == 0:
            return replace(states, ema=base.manifest.ema)
        average = next_average(
            self.lineage,
            self.files,
            base.manifest,
            states.weights,
            tokens,
            half_life=self.ema_half_life,
            progress=self.progress,
        )
        return replace(states, ema=average)

    def _step(self, base: ClosedRound, trained: Sequence[Contribution]) -> States:
        manifest = base.manifest
        tokens = [item.delta.tokens for item in trained]
        with ExitStack() as stack:
            weights = stack.enter_context(TensorReader(self.files.fetch(manifest.weights)))
            old_outer = manifest.outer and stack.enter_context(TensorReader(self.files.fetch(manifest.outer)))
            readers = [stack.enter_context(TensorReader(item.path)) for item in trained]
            layouts = {name: Layout(weights.shape(name)) for name in weights.names}
            new_weights = stack.enter_context(_Output(self, "weights", layouts))
            new_outer = stack.enter_context(_Output(self, "outer", layouts))
            for name in sorted(weights.names):
                decoders = [
                    decoder(reader, name, item.delta.encoding)
                    for reader, item in zip(readers, trained, strict=True)
                ]
                momentum = old_outer[name].reshape(-1) if old_outer else None
                for start, before in slabs(weights[name]):
                    changes = [decode(start, before) for decode in decoders]
                    part = momentum[start : start + len(before)] if momentum is not None else None
                    after, state = self.outer_step(before, changes, tokens, part)
                    new_weights.extend(name, after)
                    if state is not None:
                        new_outer.extend(name, state)
                self.progress()
            stored = new_weights.store(base.number + 1)
            assert stored is not None
            return States(stored, new_outer.store(base.number + 1), manifest.inner)

    def _manifest(
        self,
        base: ClosedRound,
        states: States,
        good: Sequence[Contribution],
        rejected: dict[str, str],
        lost: Sequence[int],
        inner: Payload | None,
    ) -> Round:
        old = base.manifest
        done = Positions.from_ranges(old.done)
        for item in good:
            done |= item.positions
        failures = {p: count for p, count in old.failures.items() if p not in done}
        for position in lost:
            failures[position] = failures.get(position, 0) + 1
        skipped = Positions.from_ranges(old.skipped)
        if self.skip_failing:
            skipped |= Positions.of(p for p, count in failures.items() if count >= self.max_failures)
        tokens = old.tokens + sum(item.delta.tokens for item in good)
        out_of_data = len(done | skipped) >= self.num_positions
        over = out_of_data or (self.max_tokens is not None and tokens >= self.max_tokens)
        stopped = "" if over else self.enough()
        return Round(
            nonce=self.nonce(),
            closer=self.attempt,
            round=base.number + 1,
            parent=base.digest,
            weights=states.weights,
            outer=states.outer,
            inner=inner or states.inner,
            ema=states.ema,
            accepted=[_accepted(item) for item in good],
            done=done.to_json(),
            skipped=skipped.to_json(),
            failures=dict(sorted(failures.items())),
            tokens=tokens,
            final=over or bool(stopped),
            stopped=stopped,
            rejected=rejected,
            empty_rounds=0 if good else old.empty_rounds + 1,
        )


class _Output:
    """One tensor file of the next round, begun with its first values; a context manager."""

    def __init__(self, merger: Merger, kind: str, layouts: Mapping[str, Layout]) -> None:
        self._merger = merger
        self._kind = kind
        self._layouts = layouts
        self._draft = merger.files.draft(kind)
        self._writer: TensorWriter | None = None

    def extend(self, name: str, values: Tensor) -> None:
        if self._writer is None:
            self._writer = TensorWriter(self._draft, self._layouts)
        self._writer.extend(name, values)

    def store(self, number: int) -> Payload | None:
        """Stores the file, or returns ``None`` when nothing was added."""
        if self._writer is None:
            return None
        digest = self._writer.close()
        path = self._merger.files.adopt(self._draft, digest)
        return self._merger.lineage.upload_payload(path, self._kind, number, digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)


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


def _lost(claims: Mapping[int, str], good: Sequence[Contribution], released: Positions) -> list[int]:
    trained = Positions()
    for item in good:
        trained |= item.positions
    return [position for position in sorted(claims) if position not in trained and position not in released]


def _accepted(item: Contribution) -> Accepted:
    return Accepted(
        attempt=item.delta.attempt,
        positions=item.delta.positions,
        tokens=item.delta.tokens,
        loss=item.delta.loss,
        delta_digest=item.digest,
    )
