"""What every attempt did, kept in the store: a process that is killed takes its ``metrics.jsonl`` with it.

Part of no correctness, and bounded: pieces become rarer as the run grows longer, so that a worker writes a few
hundred of them at most, and a killed one takes little more than a fiftieth of its events with it.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from metaflow_hf.errors import NotFound, StoreUnavailable
from metaflow_hf.events import DeltaPublished, Event, RoundClosed, to_json
from metaflow_hf.report import parse_events
from metaflow_hf.store.objects import ObjectStore

logger = logging.getLogger("metaflow_hf.train")

_FOLDER: Final = "metrics"
_PIECES_PER_RUN: Final = 50


class StoredMetrics:
    """Keeps the events of one attempt as ``metrics/<attempt>/<n>.jsonl``; an ``OnEvent``.

    A piece is written when a contribution was published or a round closed, at least ``interval`` seconds and a fiftieth
    of the time so far after the one before, and by ``close``. What the store does not take now is tried with the next.
    """

    def __init__(
        self,
        store: ObjectStore,
        attempt: str,
        *,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._interval = interval
        self._clock = clock
        self._began = clock()
        self._written = float("-inf")
        self._lines: list[str] = []
        self._pieces = 0

    def __call__(self, event: Event) -> None:
        self._lines.append(json.dumps(to_json(event), separators=(",", ":")) + "\n")
        now = self._clock()
        pause = max(self._interval, (now - self._began) / _PIECES_PER_RUN)
        if isinstance(event, (DeltaPublished, RoundClosed)) and now - self._written >= pause:
            self._write()

    def close(self) -> None:
        """Writes what is left. Idempotent."""
        if self._lines:
            self._write()

    def _write(self) -> None:
        self._written = self._clock()
        key = f"{_FOLDER}/{self._attempt}/{self._pieces:06d}.jsonl"
        try:
            self._store.put(key, "".join(self._lines).encode())
        except StoreUnavailable as error:
            logger.warning("the metrics %s could not be stored: %s", key, error)
            return
        self._pieces += 1
        self._lines.clear()


class OtherWorkers:
    """The events of everybody else at a lineage, as far as they are stored; each piece is read once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._read: dict[str, list[Event]] = {}

    def __call__(self, attempt: str) -> list[list[Event]]:
        """Of all but ``attempt``, one list a worker, in the order of writing. Raises ``StoreUnavailable``."""
        found: defaultdict[str, list[Event]] = defaultdict(list)
        for info in self._store.list(_FOLDER):
            worker = info.key.split("/")[1]
            if worker == attempt:
                continue
            if info.key not in self._read:
                try:
                    content = self._store.get(info.key).decode()
                except NotFound:
                    continue  # collected just now
                self._read[info.key] = parse_events(content)
            found[worker] += self._read[info.key]
        return list(found.values())


def stored_metrics(store: ObjectStore) -> dict[str, str]:
    """Attempt -> its events as JSON lines, of everybody who ever worked on the lineage at ``store``."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for info in store.list(_FOLDER):
        try:
            found[info.key.split("/")[1]].append(store.get(info.key).decode())
        except NotFound:
            continue  # collected just now
    return {attempt: "".join(pieces) for attempt, pieces in found.items()}
