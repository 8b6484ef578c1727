"""Why a worker has to end before its lineage is final, and for how long it still may work.

    SIGTERM                 whoever runs the process sets the event
    a spot notice           Metaflow watches for it beside tasks of `@kubernetes` and `@batch`, and writes it to the file
                            ``current.spot_termination_notice``; the signal that it sends as well ends its own watcher
                            only, so the file is what counts
    a dead parent           SIGKILL of the runtime leaves its tasks running

What is finished by then is published, so these cost the claim in hand at most.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metaflow_hf.train.closing import StopRequested


class GraceOver(StopRequested):
    """The time for the claim in hand is over; it is raised out of the middle of a step."""


class StopReasons:
    """Calling it tells why to stop, in words, or ``None``; the parent is that of the moment of creation."""

    def __init__(
        self,
        stop: threading.Event,
        *,
        grace: float,
        notice: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop = stop
        self._grace = grace
        self._notice = notice
        self._clock = clock
        self._parent = os.getppid()
        self._since: float | None = None

    def __call__(self) -> str | None:
        if self._stop.is_set():
            return "it was told to stop"
        if self._notice is not None and self._notice.exists():
            return f"this machine is about to be taken away (the notice is in {self._notice})"
        return "its parent process is gone" if os.getppid() != self._parent else None

    def raise_when_over(self) -> None:
        """Raises ``GraceOver`` when the reason to stop is older than the grace time; cheap enough to be asked often."""
        reason = self()
        if reason is None:
            return
        self._since = self._clock() if self._since is None else self._since
        if self._clock() - self._since >= self._grace:
            raise GraceOver(f"the claim in hand was given up after {self._grace:g} s: {reason}.")


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, for as long as the block lasts; the handler before is put back."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
