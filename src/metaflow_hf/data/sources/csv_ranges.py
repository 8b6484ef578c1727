"""Byte ranges of a CSV file that can be parsed by themselves.

A line feed ends a record unless it is inside quotes, so a cut is made behind a line feed with an even number of
quotes before it. That is a guess: a quote inside an unquoted cell (``5" disk``) is an ordinary character. A wrong
guess is always detected, because the range before the cut then ends inside quotes, which the parser refuses.
Therefore a range may be used only if all ranges before it were parsed without an error.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, cast

from metaflow_hf.data.sources.compression import READ_BYTES
from metaflow_hf.data.sources.files import SourceFile

_MAX_HEADER_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CsvRange:
    """Bytes ``[start, stop)`` of a CSV file behind its header, as a file of their own."""

    file: SourceFile
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.file.name

    def open(self) -> BinaryIO:
        with self.file.open() as stream:
            header = _header(stream) if self.start else b""
        return cast("BinaryIO", _Joined(header, self.file.open(), self.start, self.stop))


def csv_cuts(file: SourceFile, range_bytes: int) -> Iterator[int]:
    """Offsets at which records probably begin, about ``range_bytes`` apart; none if the header is unusual."""
    with file.open() as stream:
        header = _header(stream)
        if not header:
            return
        stream.seek(0)
        offset, num_quotes, wanted = 0, 0, max(range_bytes, len(header))
        while data := stream.read(READ_BYTES):
            at = 0
            while offset + len(data) > wanted:
                cut, seen = _record_end(data, max(wanted - offset - 1, at), num_quotes, at)
                if not cut:
                    break
                num_quotes, at = num_quotes + seen, cut
                yield offset + cut
                wanted = offset + cut + range_bytes
            num_quotes += data.count(b'"', at)
            offset += len(data)


def _record_end(data: bytes, wanted: int, num_quotes: int, at: int) -> tuple[int, int]:
    """The first end of a record behind byte ``wanted`` and the number of quotes from ``at`` to it; 0 for none."""
    seen = data.count(b'"', at, wanted)
    while (found := data.find(b"\n", wanted) + 1) > 0:
        seen += data.count(b'"', wanted, found)
        if (num_quotes + seen) % 2 == 0:
            return found, seen
        wanted = found
    return 0, 0


def _header(stream: BinaryIO) -> bytes:
    """The bytes of the first record; empty if it does not end at a line feed with an even number of quotes."""
    data = stream.read(_MAX_HEADER_BYTES)
    end, _ = _record_end(data, 0, 0, 0)
    lines = io.StringIO(data[:end].decode("utf-8-sig", "surrogateescape"), newline="")
    try:
        return data[:end] if len(list(csv.reader(lines, strict=True))) == 1 else b""
    except csv.Error:
        return b""


class _Joined(io.RawIOBase):
    """A header and then a range of a file."""

    def __init__(self, header: bytes, stream: BinaryIO, start: int, stop: int) -> None:
        self._header, self._stream, self._start, self._stop = header, stream, start, stop
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes back to the beginning; no other place is supported."""
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("seek")
        self._left = self._stop - self._start
        self._header_left = self._header
        self._stream.seek(self._start)
        return 0

    def readinto(self, buffer: Any) -> int:
        if self._header_left:
            data = self._header_left[: len(buffer)]
            self._header_left = self._header_left[len(data) :]
        else:
            data = self._stream.read(min(len(buffer), self._left))
            self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
