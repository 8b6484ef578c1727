"""Bytes on their way into a file: hashed while they are written, read ahead where the way is long.

Nothing is read twice for its checksum, no more than a few chunks are in memory, and buffers are used again:
on virtual machines fresh memory costs more than the copy that it is for.
"""

import errno
import fcntl
import hashlib
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Final

from metaflow_hf.errors import IntegrityError
from metaflow_hf.store.objects import Digest, Unfinished

CHUNK_BYTES: Final = 4 << 20
# One ranged request, and how many are under way at once.
RANGE_BYTES: Final = 8 << 20
READERS: Final = 8
_FICLONE: Final = 0x40049409
# What file systems answer that cannot link: across devices, not permitted, too many links, not supported.
_NO_LINK: Final = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}
)
# No key ends like this: stores on local disks keep what they are writing under such names, and list none.
_PART: Final = re.compile(r"#\d+$")


def write_hashed(chunks: Iterable[memoryview], descriptor: int) -> Digest:
    """Writes the chunks at the descriptor's position; each is hashed while it is written."""
    sha, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as pool:
        for chunk in chunks:
            hashed = pool.submit(sha.update, chunk)
            size += len(chunk)
            _write_all(chunk, descriptor)
            hashed.result()
    return Digest(sha256=sha.hexdigest(), size=size)


def file_chunks(file: Path | int) -> Iterator[memoryview]:
    """The bytes of a file, or of a descriptor from where it is; a chunk is valid until the next is asked for."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(file, "rb", buffering=0, closefd=isinstance(file, Path)) as raw:
        while count := raw.readinto(buffer):
            yield buffer[:count]


def hash_chunks(chunks: Iterable[memoryview]) -> Digest:
    """Size and sha256 of all chunks."""
    sha, size = hashlib.sha256(), 0
    for chunk in chunks:
        sha.update(chunk)
        size += len(chunk)
    return Digest(sha256=sha.hexdigest(), size=size)


class _Readings:
    """How many objects are read ahead at this moment, by all threads of the process."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        with self._lock:
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1

    def share(self) -> int:
        """Ranges that each may have under way: more requests than there are readers slow all of them down."""
        return max(2, READERS // self._count)


_readings: Final = _Readings()


def read_ahead(read: Callable[[int, int], memoryview], size: int) -> Iterator[memoryview]:
    """``[0, size)`` in order, as ``read(start, stop)`` gives it.

    ``READERS`` ranges are asked for at a time, by all objects that are being read together, and at least two of each.
    """
    starts, pending = iter(range(0, size, RANGE_BYTES)), deque[Future[memoryview]]()
    with _readings.one_more(), ThreadPoolExecutor(READERS) as pool:
        try:
            while True:
                for start in islice(starts, max(0, _readings.share() - len(pending))):
                    pending.append(pool.submit(read, start, min(start + RANGE_BYTES, size)))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for request in pending:
                request.cancel()


def copy_hashed(source: Path, descriptor: int) -> Digest:
    """Copies a file into an empty one, by reflink where the file system can; the digest is that of the copy."""
    if reflink(source, descriptor):
        return hash_chunks(file_chunks(descriptor))
    return write_hashed(file_chunks(source), descriptor)


def copy_durably(source: Path, target: Path, check: Callable[[Digest], None]) -> Digest:
    """Copies a file over ``target``, which changes in one step and only when ``check`` does not raise.

    The bytes are on the disk when it returns; the caller makes the name durable too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(target)
    try:
        with part.open("x+b", buffering=0) as out:
            digest = copy_hashed(source, out.fileno())
            check(digest)
            os.fsync(out.fileno())
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    return digest


def link_durably(source: Path, target: Path) -> bool:
    """Gives a file a second name, over ``target`` in one step; ``False`` where the file system cannot.

    The bytes are on the disk when it returns; the caller makes the name durable too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(target)
    try:
        if not hard_link(source, part):
            return False
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    return True


def link_hashed(source: Path, target: Path, check: Callable[[Digest], None]) -> Digest | None:
    """Gives a file a second name if ``check`` does not raise; ``None`` where the file system cannot."""
    part = _part_of(target)
    try:
        if not hard_link(source, part):
            return None
        digest = hash_chunks(file_chunks(part))
        check(digest)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    return digest


def unfinished_files(root: Path) -> Iterator[Unfinished]:
    """The files of writes below a directory, ours and obstore's, that have not got their name yet."""
    for directory, _, names in os.walk(root):
        for path in (Path(directory, name) for name in names if _PART.search(name)):
            with suppress(FileNotFoundError):  # it got its name in the meantime
                found = path.stat()
                yield Unfinished(path, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def reflink(source: Path, descriptor: int) -> bool:
    """Makes an empty file share the bytes of ``source`` until one of them is written; whether that is possible."""
    with source.open("rb") as reader, suppress(OSError):
        fcntl.ioctl(descriptor, _FICLONE, reader.fileno())
        return True
    return False


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}#{random.SystemRandom().randrange(10**9)}")


def hard_link(source: Path, target: Path) -> bool:
    """Gives a file a second name; whether that is possible. Raises ``FileExistsError`` where the name is taken."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def _write_all(view: memoryview, descriptor: int) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


class HashingReader:
    """Chunks of a file with their digest on the side; the last chunk is held back until the digest is right."""

    def __init__(self, path: Path, expected: Digest | None) -> None:
        self._path = path
        self._expected = expected
        self.digest = Digest(sha256="", size=-1)

    def chunks(self, size_of_one: int) -> Iterator[bytes]:
        sha, size = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            while chunk := file.read(size_of_one):
                sha.update(chunk)
                size += len(chunk)
                yield chunk
        self.digest = Digest(sha256=sha.hexdigest(), size=size)
        check_digest(self.digest, self._expected, what=str(self._path))


def check_digest(actual: Digest, expected: Digest | None, *, what: str) -> None:
    """Raises ``IntegrityError`` naming ``what`` when the bytes are not the expected ones."""
    if expected is not None and actual != expected:
        raise IntegrityError(
            f"{what} is damaged: expected {expected.size} bytes with sha256 {expected.sha256}, found {actual.size} "
            f"bytes with sha256 {actual.sha256}."
        )
