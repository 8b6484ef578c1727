"""Rows of committed blocks by number: one ranged read of the segments that cover them, checked, then decoded."""

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zstandard

from metaflow_hf.data.cache import BoundedCache
from metaflow_hf.data.index import BlockIndex
from metaflow_hf.data.manifest import BlockEntry
from metaflow_hf.data.order import Chunk
from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store import ObjectStore

CACHED_CHUNKS: Final = 10
# Each of texts, and of lines as they were read.
CACHED_BYTES: Final = 128 * 1024 * 1024
CACHED_INDEX_BYTES: Final = 16 * 1024 * 1024

# (block, start, stop) of a range of rows.
Span = tuple[int, int, int]


class BlockReader:
    """Reads ranges of rows: one ranged read and one decode each, or none while the range stays in the cache.

    ``index_of`` gives the index of a block. Raises ``IntegrityError`` naming the block's file when a byte of the
    range is not as written, or the file is gone. Thread-safe.
    """

    def __init__(
        self, store: ObjectStore, index_of: Callable[[BlockEntry], BlockIndex], *, text_column: str
    ) -> None:
        self._store = store
        self._load_index = index_of
        self._text_column = text_column
        row = msgspec.defstruct(
            "Row", [("text", Any, None)], rename={"text": text_column}, gc=False, module=__name__
        )
        self._decode_text: Callable[[bytes], list[Any]] = msgspec.json.Decoder(row).decode_lines
        self._decode_rows = msgspec.json.Decoder(dict[str, Any]).decode_lines
        self._indexes: BoundedCache[int, BlockIndex] = BoundedCache(
            max_items=sys.maxsize, max_bytes=CACHED_INDEX_BYTES
        )
        self._texts: BoundedCache[Span, list[str]] = BoundedCache(
            max_items=CACHED_CHUNKS, max_bytes=CACHED_BYTES
        )
        self._lines: BoundedCache[Span, bytes] = BoundedCache(max_items=CACHED_CHUNKS, max_bytes=CACHED_BYTES)

    def texts(self, block: BlockEntry, start: int, stop: int) -> list[str]:
        """The text of each row of ``[start, stop)``, "" where a row has none; a fresh list."""
        span = (block.block_id, start, stop)
        cached = self._texts.get(span)
        if cached is None:
            lines = self._lines.get(span) or self.read(block, start, stop)
            cached = self._checked(self._decode_texts, lines, block, span)
            if set(map(type, cached)) != {str}:
                cached = [_as_text(value) for value in cached]
            self._texts.put(span, cached, _memory(cached, len(lines)))
        return list(cached)

    def chunk_rows(self, block: BlockEntry, start: int, stop: int) -> list[dict[str, Any]]:
        """All columns of each row of the chunk ``[start, stop)``; fresh objects."""
        span = (block.block_id, start, stop)
        return self._checked(self._decode_rows, self._kept_lines(block, span), block, span)

    def read_ahead(self, block: BlockEntry, start: int, stop: int) -> None:
        """Reads the chunk ``[start, stop)`` into the cache, if it is not there; decoding is left to who wants it."""
        span = (block.block_id, start, stop)
        if self._texts.get(span) is None:
            self._kept_lines(block, span)

    def rows(self, block: BlockEntry, start: int, stop: int, *, chunk: Chunk) -> list[dict[str, Any]]:
        """As ``chunk_rows`` for a part of ``chunk``, from the cache if the chunk is there."""
        lines = self._lines.get((block.block_id, chunk.start, chunk.stop))
        if lines is None:
            lines = self.read(block, start, stop)
        else:
            lines = _cut(lines, chunk.num_samples, start - chunk.start, chunk.stop - stop)
        return self._checked(self._decode_rows, lines, block, (block.block_id, start, stop))

    def read(self, block: BlockEntry, start: int, stop: int) -> bytes:
        """The lines of ``[start, stop)`` by one ranged read, checked and decompressed."""
        index = self._index_of(block)
        segments = index.segments(start, stop)
        where = block.file_name
        try:
            stored = self._store.get_range(block.key, *index.byte_range(segments))
        except NotFound as error:
            raise IntegrityError(
                f"{where} is gone from {self._store.uri}: restore it, or build again."
            ) from error
        pieces = index.split(stored, segments, where=where)
        data = stored
        if block.key.endswith(".zst"):
            data = b"".join(map(zstandard.ZstdDecompressor().decompress, pieces))
        first = segments.start * index.segment_rows
        last = min(segments.stop * index.segment_rows, index.num_rows)
        return _cut(data, last - first, start - first, last - stop)

    def _index_of(self, block: BlockEntry) -> BlockIndex:
        index = self._indexes.get(block.block_id)
        if index is None:
            index = self._load_index(block)
            self._indexes.put(block.block_id, index, index.memory_bytes)
        return index

    def _kept_lines(self, block: BlockEntry, span: Span) -> bytes:
        lines = self._lines.get(span)
        if lines is None:
            lines = self.read(block, *span[1:])
            self._lines.put(span, lines, len(lines))
        return lines

    def _decode_texts(self, lines: bytes) -> list[Any]:
        return [row.text for row in self._decode_text(lines)]

    def _checked(
        self, decode: Callable[[bytes], list[Any]], lines: bytes, block: BlockEntry, span: Span
    ) -> list[Any]:
        """What ``decode`` finds in ``lines``, which is one JSON object for each row of ``span``."""
        rows = f"{block.file_name}: rows {span[1]} to {span[2] - 1}"
        try:
            found = decode(lines)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            loose = self._decode_loosely(decode, lines)
            if loose is None:
                raise IntegrityError(f"{rows}: {error}.") from error
            found = loose
        if len(found) != span[2] - span[1]:
            raise IntegrityError(f"{rows} are {len(found)} JSON objects, not one a line.")
        return found

    def _decode_loosely(self, decode: Callable[[bytes], list[Any]], lines: bytes) -> list[Any] | None:
        """What Python's own writer of JSON leaves in blocks of other software (NaN, for one) its reader reads."""
        try:
            rows = [json.loads(line) for line in lines.split(b"\n") if line.strip()]
        except ValueError:
            return None
        if not all(isinstance(row, dict) for row in rows):
            return None
        return rows if decode == self._decode_rows else [row.get(self._text_column) for row in rows]


def _cut(data: bytes, rows: int, skip: int, drop: int) -> bytes:
    """``data``, which holds so many ``rows``, without its first ``skip`` and its last ``drop``."""
    if skip == drop == 0:
        return data
    if not data.endswith(b"\n") or data.count(b"\n") != rows:
        # Other software leaves blank lines, or the last line end out.
        data = b"".join(line + b"\n" for line in data.split(b"\n") if line.strip())
    begin, end = 0, len(data)
    for _ in range(skip):
        begin = data.index(b"\n", begin) + 1
    for _ in range(drop):
        end = data.rindex(b"\n", begin, end - 1) + 1
    return data[begin:end]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    # A conversation, or a value of another type in blocks of other software: as JSON, so that nothing is lost.
    return msgspec.json.encode(value).decode()


def _memory(texts: list[str], num_bytes: int) -> int:
    """At most so many bytes of memory hold ``texts``, which were decoded from ``num_bytes`` of JSON."""
    # Four bytes a character and a header each, which most often is little enough not to look closer.
    most = 4 * num_bytes + 88 * len(texts)
    return most if most * CACHED_CHUNKS <= CACHED_BYTES else sum(map(sys.getsizeof, texts))
