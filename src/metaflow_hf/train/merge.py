"""Closing a round: its contributions become one model. Any worker can do it, and one wins.

The merge streams: it holds a slab of values of the base and of each contribution at a time; the files are mapped, not
read.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from torch import Tensor

from metaflow_hf.store.objects import new_nonce
from metaflow_hf.train.delta import decoder, slabs
from metaflow_hf.train.ema import next_average
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.judging import Contribution, Judge
from metaflow_hf.train.lineage import ClosedRound, Lineage
from metaflow_hf.train.outer import OuterStep
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Accepted, Payload, Round
from metaflow_hf.train.tensors import Layout, TensorReader, TensorWriter


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
        judge = Judge(self.lineage, self.files, self.num_positions, self.progress)
        good, rejected, released = judge.gather(base)
        states = self._averaged(base, self._merge(base, good), good)
        manifest = self._manifest(base, states, good, rejected, _lost(claims, good, released), inner)
        return self.lineage.create_round(manifest)

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
