"""``metrics.jsonl``: every event of a run, one JSON object a line, kept whatever else listens.

A line is written whole and flushed before the call returns, so a killed process loses at most the line that it
was writing; readers ignore a last line without its line end. Numbers that JSON lacks are written as Python
does (``NaN``, ``Infinity``).
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from metaflow_hf.errors import IntegrityError
from metaflow_hf.events import Event, from_json, to_json


class MetricsFile:
    """Appends events to one file; an ``OnEvent``, and safe to call from several threads.

    The file has one writing process. Opening cuts off the torn line that a killed writer left, and goes on
    after it; parents are created. Use as a context manager, or call ``close``. Raises ``OSError`` as the file
    system does (disk full, no permission).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = self.path.open("ab")
        os.truncate(self.path, _whole_lines_bytes(self.path))

    def __call__(self, event: Event) -> None:
        line = json.dumps(to_json(event), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def events(self) -> list[Event]:
        """What the file holds so far, in the order of writing."""
        return read_events(self.path)

    def close(self) -> None:
        """Closes the file; calling it twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole_lines_bytes(path: Path) -> int:
    """How long the file is up to its last line end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def read_events(path: str | Path) -> list[Event]:
    """The events of one file, in the order of writing; a torn last line is ignored.

    Raises ``FileNotFoundError`` when there is no file, ``IntegrityError`` naming the line for one that is
    damaged or that a newer version wrote.
    """
    return list(_parsed(Path(path).read_bytes(), str(path)))


def parse_events(text: str) -> list[Event]:
    """The events of a file's text, for those who kept it as an artifact."""
    return list(_parsed(text.encode(), "the metrics"))


def _parsed(data: bytes, name: str) -> Iterator[Event]:
    *lines, _torn = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"line {number} of {name} is not an event of this version of metaflow-hf ({error!r}): the file "
                "was changed, or a newer version wrote it. Remove the line, or upgrade."
            ) from error


def merge_events(*sources: Iterable[Event]) -> list[Event]:
    """The events of several workers in the order of time; those of one worker never change their order.

    Workers' clocks may differ, and one may be set back: a worker's events count as no earlier than the ones
    that it wrote before.
    """
    timed: list[tuple[float, Event]] = []
    for source in sources:
        latest = float("-inf")
        for event in source:
            latest = max(latest, event.time)
            timed.append((latest, event))
    timed.sort(key=lambda pair: pair[0])
    return [event for _, event in timed]
