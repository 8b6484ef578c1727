"""The sparse index of a block: where each segment of rows begins, and a checksum of its bytes.

With it a chunk is one ranged read: of the segments that cover its rows, each checked before it is decoded. The
file is binary, little-endian: magic, rows per segment, number of rows, number of segments; then the byte
offsets (uint64) of all segments and of the end; then the XXH3-64 checksum (uint64) of each segment as stored; then
that of all of this.
"""

import struct
from array import array
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from xxhash import xxh3_64_intdigest as checksum

from metaflow_hf.errors import IntegrityError

SEGMENT_ROWS: Final = 250
_MAGIC: Final = b"MFHFIDX2"
_HEADER: Final = struct.Struct("<8sIQQ")
_CHECKSUM: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """Offsets and checksums of a block's segments; all segments but the last have ``segment_rows`` rows."""

    num_rows: int
    offsets: "array[int]"
    checksums: "array[int]"
    segment_rows: int = SEGMENT_ROWS

    @property
    def size_bytes(self) -> int:
        """Size of the block as stored."""
        return self.offsets[-1]

    @property
    def memory_bytes(self) -> int:
        """About how much memory the index takes."""
        return 8 * (len(self.offsets) + len(self.checksums)) + 300

    def segments(self, start: int, stop: int) -> range:
        """The numbers of the segments that cover rows ``[start, stop)``."""
        return range(start // self.segment_rows, -(-stop // self.segment_rows))

    def byte_range(self, segments: range) -> tuple[int, int]:
        """The bytes ``[start, stop)`` of consecutive segments."""
        return self.offsets[segments.start], self.offsets[segments.stop]

    def split(self, data: bytes, segments: range, *, where: str) -> list[memoryview]:
        """The bytes of each of ``segments`` in ``data``, which was read from their byte range.

        Raises ``IntegrityError`` naming ``where`` when a byte is not as written.
        """
        first, end = self.byte_range(segments)
        if len(data) != end - first:
            raise IntegrityError(
                f"{where} is damaged: {len(data)} bytes at offset {first} instead of {end - first}. Restore it or "
                "build the dataset again."
            )
        view = memoryview(data)
        pieces = []
        for number in segments:
            piece = view[self.offsets[number] - first : self.offsets[number + 1] - first]
            if checksum(piece) != self.checksums[number]:
                raise IntegrityError(
                    f"{where} is damaged: rows {number * self.segment_rows} to "
                    f"{min((number + 1) * self.segment_rows, self.num_rows) - 1} are not what was written. Restore "
                    "it or build the dataset again."
                )
            pieces.append(piece)
        return pieces

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(_MAGIC, self.segment_rows, self.num_rows, len(self.checksums))
        data = (
            header
            + np.asarray(self.offsets, dtype="<u8").tobytes()
            + np.asarray(self.checksums, dtype="<u8").tobytes()
        )
        return data + _CHECKSUM.pack(checksum(data))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """Raises ``IntegrityError`` naming ``where`` for bytes that are no index."""
        body, stored = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
        if data[: len(_MAGIC)] != _MAGIC or stored != _CHECKSUM.pack(checksum(body)):
            raise IntegrityError(
                f"{where} is not an index of a block, or damaged: delete it, and it is built again."
            )
        _, segment_rows, num_rows, count = _HEADER.unpack_from(body)
        end = _HEADER.size + 8 * (count + 1)
        offsets = np.frombuffer(data, "<u8", count + 1, _HEADER.size)
        checksums = np.frombuffer(data, "<u8", count, end)
        return cls(num_rows, array("Q", offsets.tolist()), array("Q", checksums.tolist()), segment_rows)


@dataclass(slots=True)
class IndexBuilder:
    """Collects the index while a block is written, segment by segment."""

    num_rows: int = 0
    _offsets: "array[int]" = field(default_factory=lambda: array("Q", [0]))
    _checksums: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def size_bytes(self) -> int:
        return self._offsets[-1]

    def add(self, data: bytes, rows: int) -> None:
        """The next segment, as it is stored."""
        self.add_segment(len(data), checksum(data), rows)

    def add_segment(self, size: int, found: int, rows: int) -> None:
        """The next segment, of which size and checksum (``found``) are known."""
        self.num_rows += rows
        self._offsets.append(self._offsets[-1] + size)
        self._checksums.append(found)

    def finish(self) -> BlockIndex:
        return BlockIndex(self.num_rows, self._offsets, self._checksums)
