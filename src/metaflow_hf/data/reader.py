"""Rows of committed blocks by number: one ranged read of the segments that cover them, checked, then decoded."""

from collections.abc import Callable
from functools import lru_cache
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
CACHED_BYTES: Final = 256 * 1024 * 1024
CACHED_INDEXES: Final = 64

# (block, start, stop) of a range of rows.
Span = tuple[int, int, int]


class BlockReader:
    """Reads ranges of rows. Thread-safe; a range is read and decoded once while it stays in the cache.

    ``index_of`` gives the index of a block. Raises ``IntegrityError`` naming the block's file when a byte of the
    range is not as written, or the file is gone.
    """

    def __init__(
        self, store: ObjectStore, index_of: Callable[[BlockEntry], BlockIndex], *, text_column: str
    ) -> None:
        self._store = store
        self._index_of = lru_cache(maxsize=CACHED_INDEXES)(index_of)
        row = msgspec.defstruct(
            "Row", [("text", Any, None)], rename={"text": text_column}, gc=False, module=__name__
        )
        self._decode_texts = msgspec.json.Decoder(row).decode_lines
        self._decode_rows = msgspec.json.Decoder(dict[str, Any]).decode_lines
        self._texts: BoundedCache[Span, list[str]] = BoundedCache(
            max_items=CACHED_CHUNKS, max_bytes=CACHED_BYTES
        )
        self._lines: BoundedCache[Span, bytes] = BoundedCache(max_items=CACHED_CHUNKS, max_bytes=CACHED_BYTES)

    def texts(self, block: BlockEntry, start: int, stop: int) -> list[str]:
        """The text of each row of ``[start, stop)``, "" where a row has none; a fresh list."""
        span = (block.block_id, start, stop)
        cached = self._texts.get(span)
        if cached is None:
            lines = self.read(block, start, stop)
            cached = [row.text for row in self._decode_all(self._decode_texts, lines, block, span)]
            if set(map(type, cached)) != {str}:
                cached = [_as_text(value) for value in cached]
            self._texts.put(span, cached, len(lines))
        return list(cached)

    def chunk_rows(self, block: BlockEntry, start: int, stop: int) -> list[dict[str, Any]]:
        """All columns of each row of the chunk ``[start, stop)``; fresh objects."""
        span = (block.block_id, start, stop)
        lines = self._lines.get(span)
        if lines is None:
            lines = self.read(block, start, stop)
            self._lines.put(span, lines, len(lines))
        return self._decode_all(self._decode_rows, lines, block, span)

    def rows(self, block: BlockEntry, start: int, stop: int, *, chunk: Chunk) -> list[dict[str, Any]]:
        """As ``chunk_rows`` for a part of ``chunk``, from the cache if the chunk is there."""
        lines = self._lines.get((block.block_id, chunk.start, chunk.stop))
        if lines is None:
            lines = self.read(block, start, stop)
        else:
            lines = _cut(lines, chunk.num_samples, start - chunk.start, chunk.stop - stop)
        return self._decode_all(self._decode_rows, lines, block, (block.block_id, start, stop))

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

    def _decode_all(
        self, decode: Callable[[bytes], list[Any]], lines: bytes, block: BlockEntry, span: Span
    ) -> list[Any]:
        _, start, stop = span
        try:
            rows = decode(lines)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{block.file_name}: rows {start} to {stop - 1}: {error}.") from error
        if len(rows) != stop - start:
            raise IntegrityError(
                f"{block.file_name}: rows {start} to {stop - 1} are {len(rows)} JSON objects, not one a line."
            )
        return rows


def _cut(data: bytes, rows: int, skip: int, drop: int) -> bytes:
    """``data``, which holds so many ``rows``, without its first ``skip`` and its last ``drop``."""
    if skip == drop == 0:
        return data
    if data.count(b"\n") != rows:
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
