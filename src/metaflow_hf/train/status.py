"""How a lineage is doing, read from its store alone: nothing is written, and no worker is asked.

Times are the store's own (when an object was last written), so they are of one clock. A worker counts as working
when its heartbeat was seen to move, which takes a few seconds of watching; what does not move may be a long step.
"""

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from metaflow_hf.data.order import Order
from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.stored import DATASETS
from metaflow_hf.errors import TrainingIncomplete
from metaflow_hf.store.objects import ObjectStore, quote_part
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.presence import WATCH_SECONDS, WorkerStatus, workers_of
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Round, Spec
from metaflow_hf.train.schedule import Budget
from metaflow_hf.train.spec import order_of

LAST_ROUNDS: Final = 20
_READERS: Final = 8

State = Literal["starting", "open", "final", "exported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """One closed round. ``seconds`` passed since the round before was closed, ``None`` for round 0; ``lost`` counts
    claims whose work is in no model, ``rejected`` says why contributions were not used.
    """

    round: int
    closed: datetime
    contributors: int
    positions: int
    tokens: int
    tokens_total: int
    loss: float | None
    seconds: float | None
    lost: int
    rejected: Mapping[str, str]
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPosition:
    """A position that was lost ``failures`` times; ``block_id`` and the rows are ``None`` where the dataset is unknown."""

    position: int
    failures: int
    skipped: bool
    block_id: int | None
    start: int | None
    stop: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageStatus:
    """How far a lineage is; what was not begun yet is 0 or ``None``.

    ``starting``: there is no round 0 yet. ``positions_done`` are in the model, ``positions_claimed`` are in hand or
    published since. A chunk is done when all its positions are; every epoch counts its own. ``tokens_planned`` is an
    estimate unless ``max_tokens`` ends the run. ``rounds`` are the last few, ``loss`` is that of the last round that
    trained, ``tokens_per_second`` and ``eta_seconds`` are reckoned from them. ``model`` is the key of the export.
    ``stopped`` says why the run ended before its data and tokens did, if it did.
    """

    lineage: str
    state: State
    round: int | None = None
    started: datetime | None = None
    last_closed: datetime | None = None
    positions_total: int = 0
    positions_done: int = 0
    positions_claimed: int = 0
    positions_skipped: int = 0
    positions_left: int = 0
    chunks_done: int | None = None
    chunks_total: int | None = None
    tokens: int = 0
    tokens_planned: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    workers: tuple[WorkerStatus, ...] = ()
    rounds: tuple[RoundStatus, ...] = ()
    failing: tuple[FailedPosition, ...] = ()
    model: str | None = None
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lineage_status(
    lineage: Lineage,
    *,
    name: str,
    find_order: Callable[[Spec], Order | None] = lambda _: None,
    last_rounds: int = LAST_ROUNDS,
    watch_seconds: float = WATCH_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> LineageStatus:
    """What the store says of a lineage now; safe while it is trained, swept and exported.

    ``find_order`` gives the order of the data, where it is known: chunks and rows are counted by it. Watches the
    heartbeats for at most ``watch_seconds``, less when all have moved. Raises ``StoreUnavailable``,
    ``IntegrityError``.
    """
    try:
        spec = lineage.spec()
    except TrainingIncomplete:
        return LineageStatus(lineage=name, state="starting")
    newest = lineage.newest()
    if newest is None:
        return LineageStatus(lineage=name, state="starting", positions_total=spec.num_positions)
    closed = closed_rounds(lineage, after=newest.number - last_rounds, until=newest.number)
    manifest = newest.manifest
    claims = {} if manifest.final else lineage.claims(newest.number)
    settled = manifest.settled
    order = find_order(spec)
    model = exported_model(lineage)
    planned = _planned_tokens(spec, manifest)
    pace = tokens_per_second(closed)
    chunks = (None, None) if order is None else count_chunks(order, Positions.from_ranges(manifest.done))
    return LineageStatus(
        lineage=name,
        state="exported" if model else "final" if manifest.final else "open",
        round=newest.number,
        started=lineage.store.head("spec.json").last_modified,
        last_closed=closed[-1].closed,
        positions_total=spec.num_positions,
        positions_done=len(Positions.from_ranges(manifest.done)),
        positions_claimed=len(Positions.of(claims) - settled),
        positions_skipped=len(Positions.from_ranges(manifest.skipped)),
        positions_left=spec.num_positions - len(settled | Positions.of(claims)),
        chunks_done=chunks[0],
        chunks_total=chunks[1],
        tokens=manifest.tokens,
        tokens_planned=planned,
        loss=next((item.loss for item in reversed(closed) if item.loss is not None), None),
        tokens_per_second=pace,
        eta_seconds=_eta(manifest, planned, pace),
        workers=workers_of(lineage, newest, claims, seconds=watch_seconds, sleep=sleep),
        rounds=tuple(closed),
        failing=_failing(manifest, order),
        model=model,
        stopped=manifest.stopped,
    )


def closed_rounds(lineage: Lineage, *, after: int = -1, until: int | None = None) -> list[RoundStatus]:
    """The rounds above ``after`` up to ``until``, in order: one listing, and one read each."""
    # What a round lost is told by the one before.
    times = lineage.round_times(after=after - 1)
    numbers = sorted(number for number in times if until is None or number <= until)
    with ThreadPoolExecutor(_READERS) as pool:
        manifests = [item.manifest for item in pool.map(lineage.round, numbers) if item is not None]
    before = [None, *manifests]
    found = [_round(item, earlier, times) for item, earlier in zip(manifests, before, strict=False)]
    return [item for item in found if item.round > after]


def stored_order(root: ObjectStore, spec: Spec) -> Order | None:
    """The order of a lineage whose dataset lies in the same datastore as ``root``; ``None`` when it lies elsewhere."""
    parts = [spec.dataset] if isinstance(spec.datasets, msgspec.UnsetType) else spec.datasets
    found = [_stored_blocks(root, part) for part in parts]
    described = spec.order.get("datasets", [{"samples": spec.order["num_samples"], "blocks": None}])
    samples: list[int] = []
    for blocks, one in zip(found, described, strict=True):
        if blocks is None:
            return None
        samples += _trained(blocks, int(one["samples"]))[: one["blocks"]]
    return order_of(spec.order, samples)


def _stored_blocks(root: ObjectStore, dataset: Mapping[str, str]) -> list[int] | None:
    """The samples of each block of the dataset with this key and digest."""
    name = quote_part(dataset["key"])
    for child in root.children(DATASETS):
        if child != name and not child.startswith(f"{name}-"):
            continue
        manifest = read_manifest(root.child(f"{DATASETS}/{child}"))
        if manifest is not None and manifest.is_complete and manifest.digest == dataset["digest"]:
            return [block.sample_count for block in manifest.blocks]
    return None


def tokens_per_second(rounds: Sequence[RoundStatus]) -> float | None:
    """The pace between the first and the last of these rounds; ``None`` when there is none to tell."""
    if len(rounds) < 2:
        return None
    seconds = (rounds[-1].closed - rounds[0].closed).total_seconds()
    tokens = rounds[-1].tokens_total - rounds[0].tokens_total
    return tokens / seconds if seconds > 0 and tokens else None


def exported_model(lineage: Lineage) -> str | None:
    """The key of the model that the lineage was exported as last, or ``None``."""
    keys = sorted((info.key for info in lineage.store.list("exports")), key=lambda key: (len(key), key))
    return str(json.loads(lineage.store.get(keys[-1]))["key"]) if keys else None


def _round(manifest: Round, before: Round | None, times: Mapping[int, datetime]) -> RoundStatus:
    tokens = sum(item.tokens for item in manifest.accepted)
    closed = times[manifest.round]
    return RoundStatus(
        round=manifest.round,
        closed=closed,
        contributors=len(manifest.accepted),
        positions=sum(stop - start for item in manifest.accepted for start, stop in item.positions),
        tokens=tokens,
        tokens_total=manifest.tokens,
        loss=sum(item.loss * item.tokens for item in manifest.accepted) / tokens if tokens else None,
        seconds=(closed - times[before.round]).total_seconds() if before else None,
        lost=manifest.lost_since(before) if before else 0,
        rejected=dict(manifest.rejected),
        final=manifest.final,
    )


def _trained(block_samples: Sequence[int], limit: int) -> list[int]:
    """Samples per block, up to ``limit`` in all; blocks beyond it are not used."""
    left, kept = limit, []
    for samples in block_samples:
        kept.append(min(samples, left))
        left -= kept[-1]
    return kept


def _planned_tokens(spec: Spec, manifest: Round) -> int | None:
    if manifest.final:
        return manifest.tokens
    return (
        Budget(spec.num_positions, spec.max_tokens).planned_tokens(len(manifest.settled), manifest.tokens)
        or None
    )


def _eta(manifest: Round, planned: int | None, pace: float | None) -> float | None:
    if manifest.final:
        return 0.0
    return None if planned is None or pace is None else max(planned - manifest.tokens, 0) / pace


def count_chunks(order: Order, done: Positions) -> tuple[int, int]:
    """Chunks of which every position is done, and all chunks, over all epochs."""
    starts = [start for start, _ in done.ranges]
    finished = total = 0
    for chunk in order.chunks():
        total += 1
        if isinstance(chunk, range):
            index = bisect_right(starts, chunk.start) - 1
            finished += index >= 0 and chunk.stop <= done.ranges[index][1]
        else:
            finished += all(position in done for position in chunk)
    return finished, total


def _failing(manifest: Round, order: Order | None) -> tuple[FailedPosition, ...]:
    skipped = Positions.from_ranges(manifest.skipped)
    found = []
    for position in sorted({*manifest.failures, *skipped}):
        span = order.locate(position) if order is not None else None
        found.append(
            FailedPosition(
                position=position,
                failures=manifest.failures.get(position, 0),
                skipped=position in skipped,
                block_id=span.block_id if span else None,
                start=span.start if span else None,
                stop=span.stop if span else None,
            )
        )
    return tuple(found)
