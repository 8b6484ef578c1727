"""From a list of events to the series that charts and tables show: pure, bounded in size, finite numbers only.

A run of any length gives at most ``MAX_POINTS`` points a series: steps are averaged in buckets, rounds in
groups. What is not finite is left out, because JSON has no word for it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from metaflow_hf.events import ClaimDone, DeltaPublished, Evaluated, Event, RoundClosed, StepDone, WorkLost

MAX_POINTS = 200
MAX_WORKERS = 8  # more colours than this cannot be told apart; then all workers are one series
_LABEL_DIGITS = 8
_STEPS_PER_SPAN = 10
_PACE_ROUNDS = 20


@dataclass(frozen=True)
class StepPoint:
    """The steps of one worker in one bucket of the tokens axis: means weighted by tokens."""

    worker: str
    tokens: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class TimePoint:
    """One worker in one bucket of time, ``minutes`` (its middle) after the first step of the run."""

    worker: str
    minutes: float
    tokens_per_second: float
    memory_bytes: int


@dataclass
class RoundRow:
    """One round as all workers saw it together; ``tokens_by_worker`` are of the published contributions.

    ``lost_positions`` are in no model: their workers died, or what they published was not used.
    """

    round: int
    contributors: int = 0
    tokens: int = 0
    tokens_total: int = 0
    positions_done: int = 0
    positions_total: int = 0
    loss: float | None = None
    seconds: float = 0.0
    waited_seconds: float = 0.0
    lost_positions: int = 0
    final: bool = False
    tokens_by_worker: dict[str, int] = field(default_factory=dict)


def worker_labels(events: Iterable[Event]) -> dict[str, str]:
    """A short, unique label for each worker (attempt), in the order of appearance.

    The shortest prefix of at least 8 characters that tells all of them apart; one common name when there are
    more than ``MAX_WORKERS``.
    """
    training = (StepDone, ClaimDone, DeltaPublished)
    workers = list(dict.fromkeys(event.worker for event in events if isinstance(event, training)))
    if len(workers) > MAX_WORKERS:
        return dict.fromkeys(workers, f"{len(workers)} workers")
    longest = max(map(len, workers), default=0)
    for digits in range(_LABEL_DIGITS, longest + 1):
        if len({worker[:digits] for worker in workers}) == len(workers):
            return {worker: worker[:digits] or "worker" for worker in workers}
    return {worker: worker or "worker" for worker in workers}


def step_points(events: Iterable[Event], labels: dict[str, str]) -> list[StepPoint]:
    """Loss and learning rate over the tokens of the run, at most ``MAX_POINTS`` points a worker."""
    steps = [e for e in events if isinstance(e, StepDone) and math.isfinite(e.loss) and e.tokens > 0]
    if not steps:
        return []
    width = _bucket_width([step.tokens_total for step in steps])
    buckets: defaultdict[tuple[str, int], list[StepDone]] = defaultdict(list)
    for step in steps:
        buckets[labels[step.worker], int(step.tokens_total / width)].append(step)
    points = []
    for (worker, _), group in sorted(buckets.items(), key=lambda item: item[0]):
        tokens = sum(step.tokens for step in group)
        points.append(
            StepPoint(
                worker=worker,
                tokens=round(sum(step.tokens_total * step.tokens for step in group) / tokens),
                loss=sum(step.loss * step.tokens for step in group) / tokens,
                learning_rate=sum(step.learning_rate * step.tokens for step in group) / tokens,
            )
        )
    return points


def time_points(events: Iterable[Event], labels: dict[str, str], *, limit: int = 60) -> list[TimePoint]:
    """Tokens per second of wall clock (waiting included) and peak memory, in ``limit`` equal spans of time.

    Every worker has a point in every span from its first to its last step, 0 where it made none.
    """
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        return []
    start = min(step.time - step.seconds for step in steps)
    end = max(step.time for step in steps)
    # A span as short as the steps themselves would show them as spikes and holes.
    shortest = _STEPS_PER_SPAN * sum(step.seconds for step in steps) / len(steps)
    spans = max(1, min(limit, int((end - start) / shortest) if shortest > 0 else limit))
    width = max((end - start) / spans, 1e-6)
    tokens: defaultdict[str, list[int]] = defaultdict(lambda: [0] * spans)
    memory: defaultdict[str, list[int]] = defaultdict(lambda: [0] * spans)
    seen: defaultdict[str, set[int]] = defaultdict(set)
    for step in steps:
        worker, index = labels[step.worker], min(spans - 1, int(max(0.0, step.time - start) / width))
        tokens[worker][index] += step.tokens
        memory[worker][index] = max(memory[worker][index], step.memory_bytes)
        seen[worker].add(index)
    return [
        TimePoint(
            worker=worker,
            minutes=(index + 0.5) * width / 60,
            tokens_per_second=tokens[worker][index] / width,
            memory_bytes=memory[worker][index],
        )
        for worker, indices in seen.items()
        for index in range(min(indices), max(indices) + 1)
    ]


def round_rows(events: Iterable[Event], labels: dict[str, str]) -> list[RoundRow]:
    """One row per closed round, in order. Workers report the same round: what they share counts once.

    ``waited_seconds`` is the mean of those who reported the round.
    """
    rows: dict[int, RoundRow] = {}
    waits: defaultdict[int, list[float]] = defaultdict(list)
    published: defaultdict[int, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    lost: defaultdict[int, int] = defaultdict(int)
    for event in events:
        match event:
            case RoundClosed():
                row = rows.setdefault(event.round, RoundRow(event.round))
                row.contributors, row.tokens, row.loss = event.contributors, event.tokens, event.loss
                row.tokens_total, row.seconds = event.tokens_total, max(row.seconds, event.seconds)
                row.positions_done, row.positions_total = event.positions_done, event.positions_total
                row.lost_positions, row.final = event.positions_lost, event.final
                waits[event.round].append(event.waited_seconds)
            case DeltaPublished():
                published[event.round][labels[event.worker]] += event.tokens
            case WorkLost():
                lost[event.round] += event.positions
            case _:
                pass
    for number, row in rows.items():
        row.waited_seconds = sum(waits[number]) / len(waits[number])
        row.tokens_by_worker = dict(published[number])
        # Whose worker lives tells of it once more.
        row.lost_positions = max(row.lost_positions, lost[number])
    return [rows[number] for number in sorted(rows)]


def position_rounds(events: Sequence[Event]) -> dict[int, tuple[int, str]]:
    """Which round brought a position into the model: position -> (round, attempt).

    A claim counts when its worker published in that round and the round closed; a claim of work that was
    dropped does not.
    """
    closed = {event.round for event in events if isinstance(event, RoundClosed)}
    published = {(event.worker, event.round) for event in events if isinstance(event, DeltaPublished)}
    return {
        event.position: (event.round, event.worker)
        for event in events
        if isinstance(event, ClaimDone) and event.round in closed and (event.worker, event.round) in published
    }


def claimed_positions(events: Sequence[Event]) -> set[int]:
    """Positions that a worker has finished for a round that is not closed yet."""
    closed = max((event.round for event in events if isinstance(event, RoundClosed)), default=-1)
    return {event.position for event in events if isinstance(event, ClaimDone) and event.round > closed}


def measured_rounds(events: Sequence[Event]) -> list[Evaluated]:
    """Held-out figures of the rounds that were measured, in order; of very many some, the best among them."""
    found = {event.round: event for event in events if isinstance(event, Evaluated) and event.round}
    ordered = [found[number] for number in sorted(found)]
    every = max(-(-len(ordered) // MAX_POINTS), 1)
    best = best_measured(ordered)
    last = len(ordered) - 1
    return [one for number, one in enumerate(ordered) if number % every == 0 or one is best or number == last]


def best_measured(measured: Sequence[Evaluated]) -> Evaluated | None:
    """The one of the lowest held-out loss; ``None`` where none is finite."""
    finite = [event for event in measured if math.isfinite(event.loss)]
    return min(finite, key=lambda event: event.loss, default=None)


def seconds_left(events: Sequence[Event], planned: int) -> float | None:
    """How long the tokens that are left will take at the pace of the last ``_PACE_ROUNDS`` rounds; ``None`` unknown."""
    closed = {event.round: event for event in events if isinstance(event, RoundClosed)}
    last = [closed[number] for number in sorted(closed)][-_PACE_ROUNDS:]
    if len(last) < 2 or last[-1].time <= last[0].time:
        return None
    pace = (last[-1].tokens_total - last[0].tokens_total) / (last[-1].time - last[0].time)
    return max(planned - last[-1].tokens_total, 0) / pace if pace > 0 else None


def _bucket_width(values: Sequence[int]) -> float:
    return max((max(values) - min(values)) / MAX_POINTS, 1.0)
