"""Trackers by configuration: listeners that record the figures of events, and never hold training up.

A tracker opened with the name of an earlier run goes on with that run: the horizontal axis is the tokens of
the lineage, which a restarted worker takes up where the model stands, and not a count of its own. Each package
is imported when its tracker is opened; what is not installed is one clear error.
"""

import logging
import math
import re
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from metaflow_hf.errors import ConfigError
from metaflow_hf.events import Evaluated, Event, RoundClosed, StepDone
from metaflow_hf.report.recorders import RECORDERS, Connect, Point, Recorder

_LOG = logging.getLogger("metaflow_hf.report")

# Points of one request: MLflow takes at most a thousand figures.
_BATCH: Final = 100
# Points that wait for a tracker that does not answer; then the oldest are given up.
_MOST_WAITING: Final = 100_000
# For one that does not answer when it is closed.
_LAST_TRY_SECONDS: Final = 5.0


class Tracker:
    """A listener that hands the figures of events to one run of a tracker, in a thread of its own.

    Whoever calls never waits, and never sees an error of the tracker: one that cannot be opened, goes down or does not
    answer is warned of once, and tried again every ``retry_seconds``; what it missed is recorded then. ``close`` waits
    ``close_seconds`` at most (5 for one that does not answer), and says how many points were not recorded. Figures that are not finite are left out,
    because the trackers' own formats disagree on them.

    Use as a context manager, so that a run that fails is closed as well.
    """

    def __init__(
        self, name: str, connect: Connect, *, retry_seconds: float = 60.0, close_seconds: float = 30.0
    ) -> None:
        self._name = name
        self._connect = connect
        self._retry_seconds = retry_seconds
        self._close_seconds = close_seconds
        self._tokens = 0
        self._waiting: deque[Point] = deque()
        self._in_hand: list[Point] = []
        self._given_up = 0
        self._is_closing = False
        self._has_failed = self._is_failing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"metaflow-hf-{name}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone | RoundClosed):
            self._tokens = event.tokens_total
        values = {name: value for name, value in figures(event).items() if math.isfinite(value)}
        if not values:
            return
        with self._changed:
            self._waiting.append(Point(values, self._tokens, event.time))
            if len(self._waiting) > _MOST_WAITING:
                self._waiting.popleft()
                self._given_up += 1
            self._changed.notify()

    def close(self) -> None:
        """Hands over what is left and ends the session, not the run."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_LAST_TRY_SECONDS if self._is_failing else self._close_seconds)
        with self._changed:
            missing = len(self._in_hand) + len(self._waiting) + self._given_up
        if missing:
            _LOG.warning(
                "report.trackers: %s did not record %d points; metrics.jsonl has them.", self._name, missing
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        recorder: Recorder | None = None
        while True:
            is_last = self._is_closing
            try:
                recorder = recorder or self._connect()
                is_last = self._take()
                if not self._in_hand:
                    recorder.close()
                    return
                recorder.record(self._in_hand)
            except Exception as error:  # packages of others raise anything, and training is worth more
                self._warn(error)
                if is_last:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closing, self._retry_seconds)
            else:
                with self._changed:
                    self._in_hand, self._is_failing = [], False

    def _take(self) -> bool:
        """Takes the next points in hand, unless some are; returns whether the tracker is being closed. Without points in
        hand that is all that is left to do.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._in_hand or self._waiting or self._is_closing)
            while self._waiting and len(self._in_hand) < _BATCH:
                self._in_hand.append(self._waiting.popleft())
            return self._is_closing

    def _warn(self, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0]
        level = logging.DEBUG if self._has_failed else logging.WARNING
        _LOG.log(
            level,
            "report.trackers: %s does not answer (%s: %s). Training goes on, metrics.jsonl has every figure; it is tried "
            "again every %g s.",
            self._name,
            type(error).__name__,
            reason,
            self._retry_seconds,
        )
        self._has_failed = self._is_failing = True


def figures(event: Event) -> dict[str, float]:
    """What a tracker records of an event: name -> value; empty for events without figures."""
    match event:
        case StepDone():
            values: dict[str, float] = {"train/loss": event.loss, "train/learning_rate": event.learning_rate}
            if event.seconds > 0:
                values["train/tokens_per_second"] = event.tokens / event.seconds
            if event.memory_bytes:
                values["train/memory_gib"] = event.memory_bytes / 2**30
            return values
        case RoundClosed():
            values = {
                "round/number": event.round,
                "round/contributors": event.contributors,
                "round/waited_seconds": event.waited_seconds,
                "round/seconds": event.seconds,
            }
            return values if event.loss is None else values | {"round/loss": event.loss}
        case Evaluated():
            return {
                f"evaluation/{event.name}/loss": event.loss,
                f"evaluation/{event.name}/perplexity": event.perplexity,
                f"evaluation/{event.name}/bits_per_byte": event.bits_per_byte,
            }
        case _:
            return {}


def open_tracker(
    kind: str,
    *,
    run: str,
    directory: str | Path,
    project: str = "metaflow-hf",
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """A tracker of this kind (``tensorboard``, ``trackio``, ``wandb``, ``mlflow``) for the run of this name.

    The same ``project`` and ``run`` go on with the same run, from any process; several workers of a lineage
    take one run each (``<lineage>-<worker>``). ``directory`` holds what the tracker keeps on disk
    (trackio has its own place, ``TRACKIO_DIR``). Addresses and keys are the tracker's own settings in the
    environment. ``config`` is shown beside the run.

    Raises ``ConfigError`` for another kind, or when its package is not installed; a server that does not answer is no
    error, here or later.
    """
    if kind not in RECORDERS:
        raise ConfigError(
            f"report.trackers: {kind!r} is none of {', '.join(sorted(RECORDERS))}. Use one of them."
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.") or "run"
    return Tracker(kind, RECORDERS[kind](project, name, Path(directory), dict(config or {})))
