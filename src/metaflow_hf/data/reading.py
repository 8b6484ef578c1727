"""All rows of a source, encoded, in order: read by this process alone, or with several processes at once.

The source is split into parts. Reading processes read and encode parts; so does this process whenever it has nothing
else to do. The parts are taken in order, so the result depends neither on the number of processes nor on their speed:
only the sizes of the batches differ, not the lines and not the cursors behind them.

A killed process is replaced, and what is left of its parts is read by whoever is free. Any other error in a reading
process ends its part early. This process then reads on from there in its turn, and so raises the same error with the
right row number.
"""

import logging
import os
import pickle
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from metaflow_hf.data.manifest import Cursor, DatasetSpec
from metaflow_hf.data.open_block import SPOOL_PREFIX
from metaflow_hf.data.reading_pool import Reading, ReadingPool, ReadingProcess
from metaflow_hf.data.reading_process import Answer, Encoded, Ended, Failed, Spool, encoder_of
from metaflow_hf.data.rows import AfterLine, AfterRow, EncodedRows
from metaflow_hf.data.sources import Source
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.parts import Part, read_part, remaining_work, split
from metaflow_hf.errors import DatasetMismatch, MetaflowHFError

logger = logging.getLogger("metaflow_hf.data")

# Smaller sources (by ``remaining_work``) take no longer than a second process takes to start and be of use.
MIN_BYTES: Final = 64 * 1024 * 1024
# After so many deaths the machine has too little memory for this number of processes.
MAX_DEATHS: Final = 3
# What this process reads ahead of its turn stays in memory up to this size.
BUFFER_BYTES: Final = 16 * 1024 * 1024
# A spool larger than this is removed after its part, not used again.
KEPT_SPOOL_BYTES: Final = 64 * 1024 * 1024


def encoded_batches(
    source: Source, spec: DatasetSpec, cursor: Cursor, *, num_proc: int, directory: Path
) -> Generator[EncodedRows]:
    """All rows from ``cursor`` on, encoded.

    Args:
        source: The rows. Only the files of a ``FileSource`` can be read by other processes.
        spec: The rules of the dataset that the rows are encoded for.
        cursor: The first row to read.
        num_proc: The most processes that read, this one included. Small sources are read by this one alone.
        directory: Where encoded rows are kept that were read ahead of their turn.

    Raises:
        BadRowError: A row cannot be stored, unless the spec skips bad rows.
        MetaflowHFError: Reading processes were killed again and again, or the source raised it.

    """
    plain = _sendable(source) if num_proc > 1 else None
    num_processes = 0 if plain is None else _num_processes(plain, cursor, num_proc)
    if plain is not None and num_processes:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=directory) as name:
            spool = Path(name)
            with (
                ReadingPool(plain, spec, num_processes) as pool,
                closing(_PartsReader(plain, spec, pool, spool)) as reader,
            ):
                yield from reader.batches(cursor)
        return
    encoder = encoder_of(spec)
    with closing(source.batches(cursor)) as batches:
        for batch in batches:
            yield encoder.encode(batch)


def _sendable(source: Source) -> FileSource | None:
    """The source without what only this process can use; ``None`` if other processes cannot read it."""
    if isinstance(source, FileSource):
        plain = FileSource(**{field.name: getattr(source, field.name) for field in fields(FileSource)})
        try:
            pickle.dumps(plain)
        except (TypeError, AttributeError, pickle.PicklingError):
            pass
        else:
            return plain
    logger.warning("%s is read by one process: it is not a list of files.", source.source)
    return None


