"""The page of a run while it goes on: drawn again every few seconds from what has happened so far."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from metaflow_hf.errors import StoreError
from metaflow_hf.events import Event, StepDone
from metaflow_hf.report.card import training_page
from metaflow_hf.report.metrics import merge_events
from metaflow_hf.report.outcome import Plan
from metaflow_hf.report.page import Page

logger = logging.getLogger("metaflow_hf.report")

MAX_STEPS = 20_000
# Long runs are drawn less often: nobody sees the difference, and drawing reads what all workers did.
_PART_OF_RUN = 1 / 100


class LivePage:
    """Draws the page of a run from the events that it hears and those of ``others``; an ``OnEvent``.

    Drawn at the first chance, then at least ``interval_seconds`` (and a hundredth of the run so far) later, and by
    ``close``. Memory is bounded: of long runs neighbouring steps are joined. Where the store cannot be read the others
    are left out of that drawing, with a warning.
    """

    def __init__(
        self,
        draw: Callable[[Page], None],
        plan: Plan,
        *,
        others: Callable[[str], Iterable[Iterable[Event]]] = lambda _: (),
        interval_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._draw = draw
        self._plan = plan
        self._others = others
        self._interval = interval_seconds
        self._clock = clock
        self._began = clock()
        self._drawn = float("-inf")
        self._events: list[Event] = []
        self._steps = 0
        self._worker = ""

    def __call__(self, event: Event) -> None:
        self._events.append(event)
        self._worker = self._worker or event.worker
        self._steps += isinstance(event, StepDone)
        if self._steps > MAX_STEPS:
            self._events = joined_steps(self._events)
            self._steps = sum(isinstance(event, StepDone) for event in self._events)
        now = self._clock()
        pause = max(self._interval, (now - self._began) * _PART_OF_RUN)
        if isinstance(event, StepDone) and now - self._drawn >= pause:
            self.draw()

    def draw(self) -> None:
        """Draws now."""
        self._drawn = self._clock()
        try:
            others = [list(events) for events in self._others(self._worker)]
        except StoreError as error:
            logger.warning("the page shows this worker alone: %s", error)
            others = []
        self._draw(training_page(self._plan, merge_events(self._events, *others)))

    def close(self) -> None:
        """Draws what there is, unless there is nothing."""
        if self._events:
            self.draw()


def joined_steps(events: Iterable[Event]) -> list[Event]:
    """The events with each two neighbouring steps of a worker as one: tokens and seconds add up, the loss is their mean
    by tokens, everything else is of the later one.
    """
    found: list[Event] = []
    waiting: dict[str, StepDone] = {}
    for event in events:
        if not isinstance(event, StepDone):
            found.append(event)
            continue
        first = waiting.pop(event.worker, None)
        if first is None:
            waiting[event.worker] = event
            continue
        tokens = first.tokens + event.tokens
        joined = replace(
            event,
            tokens=tokens,
            seconds=first.seconds + event.seconds,
            loss=(first.loss * first.tokens + event.loss * event.tokens) / max(tokens, 1),
            memory_bytes=max(first.memory_bytes, event.memory_bytes),
        )
        found.append(joined)
    return [*found, *waiting.values()]
