"""Who is still at work: a counter that moves only while work progresses, and whoever waits watches it.

A worker notes its progress (a step, a file sent, a tensor merged); what does not progress does not beat, so a
process that hangs is given up like one that died. The heartbeat says how long its owner may stay silent; an
observer decides by two reads of its own on its own clock, never by comparing clocks. A process that is gone
from the observer's own machine needs no waiting, nor does one whose task is tried again.

All of it decides only how long others wait. A worker that was given up in error loses its work of one round,
and nothing else can happen.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from metaflow_hf.errors import NotFound, StoreUnavailable
from metaflow_hf.store.leases import Observer
from metaflow_hf.store.objects import ObjectStore
from metaflow_hf.train.records import Record, decode

logger = logging.getLogger("metaflow_hf.train")

SLOWEST_TRANSFER: Final = (
    2_000_000  # bytes per second that a file may take at worst before its worker is given up
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may make no progress, in seconds.

    At least ``minimum``, ``factor`` times the slowest progress it made so far, and ``first_step`` until its first
    step is done (kernels compile, caches fill). Beats are ``interval`` apart.
    """

    minimum: float = 60.0
    first_step: float = 900.0
    factor: float = 5.0
    interval: float = 2.0


class Beat(Record, frozen=True, kw_only=True):
    """One beat as it is stored: its owner may be silent for ``allowance_seconds`` from when it is first seen."""

    attempt: str
    beats: int
    allowance_seconds: float
    process: dict[str, Any] | None
    task: str | None = None


class Heartbeat:
    """The heartbeat of one attempt, written in passing by whoever reports progress."""

    def __init__(
        self,
        store: ObjectStore,
        attempt: str,
        *,
        patience: Patience,
        process: dict[str, Any] | None,
        task: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._patience = patience
        self._process = process
        self._task = task
        self._clock = clock
        self._beats = 0
        self._slowest = 0.0
        self._warm = False
        self._last_progress: float | None = None
        self._last_write = float("-inf")

    def begin(self) -> None:
        """The first beat, before the first claim: without it the claim would look abandoned.

        Raises ``StoreUnavailable``.
        """
        self._last_progress = self._last_write = self._clock()
        self._store.put(self._key, self._beat(self.allowance))

    def progress(self, *, step: bool = False) -> None:
        """Something was done (``step``: an optimiser step); written at most once per interval."""
        now = self._clock()
        if step and self._warm and self._last_progress is not None:
            self._slowest = max(self._slowest, now - self._last_progress)
        became_warm = step and not self._warm
        self._warm = self._warm or step
        self._last_progress = now
        if became_warm or now - self._last_write >= self._patience.interval:
            self._write(self.allowance)

    def expect(self, *, num_bytes: int) -> None:
        """A transfer begins, during which nothing can be reported: asks for the time that it may take."""
        self._write(self.allowance + num_bytes / SLOWEST_TRANSFER)

    @property
    def allowance(self) -> float:
        """Seconds for which this worker may now be silent."""
        if not self._warm:
            return max(self._patience.first_step, self._patience.minimum)
        return max(self._patience.minimum, self._patience.factor * self._slowest)

    def leave(self) -> None:
        """Removes the heartbeat of a worker that leaves in order."""
        try:
            self._store.delete(self._key)
        except StoreUnavailable as error:
            logger.warning("the heartbeat %s could not be removed: %s", self._key, error)

    @property
    def _key(self) -> str:
        return f"heartbeats/{self._attempt}"

    def _beat(self, allowance: float) -> bytes:
        self._beats += 1
        beat = Beat(
            attempt=self._attempt,
            beats=self._beats,
            allowance_seconds=round(allowance, 3),
            process=self._process,
            task=self._task,
        )
        return beat.encode()

    def _write(self, allowance: float) -> None:
        self._last_write = self._clock()
        try:
            self._store.put(self._key, self._beat(allowance))
        except StoreUnavailable as error:
            # The work goes on; at worst others do it as well.
            logger.warning("the heartbeat %s could not be written: %s", self._key, error)


def give_up_earlier_attempts(store: ObjectStore, task: str) -> None:
    """Takes the heartbeats of other attempts of ``task`` away, so that nobody waits for them.

    For a retry: a scheduler starts one when the attempt before has ended, on whichever machine that was. Should it be
    at work nevertheless, it loses its work of one round.
    """
    for info in store.list("heartbeats"):
        try:
            beat = decode(Beat, store.get(info.key), where=f"{store.uri}/{info.key}")
        except NotFound:
            continue  # it has just left
        if beat.task == task:
            store.delete(info.key)
            logger.info(f"nobody waits for {beat.attempt} any longer: {task} is tried again")


class Watch:
    """Decides which other workers are alive, by what this process has seen of their heartbeats."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        clock: Callable[[], float] = time.monotonic,
        is_gone: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self._store = store
        self._observer = Observer(clock=clock)
        self._is_gone = is_gone or process_is_gone
        self._first: dict[str, bytes | None] = {}

    def expired(self, attempt: str, *, factor: float = 1.0) -> bool:
        """Whether ``attempt`` left, showed no progress for ``factor`` times its allowance, or its process is gone."""
        content = self._read(attempt)
        still = self._observer.still_for(attempt, content)
        if content is None:
            # Every claim comes after a first beat, so its owner has left.
            return True
        beat = decode(Beat, content, where=f"{self._store.uri}/heartbeats/{attempt}")
        if beat.process is not None and self._is_gone(beat.process):
            return True
        return still >= beat.allowance_seconds * factor

    def moves(self, attempt: str) -> bool:
        """Whether this process has seen the heartbeat of ``attempt`` change."""
        return self._read(attempt) != self._first[attempt]

    def _read(self, attempt: str) -> bytes | None:
        try:
            content = self._store.get(f"heartbeats/{attempt}")
        except NotFound:
            content = None
        self._first.setdefault(attempt, content)
        return content


def this_process() -> dict[str, Any] | None:
    """What identifies this process among all that ever ran on all machines, or ``None`` off Linux."""
    try:
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(),
            "namespace": str(Path("/proc/self/ns/pid").readlink()),
            "pid": os.getpid(),
            "started": _state_and_start(os.getpid())[1],
        }
    except OSError:
        return None


def process_is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process of this very machine and process namespace has ended; false for what cannot be known."""
    here = this_process()
    if here is None or any(process.get(name) != here[name] for name in ("boot", "namespace")):
        return False
    try:
        state, started = _state_and_start(int(process["pid"]))
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state in "ZX" or started != process["started"]


def _state_and_start(pid: int) -> tuple[str, str]:
    # The name, in parentheses, may hold anything; what follows it is fixed.
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return fields[0], fields[19]
