"""One line per interval for logs: where the run is, how well it goes, and when it ends.

A listener of events; it prints nothing itself but hands each line to the ``write`` it was given. The remaining
time is reckoned from what was committed to the model, not from the steps of one worker, so it stays right when
workers come, go and wait for each other.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from metaflow_hf.events import (
    BlockCommitted,
    DownloadProgress,
    Evaluated,
    Event,
    Notice,
    RoundClosed,
    StepDone,
    WorkLost,
)
from metaflow_hf.report import units
from metaflow_hf.report.text import plain

_SMOOTHING = 0.9  # of the loss, per step: about the last ten steps
_RATE_ROUNDS = 20  # the remaining time follows the pace of the last rounds


class ProgressLines:
    """Writes one line per ``interval_seconds`` while events arrive; an ``OnEvent``, safe to call from threads.

    ``write`` gets each line without a line end. ``label`` (a worker's short name) goes before every line, so
    that the mixed logs of several workers can be read. ``planned_steps`` is this worker's share of the steps;
    without it the line shows the share of the tokens done. ``planned_workers`` serves the estimate until the
    first round closes. The first step, the last round, lost work, notices and evaluations are always written.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        label: str = "",
        interval_seconds: float = 10.0,
        planned_steps: int | None = None,
        planned_workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._prefix = f"[{label}] " if label else ""
        self._interval = interval_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}
        self._steps = _Steps(planned_steps)
        self._remaining = _Remaining(planned_workers)
        self._rounds_waited = 0.0
        self._download_start: dict[str, tuple[float, int]] = {}

    def __call__(self, event: Event) -> None:
        with self._lock:
            line = self._line(event, self._clock())
        if line is not None:
            # A message from elsewhere may hold line ends and escape codes; a log line is one harmless line.
            self._write(self._prefix + plain(line).replace("\n", " "))

    def _line(self, event: Event, now: float) -> str | None:
        match event:
            case StepDone():
                return self._step(event, now)
            case RoundClosed():
                return self._round(event, now)
            case WorkLost():
                return f"round {event.round}: lost {_positions(event.positions)}: {event.reason}"
            case Notice():
                return event.message
            case Evaluated():
                name = f"round {event.round}" if event.round else event.name
                return (
                    f"evaluation {name}: loss {units.loss(event.loss)}, perplexity "
                    f"{units.perplexity(event.perplexity)}, {event.bits_per_byte:.3f} bits per byte "
                    f"({units.count(event.tokens)} tokens)"
                )
            case DownloadProgress():
                return self._download(event, now)
            case BlockCommitted():
                if not self._is_due(f"block {event.dataset}", now):
                    return None
                return (
                    f"blocks of {event.dataset}: {event.block_id + 1} written, "
                    f"{units.count(event.total_samples)} samples, {units.byte_size(event.total_bytes)}"
                )
            case _:
                return None

    def _is_due(self, kind: str, now: float, *, always: bool = False) -> bool:
        if not always and now < self._due.get(kind, -math.inf):
            return False
        self._due[kind] = now + self._interval
        return True

    def _step(self, event: StepDone, now: float) -> str | None:
        self._steps.add(event)
        self._remaining.step(event, now)
        if not self._is_due("step", now):
            return None
        loss, tokens_per_second = self._steps.take()
        remaining = self._remaining.seconds(now)
        return (
            f"round {event.round} step {self._steps.position(event)} loss {units.loss(loss)} "
            f"lr {units.learning_rate(event.learning_rate)} {units.short_count(tokens_per_second)} tok/s "
            f"eta {'unknown' if remaining is None else units.duration(remaining)}"
        )

    def _round(self, event: RoundClosed, now: float) -> str | None:
        self._remaining.round(event, now)
        self._rounds_waited += event.waited_seconds
        if not self._is_due("round", now, always=event.final):
            return None
        waited, self._rounds_waited = self._rounds_waited, 0.0
        workers = "1 worker" if event.contributors == 1 else f"{event.contributors} workers"
        return (
            f"round {event.round}: {workers}, {units.count(event.positions_done)}/"
            f"{units.count(event.positions_total)} positions, loss {units.loss(event.loss)}, "
            f"waited {units.duration(waited)}{_ending(event)}"
        )

    def _download(self, event: DownloadProgress, now: float) -> str | None:
        start, first_bytes = self._download_start.setdefault(event.name, (now, event.done_bytes))
        is_complete = 0 < event.total_bytes <= event.done_bytes
        if not self._is_due(f"download {event.name}", now, always=is_complete):
            return None
        total = f"/{units.byte_size(event.total_bytes)}" if event.total_bytes else ""
        seconds = now - start
        rate = f", {units.byte_size((event.done_bytes - first_bytes) / seconds)}/s" if seconds > 0 else ""
        return f"download {event.name}: {units.byte_size(event.done_bytes)}{total}{rate}"


