"""Handles of the reading processes: start them, send them parts, receive their answers, replace killed ones."""

import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Final, Self, cast

from metaflow_hf.data.manifest import Cursor, DatasetSpec
from metaflow_hf.data.reading_process import BOOT, Answer, Ended, Failed, Ready, Task
from metaflow_hf.data.rows import EncodedRows
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.parts import Part

# A process with less than this to read gets another part, so that it does not wait for the builder between two.
QUEUED_BYTES: Final = 12 * 1024 * 1024
# numpy's threads cost half of the start, and nothing here uses them.
_ENVIRONMENT: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(slots=True, eq=False)
class Reading:
    """A part that is being read, and the answers that the builder has not taken yet."""

    part: Part
    answers: deque[Answer | EncodedRows] = field(default_factory=deque)
    spools: list[Path] = field(default_factory=list)
    # Behind the last batch that was received; None before the first.
    cursor: Cursor | None = None

    @property
    def rest(self) -> Part:
        """The part without the batches that were received."""
        return self.part if self.cursor is None else replace(self.part, begin=self.cursor)

    def add(self, answer: Answer | EncodedRows) -> bool:
        """Keeps an answer; returns whether it is the last one."""
        self.answers.append(answer)
        if isinstance(answer, (Ended, Failed)):
            return True
        batch = answer if isinstance(answer, EncodedRows) else answer.batch
        self.cursor = batch.after(batch.total_consumed)
        return False


class ReadingProcess:
    """One reading process, the connection to it, and the parts that it was sent."""

    def __init__(self, source: FileSource, spec: DatasetSpec) -> None:
        self._job = source, spec
        self.link, theirs = Pipe()
        self.readings: deque[Reading] = deque()
        self._is_ready = False
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-c", BOOT, str(number)]
            self._process = subprocess.Popen(command, pass_fds=[number], env=os.environ | _ENVIRONMENT)
        self._send(sys.path)

    @property
    def has_room(self) -> bool:
        """Whether the process should be sent another part."""
        if len(self.readings) == 1:
            return self.readings[0].part.size_bytes < QUEUED_BYTES
        return self._is_ready and not self.readings

    def begin(self, reading: Reading, spool: Path) -> None:
        """Sends what is left of a part."""
        self.readings.append(reading)
        reading.spools.append(spool)
        self._send(Task(reading.rest, spool))

    def receive(self) -> None:
        """Takes one answer. Raises ``EOFError`` or ``OSError`` when the process is dead."""
        answer: Answer | Ready = self.link.recv()
        if isinstance(answer, Ready):
            self._is_ready = True
            self._send(self._job)
        elif self.readings[0].add(answer):
            self.readings.popleft()

    def end(self) -> None:
        """Ends the process, which owns nothing that could be lost."""
        self.link.close()
        self._process.kill()
        self._process.wait()

    def exit_code(self) -> int:
        """The exit code of a process that has closed its end of the connection."""
        self.link.close()
        return self._process.wait()

    def _send(self, message: object) -> None:
        # The death of a process is noticed when its answer is received.
        with suppress(ConnectionError):
            self.link.send(message)


class ReadingPool:
    """The reading processes of one build."""

    def __init__(self, source: FileSource, spec: DatasetSpec, num_processes: int) -> None:
        self._source, self._spec = source, spec
        self._selector = selectors.DefaultSelector()
        self.processes: list[ReadingProcess] = []
        for _ in range(num_processes):
            self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for process in self.processes:
            process.end()

    def start(self) -> None:
        """Starts one more process."""
        process = ReadingProcess(self._source, self._spec)
        self.processes.append(process)
        self._selector.register(process.link, selectors.EVENT_READ, process)

    def with_room(self) -> ReadingProcess | None:
        """The process that should be sent the next part, if there is one."""
        return min(
            (process for process in self.processes if process.has_room),
            key=lambda process: len(process.readings),
            default=None,
        )

    def receive(self, *, is_urgent: bool) -> Iterator[ReadingProcess]:
        """Takes the answers that have come, one of each process; yields the processes that are dead.

        With ``is_urgent`` it waits until there is one.
        """
        for key, _ in self._selector.select(None if is_urgent else 0):
            process = cast("ReadingProcess", key.data)
            try:
                process.receive()
            except (EOFError, OSError):
                yield process

    def remove(self, process: ReadingProcess) -> int:
        """Forgets a dead process; returns its exit code."""
        self._selector.unregister(process.link)
        self.processes.remove(process)
        return process.exit_code()
