"""Closing a round: which contributions count, and what becomes of them. Any worker can do it, and one wins.

A contribution counts when it started from this very round, its bytes are as recorded, every value is finite,
and its positions are neither in the model already nor in another contribution. The merge streams: it holds one
tensor of the base and of each contribution at a time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.objects import new_nonce
from metaflow_hf.train.delta import check_delta, decode_delta
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.outer import OuterStep
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Accepted, Delta, Payload, Round
from metaflow_hf.train.tensors import Layout, TensorReader, TensorWriter

logger = logging.getLogger("metaflow_hf.train")


@dataclass(frozen=True, slots=True)
class Contribution:
    """A published delta with its digest and, fetched and verified, its tensors."""

    delta: Delta
    digest: str
    path: Path

    @property
    def positions(self) -> Positions:
        return Positions.from_ranges(self.delta.positions)


@dataclass(frozen=True, slots=True)
class States:
    """Weights, outer and inner state of the next round, stored already."""

    weights: Payload
    outer: Payload | None
    inner: Payload | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merger:
    """Makes the next round of what was published; ``nonce`` and all inputs decide every byte of the manifest."""

    lineage: Lineage
    files: PayloadFiles
    attempt: str
    num_positions: int
    max_tokens: int | None
    outer_step: OuterStep
    max_failures: int = 5
    skip_failing: bool = False
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
        states = self._merge(base, good)
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
                    self._check(candidate, base, taken, weights)
                except (NotFound, IntegrityError) as error:
                    rejected[attempt] = str(error)
                    logger.warning("round %d: the work of %s is not used: %s", base.number, attempt, error)
                    continue
                taken |= candidate.positions
                good.append(candidate)
        return good, rejected, released

    def _check(
        self, candidate: Contribution, base: ClosedRound, taken: Positions, weights: TensorReader
    ) -> None:
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
        with TensorReader(candidate.path) as tensors:
            check_delta(tensors, weights, delta.encoding)
            for name in sorted(tensors.names):
                tensor = tensors[name]
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise IntegrityError(f"{name} holds values that are not finite")
                self.progress()

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

    def _step(self, base: ClosedRound, trained: Sequence[Contribution]) -> States:
        manifest = base.manifest
        tokens = [item.delta.tokens for item in trained]
        with ExitStack() as stack:
            weights = stack.enter_context(TensorReader(self.files.fetch(manifest.weights)))
            old_outer = manifest.outer and stack.enter_context(TensorReader(self.files.fetch(manifest.outer)))
            readers = [stack.enter_context(TensorReader(item.path)) for item in trained]
            layouts = {name: Layout(weights.shape(name)) for name in weights.names}
            new_weights = _Output(self, "weights", layouts)
            new_outer = _Output(self, "outer", layouts)
            for name in sorted(weights.names):
                before = weights[name]
                changes = [
                    decode_delta(reader, name, before, item.delta.encoding)
                    for reader, item in zip(readers, trained, strict=True)
                ]
                after, momentum = self.outer_step(
                    before, changes, tokens, old_outer[name] if old_outer else None
                )
                new_weights.add(name, after)
                if momentum is not None:
                    new_outer.add(name, momentum)
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
        return Round(
            nonce=self.nonce(),
            closer=self.attempt,
            round=base.number + 1,
            parent=base.digest,
            weights=states.weights,
            outer=states.outer,
            inner=inner or states.inner,
            accepted=[_accepted(item) for item in good],
            done=done.to_json(),
            skipped=skipped.to_json(),
            failures=dict(sorted(failures.items())),
            tokens=tokens,
            final=out_of_data or (self.max_tokens is not None and tokens >= self.max_tokens),
            rejected=rejected,
            empty_rounds=0 if good else old.empty_rounds + 1,
        )


class _Output:
    """One tensor file of the next round, begun with its first tensor."""

    def __init__(self, merger: Merger, kind: str, layouts: Mapping[str, Layout]) -> None:
        self._merger = merger
        self._kind = kind
        self._layouts = layouts
        self._draft = merger.files.draft(kind)
        self._writer: TensorWriter | None = None

    def add(self, name: str, tensor: Any) -> None:
        if self._writer is None:
            self._writer = TensorWriter(self._draft, self._layouts)
        self._writer.add(name, tensor)

    def store(self, number: int) -> Payload | None:
        """Stores the file, or returns ``None`` when nothing was added."""
        if self._writer is None:
            return None
        digest = self._writer.close()
        path = self._merger.files.adopt(self._draft, digest)
        return self._merger.lineage.upload_payload(path, self._kind, number, digest)


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
