"""The rows of a source, encoded, in order: by this process alone, or with several that read parts of it at once.

The result does not depend on how many there are: the parts are taken over in order, so which rows make a batch
changes, but neither the lines nor the cursors behind them. A process that is killed is replaced, and its part goes
on behind the last batch that came of it; whatever else goes wrong in one is left to this process, which reads on
from there itself and so meets the same error, with the right row number, in its turn.
"""

import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Final, Self, cast

import msgspec

from metaflow_hf.data.manifest import Cursor, DatasetSpec
from metaflow_hf.data.open_block import SPOOL_PREFIX
from metaflow_hf.data.reading_process import BOOT, Answer, Encoded, Ended, Task, encoder_of
from metaflow_hf.data.rows import AfterLine, EncodedRows
from metaflow_hf.data.sources import Source
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.parts import Part, read_part, split
from metaflow_hf.errors import DatasetMismatch, MetaflowHFError

logger = logging.getLogger("metaflow_hf.data")

# A machine that kills this many has too little memory for as many processes.
MAX_DEATHS: Final = 3


def encoded_batches(
    source: Source, spec: DatasetSpec, cursor: Cursor, *, num_proc: int, directory: Path
) -> Generator[EncodedRows]:
    """All rows from ``cursor`` on, encoded. Raises what the source raises, and ``BadRowError``.

    Up to ``num_proc`` further processes read and encode; ``directory`` is for what they are ahead.
    """
    plain = _plain(source) if num_proc > 1 else None
    if plain is not None:
        directory.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=directory) as spool,
            _Readers(plain, spec, num_proc, Path(spool)) as readers,
        ):
            yield from readers.batches(cursor)
        return
    if num_proc > 1:
        logger.warning(
            "%s is read by one process: it is no list of files that others can open.", source.source
        )
    encoder = encoder_of(spec)
    with closing(source.batches(cursor)) as batches:
        for batch in batches:
            yield encoder.encode(batch)


def _plain(source: Source) -> FileSource | None:
    """The files of a source, without what else this process does with it; ``None`` if they cannot be sent."""
    if not isinstance(source, FileSource):
        return None
    plain = FileSource(name=source.name, source=source.source, files=source.files, documents=source.documents)
    try:
        pickle.dumps(plain)
    except (TypeError, AttributeError, pickle.PicklingError):
        return None
    return plain


@dataclass(slots=True)
class _Reading:
    """One part on its way: what came of it and was not yet taken over."""

    part: Part
    answers: deque[Answer] = field(default_factory=deque)
    spools: list[Path] = field(default_factory=list)
    # Behind the last batch that came; None before the first.
    cursor: Cursor | None = None

    @property
    def rest(self) -> Part:
        """What is not yet read of the part."""
        return self.part if self.cursor is None else replace(self.part, begin=self.cursor)


class _Process:
    """One reading process and the connection to it."""

    def __init__(self, source: FileSource, spec: DatasetSpec) -> None:
        self.link, theirs = Pipe()
        self.reading: _Reading | None = None
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen([sys.executable, "-c", BOOT, str(number)], pass_fds=[number])
        self._send(sys.path)
        self._send((source, spec))

    def begin(self, reading: _Reading, spool: Path) -> None:
        """Sends what is left of a part."""
        self.reading = reading
        reading.spools.append(spool)
        self._send(Task(reading.rest, spool))

    def end(self) -> None:
        """Ends the process, which has nothing of its own to lose."""
        self.link.close()
        self._process.kill()
        self._process.wait()

    def exit_code(self) -> int:
        """That of a process which has closed its end of the connection."""
        self.link.close()
        return self._process.wait()

    def _send(self, message: object) -> None:
        # That a process is dead is noticed when its answer is waited for.
        with suppress(ConnectionError):
            self.link.send(message)


