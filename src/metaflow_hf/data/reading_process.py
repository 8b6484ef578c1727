"""A process that reads and encodes parts of a source for another one; see ``reading``.

The encoded lines go into a file of the directory that both know; what is sent over the connection is where they
lie. Where the lines are those of the source file itself, that is where they lie.
"""

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO, Final

from metaflow_hf.data.encoding import RowEncoder
from metaflow_hf.data.manifest import DatasetSpec
from metaflow_hf.data.rows import AfterLine, EncodedRows, InputLines, InputRows
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.local import LocalFile
from metaflow_hf.data.sources.parts import Part, is_plain_copy, read_part

logger = logging.getLogger("metaflow_hf.data")

# Run by the interpreter itself, so that a user's script is not imported a second time.
BOOT: Final = (
    "import sys; from multiprocessing.connection import Connection; link = Connection(int(sys.argv[1])); "
    "sys.path[:] = link.recv(); from metaflow_hf.data.reading_process import serve; serve(link)"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch without its bytes, which are the ``size`` bytes of ``path`` from ``offset`` on."""

    batch: EncodedRows
    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Task:
    """One part to read, and where the lines go."""

    part: Part
    spool: Path


class Ended:
    """The part is read to its end."""


class Failed:
    """Something is wrong behind the last batch; whoever reads on from there finds out what."""


Answer = Encoded | Ended | Failed


def encoder_of(spec: DatasetSpec) -> RowEncoder:
    """What turns the rows of this dataset into lines."""
    return RowEncoder(
        spec.text_column or "text",
        ascii_only=spec.ascii_only,
        on_bad_row=spec.on_bad_row,
        keep_columns=spec.keep_columns,
    )


def serve(link: Connection) -> None:
    """Answers tasks until the other end is closed."""
    # An interruption is for the process that waits for the answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        source, spec = link.recv()
        encoder = encoder_of(spec)
        while True:
            task: Task = link.recv()
            with task.spool.open("wb", buffering=0) as spool:
                for answer in _answers(source, encoder, task.part, spool):
                    link.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answers(source: FileSource, encoder: RowEncoder, part: Part, spool: BinaryIO) -> Iterator[Answer]:
    try:
        for batch in read_part(source, part):
            yield _stored(source, batch, encoder.encode(batch), spool)
    except Exception as error:
        # It is raised where it belongs: by the process that builds, behind the rows that come before it.
        logger.debug("%s: %s", part, error)
        yield Failed()
    else:
        yield Ended()


def _stored(
    source: FileSource, batch: InputRows | InputLines, encoded: EncodedRows, spool: BinaryIO
) -> Encoded:
    data, size, bare = encoded.data, len(encoded.data), replace(encoded, data=b"")
    if isinstance(batch, InputLines) and data is batch.data and isinstance(batch.after, AfterLine):
        file = source.files[batch.after.file]
        offset = batch.after.offset
        if isinstance(file, LocalFile) and is_plain_copy(file) and offset + size <= file.size:
            return Encoded(bare, file.path, offset, size)
    offset = spool.tell()
    view = memoryview(data)
    while view:
        view = view[spool.write(view) :]
    return Encoded(bare, Path(spool.name), offset, size)
