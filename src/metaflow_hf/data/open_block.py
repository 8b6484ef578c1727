"""The block that is being written: a local file, its hash, and its sparse index.

Hashing and writing go on in two threads while the next rows are read and checked.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, TypeVar, cast
from urllib.parse import unquote, urlsplit

import xxhash
import zstandard

from metaflow_hf.data.index import SEGMENT_ROWS, IndexBuilder
from metaflow_hf.data.manifest import Compression
from metaflow_hf.data.rows import Ends
from metaflow_hf.environment import node_cache_root
from metaflow_hf.errors import StoreUnavailable
from metaflow_hf.store import Digest, ObjectStore
from metaflow_hf.store.objects import new_nonce

SPOOL_PREFIX: Final = ".reading-"
# How many pieces of work may wait for the threads: enough to keep them busy, little in memory.
MAX_WAITING: Final = 4

_Work = TypeVar("_Work")


class OpenBlock:
    """Takes lines until it is closed. Raises ``StoreUnavailable`` when its file cannot be written, if need be later.

    ``hashing`` and ``writing`` are executors of one thread each. A thread that comes out of a system call waits for
    the interpreter's lock, up to 5 ms if another one computes: batches should be of a megabyte, not less.
    """

    def __init__(
        self,
        store: ObjectStore,
        block_id: int,
        compression: Compression | None,
        *,
        hashing: Executor,
        writing: Executor,
    ) -> None:
        self.block_id = block_id
        self.rows = 0
        self.num_bytes = 0
        self._hashing, self._writing = hashing, writing
        self._waiting: deque[Future[None]] = deque()
        # A name of its own: a writer that was stopped and goes on must not take another's file for its block.
        self.path = scratch_directory(store) / f".block_{block_id:05d}.{new_nonce()[:12]}.open"
        self._file: BinaryIO | None = None
        self._index = IndexBuilder()
        self._sha = hashlib.sha256()
        self._compress = zstandard.ZstdCompressor(level=3).compress if compression else None
        # The segment that is not full yet: its rows, and its bytes (compressed blocks) or their size and checksum.
        self._segment_rows = 0
        self._segment_size = 0
        self._segment_checksum = xxhash.xxh3_64()
        self._segment: list[memoryview] = []

    def append(self, data: bytes | bytearray, ends: Ends, start: int, stop: int) -> None:
        """The lines ``[start, stop)`` of ``data``; line ``i`` ends at ``ends[i]``."""
        view, first = memoryview(data), int(ends[start - 1]) if start else 0
        parts, row, begin = [], start, first
        while row < stop:
            taken = min(SEGMENT_ROWS - self.rows % SEGMENT_ROWS, stop - row)
            row, end = row + taken, int(ends[row + taken - 1])
            parts.append((view[begin:end], taken))
            self.rows += taken
            begin = end
        self.num_bytes += begin - first
        if self._compress is not None:
            self._submit(self._hashing, self._take_compressed, parts)
            return
        for part, rows in parts:
            self._segment_size += len(part)
            self._segment_checksum.update(part)
            self._count(rows)
        self._submit(self._hashing, self._sha.update, view[first:begin])
        self._submit(self._writing, self._write, view[first:begin])

    def close(self) -> tuple[Digest, int, bytes]:
        """Digest, rows and index of the block, whose file is then ready to be uploaded."""
        while self._waiting:
            self._waiting.popleft().result()
        if self._segment_rows:
            self._end_segment()
        if self._file is not None:
            with self._named():
                self._file.close()
        digest = Digest(sha256=self._sha.hexdigest(), size=self._index.size_bytes)
        return digest, self._index.num_rows, self._index.finish().to_bytes()

    def discard(self) -> None:
        """Removes the local file. Idempotent."""
        wait(self._waiting)
        if self._file is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)

    def _submit(self, thread: Executor, work: Callable[[_Work], None], what: _Work) -> None:
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(thread.submit(work, what))

    def _take_compressed(self, parts: list[tuple[memoryview, int]]) -> None:
        for part, rows in parts:
            self._segment.append(part)
            self._count(rows)
        # The batch is not kept in memory for the few lines that wait for their segment to be full.
        self._segment = [memoryview(bytes(part)) for part in self._segment]

    def _count(self, rows: int) -> None:
        self._segment_rows += rows
        if self._segment_rows == SEGMENT_ROWS:
            self._end_segment()

    def _end_segment(self) -> None:
        if self._compress is not None:
            stored = memoryview(self._compress(b"".join(self._segment)))
            self._segment_size = len(stored)
            self._segment_checksum.update(stored)
            self._sha.update(stored)
            self._write(stored)
        self._index.add_segment(self._segment_size, self._segment_checksum.intdigest(), self._segment_rows)
        self._segment, self._segment_rows, self._segment_size = [], 0, 0
        self._segment_checksum.reset()

    def _write(self, data: memoryview) -> None:
        with self._named():
            if self._file is None:
                self._file = self._create_file()
            while data:
                data = data[self._file.write(data) :]

    def _create_file(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return cast("BinaryIO", self.path.open("xb", buffering=0))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(
                f"{self.path} cannot be written: {error.strerror or error}. Make room there, or choose another place; "
                "what is committed stays, and the next build goes on from there."
            ) from error


def scratch_directory(store: ObjectStore) -> Path:
    """Where the open block lies: beside the blocks if they are local, else in this node's cache."""
    parts = urlsplit(store.uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path)) / "blocks"
    return node_cache_root() / "open" / hashlib.sha256(store.uri.encode()).hexdigest()[:32]


def remove_leftovers(store: ObjectStore) -> None:
    """Removes what killed writers left; one that was only stopped then fails instead of committing."""
    place = scratch_directory(store)
    for path in place.glob(".block_*.open"):
        path.unlink(missing_ok=True)
    for path in place.glob(f"{SPOOL_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
