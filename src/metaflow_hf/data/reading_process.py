"""A process that reads and encodes parts of a source for the process that builds; see ``reading``.

The process writes the encoded lines into a file (the spool) and sends where they are. Lines of a local JSON Lines
file that are stored unchanged are not copied: what is sent is their place in the source file.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Self

from metaflow_hf.data.encoding import RowEncoder
from metaflow_hf.data.manifest import DatasetSpec
from metaflow_hf.data.merging import is_continued, merge
from metaflow_hf.data.rows import AfterLine, EncodedRows, InputLines, InputRows
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.local import LocalFile
from metaflow_hf.data.sources.parts import Part, by_file, is_plain_copy, read_part

logger = logging.getLogger("metaflow_hf.data")

# The interpreter runs this instead of the user's script, which is therefore not imported a second time.
BOOT: Final = (
    "import sys; from multiprocessing.connection import Connection; link = Connection(int(sys.argv[1])); "
    "sys.path[:] = link.recv(); from metaflow_hf.data.reading_process import serve; serve(link)"
)
# Batches are merged to about this size. Each answer costs both processes some 0.1 ms, whatever its size.
ANSWER_BYTES: Final = 1024 * 1024


class Ready:
    """The process has imported everything and waits for the source and its first task."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch without its lines, which are the ``size`` bytes of ``path`` from ``offset`` on."""

    batch: EncodedRows
    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Task:
    """One part to read, and the file for its lines."""

    part: Part
    spool: Path


class Ended:
    """The part is read to its end."""


class Failed:
    """Reading or encoding raised an error behind the last batch. The builder reads on from there and raises it."""


Answer = Encoded | Ended | Failed


def encoder_of(spec: DatasetSpec) -> RowEncoder:
    """The encoder for the rows of a dataset."""
    return RowEncoder(
        spec.text_column or "text",
        form=spec.detected,
        ascii_only=spec.ascii_only,
        on_bad_row=spec.on_bad_row,
        keep_columns=spec.keep_columns,
    )


def serve(link: Connection) -> None:
    """Receives the source and its spec, then answers tasks until the other end is closed."""
    # The builder handles an interruption, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # The builder sends the source, which may be large, when it does not have to wait for this process.
        link.send(Ready())
        source, spec = link.recv()
        encoder = encoder_of(spec)
        while True:
            task: Task = link.recv()
            with Spool(task.spool) as spool:
                for answer in _answers(source, encoder, task.part, spool):
                    link.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The builder closed the connection.
        return


class Spool:
    """A file for encoded lines, written from its beginning; what it held before is overwritten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, which stays."""
        os.close(self._file)

    def write(self, data: bytes | bytearray) -> int:
        """Returns the offset of the data."""
        begin = self.offset
        view = memoryview(data)
        while view:
            written = os.write(self._file, view)
            view = view[written:]
            self.offset += written
        return begin


def _answers(source: FileSource, encoder: RowEncoder, part: Part, spool: Spool) -> Iterator[Answer]:
    end: Answer = Ended()
    pending: list[Encoded] = []
    try:
        # Rows of one file are sent before the next file is opened, which may take its time.
        for of_file in by_file(part):
            with closing(read_part(source, of_file)) as batches:
                for batch in batches:
                    encoded = _placed(source, batch, encoder.encode(batch), spool)
                    if pending and not _is_continued(pending[-1], encoded):
                        yield _merged(pending)
                    pending.append(encoded)
                    if encoded.offset + encoded.size - pending[0].offset >= ANSWER_BYTES:
                        yield _merged(pending)
            if pending:
                yield _merged(pending)
    except Exception as error:
        # The builder raises it, behind the rows that come before it.
        logger.debug("%s: %s", part, error)
        end = Failed()
    if pending:
        yield _merged(pending)
    yield end


def _is_continued(last: Encoded, following: Encoded) -> bool:
    is_adjacent = (following.path, following.offset) == (last.path, last.offset + last.size)
    return is_adjacent and is_continued(last.batch, following.batch)


def _merged(pending: list[Encoded]) -> Encoded:
    """All of ``pending``, which is empty afterwards, as one answer."""
    size = sum(answer.size for answer in pending)
    merged = replace(pending[0], batch=merge([answer.batch for answer in pending], b""), size=size)
    pending.clear()
    return merged


def _placed(source: FileSource, batch: InputRows | InputLines, encoded: EncodedRows, spool: Spool) -> Encoded:
    data, bare = encoded.data, replace(encoded, data=b"")
    if isinstance(batch, InputLines) and data is batch.data and isinstance(batch.after, AfterLine):
        file = source.files[batch.after.file]
        offset = batch.after.offset
        if isinstance(file, LocalFile) and is_plain_copy(file) and offset + len(data) <= file.size:
            return Encoded(bare, file.path, offset, len(data))
    return Encoded(bare, spool.path, spool.write(data), len(data))