class _Readers:
    """The processes, and the parts that they work on, in order."""

    def __init__(self, source: FileSource, spec: DatasetSpec, num_proc: int, directory: Path) -> None:
        self._source = source
        self._spec = spec
        self._num_proc = num_proc
        self._directory = directory
        self._processes: list[_Process] = []
        self._ahead: deque[_Reading] = deque()
        self._num_spools = 0
        self._deaths = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    def batches(self, cursor: Cursor) -> Generator[EncodedRows]:
        """All rows from ``cursor`` on, encoded, in order."""
        parts = split(self._source, cursor)
        row = cursor.row
        self._hand_out(parts)
        while self._ahead:
            reading = self._ahead[0]
            first_row = 0 if reading.part.is_counted else row
            for batch in self._batches_of(reading, first_row):
                yield batch
                row = batch.after(batch.total_consumed).row
            self._ahead.popleft()
            for spool in reading.spools:
                spool.unlink(missing_ok=True)
            self._hand_out(parts)

    def _batches_of(self, reading: _Reading, first_row: int) -> Iterator[EncodedRows]:
        while True:
            self._receive(is_urgent=not reading.answers)
            if not reading.answers:
                continue
            answer = reading.answers.popleft()
            if isinstance(answer, Ended):
                return
            if isinstance(answer, Encoded):
                yield _numbered(_fetch(answer), first_row)
                continue
            rest = reading.rest
            begin = msgspec.structs.replace(rest.begin, row=rest.begin.row + first_row)
            encoder = encoder_of(self._spec)
            yield from map(encoder.encode, read_part(self._source, replace(rest, begin=begin)))
            return

    def _hand_out(self, parts: Iterator[Part]) -> None:
        """Gives parts to idle processes, as long as not too many wait to be taken over."""
        while len(self._ahead) < 2 * self._num_proc:
            process = next((process for process in self._processes if process.reading is None), None)
            if process is None and len(self._processes) == self._num_proc:
                return
            part = next(parts, None)
            if part is None:
                return
            if process is None:
                process = _Process(self._source, self._spec)
                self._processes.append(process)
            self._ahead.append(_Reading(part))
            process.begin(self._ahead[-1], self._new_spool())

    def _receive(self, *, is_urgent: bool) -> None:
        """Takes what has come, one answer of each process; if ``is_urgent``, waits for some."""
        busy = {process.link: process for process in self._processes if process.reading is not None}
        for link in wait(list(busy), timeout=None if is_urgent else 0):
            process = busy[cast("Connection", link)]
            reading = process.reading
            assert reading is not None
            try:
                answer: Answer = process.link.recv()
            except (EOFError, OSError):
                self._replace(process, reading)
                continue
            reading.answers.append(answer)
            if isinstance(answer, Encoded):
                reading.cursor = answer.batch.after(answer.batch.total_consumed)
            else:
                process.reading = None

    def _replace(self, dead: _Process, reading: _Reading) -> None:
        self._deaths += 1
        code, name = dead.exit_code(), self._source.files[reading.part.begin.file].name
        self._processes.remove(dead)
        if self._deaths >= MAX_DEATHS:
            raise MetaflowHFError(
                f"{self._deaths} processes that read {self._source.source} ended with exit code {code}, the last one in "
                f"{name}; -9 is what a machine does that runs out of memory. Build again with a smaller num_proc: what "
                "is committed stays."
            )
        logger.warning("a process that read %s ended with exit code %d; another goes on", name, code)
        successor = _Process(self._source, self._spec)
        self._processes.append(successor)
        successor.begin(reading, self._new_spool())

    def _new_spool(self) -> Path:
        self._num_spools += 1
        return self._directory / f"{self._num_spools}"


def _fetch(answer: Encoded) -> EncodedRows:
    with answer.path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), answer.size, answer.offset)
    if len(data) != answer.size:
        raise DatasetMismatch(f"{answer.path} became shorter while it was read: build again.")
    return replace(answer.batch, data=data)


def _numbered(batch: EncodedRows, first_row: int) -> EncodedRows:
    after = batch.after
    if not first_row or not isinstance(after, AfterLine):
        return batch
    return replace(batch, after=replace(after, row=after.row + first_row))