def _ending(event: RoundClosed) -> str:
    if not event.final:
        return ""
    return f", the last one: {event.stopped}" if event.stopped else ", the last one"


def _positions(number: int) -> str:
    return "1 position" if number == 1 else f"{units.count(number)} positions"


class _Steps:
    """The smoothed loss, and the tokens and seconds since the last line, of one worker's steps."""

    def __init__(self, planned_steps: int | None) -> None:
        self._planned = planned_steps
        self._loss_sum = 0.0
        self._loss_weight = 0.0
        self._tokens = 0
        self._seconds = 0.0

    def add(self, event: StepDone) -> None:
        self._loss_sum = _SMOOTHING * self._loss_sum + event.loss * event.tokens
        self._loss_weight = _SMOOTHING * self._loss_weight + event.tokens
        self._tokens += event.tokens
        self._seconds += event.seconds

    def take(self) -> tuple[float | None, float]:
        """(smoothed loss, tokens per second of the steps since the last call)."""
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._tokens, self._seconds = 0, 0.0
        return (self._loss_sum / self._loss_weight if self._loss_weight else None), rate

    def position(self, event: StepDone) -> str:
        if self._planned is not None:
            return f"{event.step}/{max(self._planned, event.step)}"
        share = units.percent(event.tokens_total, event.tokens_planned).replace(" ", "")
        return f"{event.step} ({share})"


class _Remaining:
    """Seconds to the end: tokens left over the pace at which the rounds of the lineage commit them.

    Until two rounds have closed under our eyes there is no such pace, and the own steps times the number of
    workers stand in for it.
    """

    def __init__(self, planned_workers: int) -> None:
        self._workers = planned_workers
        self._rounds: deque[tuple[float, int]] = deque(maxlen=_RATE_ROUNDS + 1)
        self._first: tuple[float, int] | None = None
        self._own_tokens = 0
        self._total = 0
        self._planned = 0
        self._final = False

    def step(self, event: StepDone, now: float) -> None:
        if self._first is None:
            self._first = (now - event.seconds, event.tokens_total - event.tokens)
        self._own_tokens += event.tokens
        self._total, self._planned = event.tokens_total, event.tokens_planned

    def round(self, event: RoundClosed, now: float) -> None:
        if self._first is None:
            self._first = (now, event.tokens_total)
        if not self._rounds or event.tokens_total > self._rounds[-1][1]:
            self._rounds.append((now, event.tokens_total))
        self._workers = max(1, event.contributors)
        self._final = event.final

    def seconds(self, now: float) -> float | None:
        """None while the pace is unknown; 0 at the end."""
        if self._final or (self._planned and self._total >= self._planned):
            return 0.0
        if len(self._rounds) >= 2:
            (start, start_tokens), (end, end_tokens) = self._rounds[0], self._rounds[-1]
            if end > start:
                pace = (end_tokens - start_tokens) / (end - start)
                left = self._planned - end_tokens
                # A slow round is not over because its time is up: at least what nobody has done yet is left.
                undone = left - self._workers * max(self._total - end_tokens, 0)
                return max(0.0, left / pace - (now - end), undone / pace)
        if self._first is None or now <= self._first[0] or not self._own_tokens:
            return None
        pace = self._workers * self._own_tokens / (now - self._first[0])
        return (self._planned - self._total) / pace