def _num_processes(source: FileSource, cursor: Cursor, num_proc: int) -> int:
    """How many processes besides this one are worth their start."""
    work = remaining_work(source, cursor)
    if work < MIN_BYTES or len(list(islice(split(source, cursor), 2))) < 2:
        return 0
    return min(num_proc - 1, int(work // (MIN_BYTES / 2)))


class _PartsReader:
    """Hands out the parts of a source and takes the encoded rows in order."""

    def __init__(self, source: FileSource, spec: DatasetSpec, pool: ReadingPool, directory: Path) -> None:
        self._source, self._pool, self._directory = source, pool, directory
        self._encoder = encoder_of(spec)
        self._parts: Iterator[Part] = iter(())
        # All parts that were begun and not yet taken, in order.
        self._begun: deque[Reading] = deque()
        self._max_begun = 2 * len(pool.processes) + 4
        # Those that nobody reads: of killed processes, or just begun.
        self._waiting: deque[Reading] = deque()
        self._own: Reading | None = None
        self._own_answers: Generator[Answer | EncodedRows] | None = None
        # A CSV file that was cut at a wrong place: this process has read it to its end.
        self._abandoned: int | None = None
        self._free_spools: list[Path] = []
        self._num_spools = 0
        self._num_deaths = 0

    def close(self) -> None:
        """Closes the file that this process reads."""
        if self._own_answers is not None:
            self._own_answers.close()

    def batches(self, cursor: Cursor) -> Generator[EncodedRows]:
        """All rows from ``cursor`` on, encoded, in order."""
        self._parts = split(self._source, cursor)
        row = cursor.row
        while (reading := self._head()) is not None:
            if self._abandoned == reading.part.begin.file:
                self._drop(reading)
                continue
            first_row = 0 if reading.part.is_counted else row
            for batch in self._batches_of(reading, first_row):
                yield batch
                row = batch.after(batch.total_consumed).row
            self._begun.popleft()
            self._recycle(reading.spools)

    def _batches_of(self, reading: Reading, first_row: int) -> Iterator[EncodedRows]:
        while True:
            self._work_until_answered(reading)
            answer = reading.answers.popleft()
            if isinstance(answer, Ended):
                return
            if isinstance(answer, Failed):
                yield from self._read_again(reading.rest, first_row)
                return
            yield _numbered(_fetch(answer) if isinstance(answer, Encoded) else answer, first_row)

    def _read_again(self, rest: Part, first_row: int) -> Iterator[EncodedRows]:
        """What is behind an error, which is raised here unless a CSV file was only cut at a wrong place."""
        begin = msgspec.structs.replace(rest.begin, row=rest.begin.row + first_row)
        if rest.csv_start is not None:
            self._abandoned = begin.file
            rest = Part(begin, begin.file)
        with closing(read_part(self._source, replace(rest, begin=begin))) as batches:
            yield from map(self._encoder.encode, batches)

    def _work_until_answered(self, reading: Reading) -> None:
        self._serve_processes(is_urgent=False)
        while not reading.answers:
            has_worked = self._read_here()
            self._serve_processes(is_urgent=not has_worked and not reading.answers)

    def _serve_processes(self, *, is_urgent: bool) -> None:
        """Receives answers, replaces dead processes, and hands out parts."""
        for dead in list(self._pool.receive(is_urgent=is_urgent)):
            self._replace(dead)
        while (process := self._pool.with_room()) is not None:
            reading = self._next()
            if reading is None:
                return
            process.begin(reading, self._new_spool())

    def _next(self) -> Reading | None:
        """A part for whoever is free; ``None`` when there is none, or too many were begun."""
        if not self._waiting and len(self._begun) < self._max_begun:
            self._begin()
        return self._waiting.popleft() if self._waiting else None

    def _head(self) -> Reading | None:
        """The part whose turn it is; ``None`` behind the last one."""
        if not self._begun:
            self._begin()
        return self._begun[0] if self._begun else None

    def _begin(self) -> None:
        part = next(self._parts, None)
        if part is not None:
            self._begun.append(Reading(part))
            self._waiting.append(self._begun[-1])

    def _read_here(self) -> bool:
        """Reads and encodes one batch in this process; returns whether there was one to read."""
        if self._own is None or self._own_answers is None:
            self._own = self._next()
            if self._own is None:
                return False
            self._own_answers = self._answers(self._own)
        if self._own.add(next(self._own_answers)):
            self._own = self._own_answers = None
        return True

    def _answers(self, reading: Reading) -> Generator[Answer | EncodedRows]:
        """The part read by this process; batches ahead of their turn go into a spool when they become too many."""
        ahead, spool = 0, None
        try:
            with closing(read_part(self._source, reading.rest)) as batches:
                for batch in batches:
                    encoded = self._encoder.encode(batch)
                    if reading is self._begun[0]:
                        yield encoded
                        continue
                    ahead += len(encoded.data)
                    if ahead <= BUFFER_BYTES:
                        yield encoded
                        continue
                    if spool is None:
                        spool = Spool(self._new_spool())
                        reading.spools.append(spool.path)
                    at = spool.write(encoded.data)
                    yield Encoded(replace(encoded, data=b""), spool.path, at, len(encoded.data))
        except Exception as error:
            # Raised in its turn: whoever reads on behind the last batch meets the same error.
            logger.debug("%s: %s", reading.part, error)
            yield Failed()
        else:
            yield Ended()
        finally:
            if spool is not None:
                spool.close()

    def _drop(self, reading: Reading) -> None:
        """Leaves a part out. Its spool stays, because a process may still write into it."""
        self._begun.popleft()
        if reading in self._waiting:
            self._waiting.remove(reading)
        if reading is self._own and self._own_answers is not None:
            self._own_answers.close()
            self._own = self._own_answers = None

    def _replace(self, dead: ReadingProcess) -> None:
        self._num_deaths += 1
        code = self._pool.remove(dead)
        if self._num_deaths >= MAX_DEATHS:
            raise MetaflowHFError(
                f"{self._num_deaths} processes that read {self._source.source} ended early, the last one with exit "
                f"code {code}; a machine without free memory ends processes with -9. Build again with a smaller "
                "num_proc: committed blocks stay."
            )
        logger.warning(
            "a process that reads %s ended with exit code %d; another one replaces it",
            self._source.source,
            code,
        )
        self._waiting.extend(dead.readings)
        self._pool.start()

    def _new_spool(self) -> Path:
        if self._free_spools:
            return self._free_spools.pop()
        self._num_spools += 1
        return self._directory / f"{self._num_spools}"

    def _recycle(self, spools: list[Path]) -> None:
        """Overwriting a file is faster than writing a new one: its pages are in memory already."""
        for spool in spools:
            if not spool.exists():
                continue
            if spool.stat().st_size > KEPT_SPOOL_BYTES:
                spool.unlink()
            else:
                self._free_spools.append(spool)


def _fetch(answer: Encoded) -> EncodedRows:
    with answer.path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), answer.size, answer.offset)
    if len(data) != answer.size:
        raise DatasetMismatch(f"{answer.path} became shorter while it was read. Build again.")
    return replace(answer.batch, data=data)


def _numbered(batch: EncodedRows, first_row: int) -> EncodedRows:
    after = batch.after
    if not first_row or not isinstance(after, (AfterLine, AfterRow)):
        return batch
    return replace(batch, after=replace(after, row=after.row + first_row))
