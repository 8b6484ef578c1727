"""The content of a source file as a stream, decompressed by its ending."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, Protocol, cast

import zstandard

from metaflow_hf.errors import IntegrityError

# Larger pieces would each be new pages of memory.
READ_BYTES: Final = 256 * 1024
COMPRESSIONS: Final = (".gz", ".zst", ".bz2", ".xz")
_DAMAGE: Final = (
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
    lzma.LZMAError,
    EOFError,
)
# Larger files that are decompressed for reading at any place go to the disk.
_IN_MEMORY_BYTES: Final = 16 * 1024 * 1024


def uncompressed_name(name: str) -> str:
    """The name of a file without the endings of its compressions."""
    while name.lower().endswith(COMPRESSIONS):
        name = name.rpartition(".")[0]
    return name


class OpenableFile(Protocol):
    """A file with a name, whose ending says what it holds."""

    @property
    def name(self) -> str: ...

    def open(self) -> BinaryIO: ...


@contextmanager
def open_content(file: OpenableFile, offset: int = 0) -> Iterator[io.BufferedReader]:
    """The content of ``file`` from byte ``offset`` on, decompressed; closed at the end.

    Raises ``IntegrityError`` naming the file when it is cut off or damaged.
    """
    lowered = file.name.lower()
    with file.open() as stored, damage_named(file.name, *_DAMAGE):
        stream: Any = stored
        if lowered.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=stored)
        elif lowered.endswith(".zst"):
            stream = _ZstdReader(stored)
        elif lowered.endswith(".bz2"):
            stream = bz2.BZ2File(stored)
        elif lowered.endswith(".xz"):
            stream = lzma.LZMAFile(stored)  # noqa: SIM115  closed with the reader around it
        else:
            stored.seek(offset)
            offset = 0
        with io.BufferedReader(stream, READ_BYTES) as reader:
            while offset > 0:
                skipped = len(reader.read(min(offset, READ_BYTES)))
                offset = offset - skipped if skipped else 0
            yield reader


@contextmanager
def open_seekable(file: OpenableFile) -> Iterator[BinaryIO]:
    """The content of ``file``, decompressed as a whole where it is compressed, for formats that are read at any place.

    Raises ``IntegrityError`` naming the file when it is cut off or damaged.
    """
    if not file.name.lower().endswith(COMPRESSIONS):
        with file.open() as stored:
            yield stored
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as whole:
        with open_content(file) as stream:
            shutil.copyfileobj(stream, whole, READ_BYTES)
        whole.seek(0)
        yield cast("BinaryIO", whole)


@contextmanager
def damage_named(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what decoders say about damaged bytes (``kinds``) into ``IntegrityError`` naming the file."""
    try:
        yield
    except kinds as error:
        raise IntegrityError(f"{name} is damaged or not what its ending says: {error}.") from error
    except OSError as error:
        # So bz2 says it; what the system says has a number.
        if type(error) is OSError and error.errno is None:
            raise IntegrityError(f"{name} is damaged or not what its ending says: {error}.") from error
        raise


class _ZstdReader(io.RawIOBase):
    """All frames of a file; unlike zstandard's own reader it tells a cut off file from a finished one."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._fill():
                return 0
        length = min(len(buffer), len(self._ready))
        buffer[:length] = self._ready[:length]
        self._ready = self._ready[length:]
        return length

    def _fill(self) -> bool:
        data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        if data or (self._frame is not None and self._frame.eof):
            self._frame = None
        data = data or self._stored.read(READ_BYTES)
        if not data:
            if self._frame is not None:
                raise EOFError("it ends in the middle")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(self._frame.decompress(data))
        return True
