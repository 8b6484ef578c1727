"""Blocks and chunks for training: metadata without data, and one chunk at a time in memory."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import msgspec

from metaflow_hf.data.foreign import load_index
from metaflow_hf.data.formats import DetectedFormat, resolve_format
from metaflow_hf.data.growth import GrowingBlocks, not_complete
from metaflow_hf.data.manifest import BlockEntry, BlockManifest, Documents, OnBadRow
from metaflow_hf.data.order import Chunk
from metaflow_hf.data.places import open_blocks
from metaflow_hf.data.reader import BlockReader
from metaflow_hf.errors import ConfigError
from metaflow_hf.references import SnapshotRef
from metaflow_hf.store import ObjectStore


@dataclass(frozen=True, slots=True)
class Block:
    """What is known of a block without reading it."""

    block_id: int
    total_samples: int
    _is_last: Callable[[], bool] = field(repr=False, compare=False)

    @property
    def is_last_block(self) -> bool:
        """Whether no block follows; while the dataset grows, this waits until that is known."""
        return self._is_last()

    def chunk_count(self, chunk_size: int) -> int:
        """How many chunks of ``chunk_size`` samples the block has; the last may be smaller."""
        _check_chunk_size(chunk_size)
        return -(-self.total_samples // chunk_size)


class BlockManager:
    """Reads a dataset block by block and chunk by chunk; never more than the chunks asked for is in memory.

    ``dataset_path`` is a directory or a URI of a store that holds blocks (of this or of other software), or a
    source of rows: a raw file, a directory of such, or ``hf://[owner/]name[:config[:split]][@revision]``. A source
    is built into blocks of ``samples_per_block`` in a thread while it is read, under
    ``cache_dir/<dataset key>/`` (default: the running flow's datastore, else the user's cache directory): its
    first block is usable as soon as it is committed, and what was built once is not built again.

    The last 10 chunks (at most 256 MiB) are kept; with ``enable_prefetch`` the next chunk of a sequential reader
    is read ahead in a thread. Thread-safe. Out of range raises ``IndexError``, damage ``IntegrityError`` naming
    the block's file; ``None`` is never an answer.

    ``ascii_only``, ``on_bad_row`` and ``max_rows`` filter rows when blocks are built, ``documents`` says what a row of a
    PDF is, ``keep_columns`` names the columns to store beside those that are trained (all by default; see
    ``build_blocks``); blocks built without ``ascii_only`` are refused with it. The format of the rows is found by their
    columns unless ``format``, ``columns`` or ``text_column`` name it (``FormatError`` lists the columns): ``.format`` is
    what was found, ``.text_column`` its main column.
    """

    def __init__(
        self,
        dataset_path: str | Path | ObjectStore | SnapshotRef | Mapping[str, Any],
        samples_per_block: int = 100_000,
        dataset_chunk_size: int = 4_000,
        *,
        ascii_only: bool = False,
        format: str = "auto",  # noqa: A002  the name of the setting
        columns: Mapping[str, str] | None = None,
        text_column: str | None = None,
        cache_dir: str | Path | None = None,
        enable_prefetch: bool = True,
        on_bad_row: OnBadRow = "raise",
        max_rows: int | None = None,
        documents: Documents = "whole",
        keep_columns: Sequence[str] | None = None,
    ) -> None:
        _check_chunk_size(dataset_chunk_size)
        self.dataset_chunk_size = index(dataset_chunk_size)
        self._lock = threading.Lock()
        self._store, self._known = open_blocks(
            dataset_path,
            cache_dir,
            samples_per_block=samples_per_block,
            ascii_only=ascii_only,
            format=format,
            columns=columns,
            text_column=text_column,
            on_bad_row=on_bad_row,
            max_rows=max_rows,
            documents=documents,
            keep_columns=keep_columns,
        )
        if ascii_only and not self._known.manifest.ascii_only:
            raise ConfigError(
                f"{self._store.uri} was built without ascii_only: build it again with it, or read all of it."
            )
        self.format = self.format_as(format=format, columns=columns, text_column=text_column)
        self.text_column = self.format.main_column
        self._reader = BlockReader(
            self._store, partial(load_index, self._store), text_column=self.text_column
        )
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="chunk ahead") if enable_prefetch else None
        self._pending: tuple[Chunk, Future[None]] | None = None
        self._last_read: Chunk | None = None

    @property
    def manifest(self) -> BlockManifest:
        """The blocks known now; all of them once ``is_complete``."""
        manifest = self._known.manifest
        return (
            manifest
            if manifest.text_column
            else msgspec.structs.replace(manifest, text_column=self.text_column)
        )

    @property
    def uri(self) -> str:
        """Where the blocks are."""
        return self._store.uri

    def get_total_blocks(self) -> int:
        """The number of blocks of the whole dataset; as ``wait_complete`` while it grows."""
        return self.wait_complete().total_blocks

    def wait_complete(self) -> BlockManifest:
        """The manifest of the whole dataset; while it grows, this waits for its end.

        Raises ``UserError`` when nobody is writing the rest, and the error of a builder that failed.
        """
        manifest = self._known.wait_until(lambda known: known.is_complete)
        if not manifest.is_complete:
            raise not_complete(self._store, manifest)
        return manifest

    def check_growing(self) -> None:
        """Raises as ``wait_complete``, without waiting, when blocks are missing that nobody is writing."""
        self._known.check_growing()

    def wait_growth(self, known: BlockManifest) -> bool:
        """Waits until this manager has built more than ``known``; ``False`` when it does not come, because others
        write the dataset, or after ``close``.

        Raises the error of a builder that failed.
        """
        if not isinstance(self._known, GrowingBlocks):
            return False
        newest = self._known.wait_until(lambda manifest: manifest.total_blocks > known.total_blocks)
        return newest.is_complete or newest.total_blocks > known.total_blocks

    def get_block(self, block_id: int) -> Block:
        """The block's metadata; nothing of its data is read. Waits for a block that is being built."""
        entry = self._entry(block_id)
        return Block(block_id, entry.sample_count, partial(self.is_last_block, block_id))

    def is_last_block(self, block_id: int) -> bool:
        """Whether no block follows; while the dataset grows, this waits until that is known, as ``wait_complete``."""
        self._entry(block_id)
        manifest = self._known.wait_until(lambda known: known.total_blocks > block_id + 1)
        if block_id == manifest.total_blocks - 1 and not manifest.is_complete:
            raise not_complete(self._store, manifest)
        return block_id == manifest.total_blocks - 1

    def get_chunk(self, block_id: int, chunk_id: int, chunk_size: int | None = None) -> list[str]:
        """The text of each row of one chunk, as a fresh list; "" for a row without text.

        One ranged read and one decode, or none when the chunk is cached.
        """
        entry, chunk = self._locate(block_id, chunk_id, chunk_size)
        self._await_read_ahead(chunk)
        self._read_ahead(chunk, chunk_size or self.dataset_chunk_size)
        return self._reader.texts(entry, chunk.start, chunk.stop)

    def get_rows(self, block_id: int, chunk_id: int, chunk_size: int | None = None) -> list[dict[str, Any]]:
        """All columns of each row of one chunk, as fresh objects."""
        entry, chunk = self._locate(block_id, chunk_id, chunk_size)
        return self._reader.chunk_rows(entry, chunk.start, chunk.stop)

    def read_rows(self, block_id: int, start: int, stop: int) -> list[dict[str, Any]]:
        """All columns of rows ``[start, stop)`` of a block, by number within the block.

        One ranged read of the segments that cover them, or none when their chunk is cached.
        """
        entry = self._entry(block_id)
        if not 0 <= start <= stop <= entry.sample_count:
            raise IndexError(
                f"block {block_id} has {entry.sample_count} rows; [{start}, {stop}) is not within it."
            )
        if start == stop:
            return []
        chunk = self._chunk(entry, start // self.dataset_chunk_size, self.dataset_chunk_size)
        if stop > chunk.stop:
            chunk = Chunk(block_id, -1, start, stop)
        return self._reader.rows(entry, start, stop, chunk=chunk)

    def format_as(
        self,
        *,
        format: str = "auto",  # noqa: A002  the name of the setting
        columns: Mapping[str, str] | None = None,
        text_column: str | None = None,
    ) -> DetectedFormat:
        """The format that is named, else the one that the dataset was built with, else what its first rows say.

        Raises ``FormatError`` when it is not certain, or a column does not exist or holds something else.
        """
        manifest = self._known.manifest
        is_named = format != "auto" or bool(columns) or text_column is not None
        if not is_named and manifest.format is not None:
            return DetectedFormat(
                manifest.format, manifest.columns or {"text": manifest.text_column or "text"}
            )
        first = next((block for block in manifest.blocks if block.sample_count), None)
        if first is None:
            return DetectedFormat("text", {"text": text_column or manifest.text_column or "text"})
        reader = BlockReader(self._store, partial(load_index, self._store), text_column="text")
        rows = reader.chunk_rows(first, 0, min(first.sample_count, 100))
        named = text_column if is_named else manifest.text_column
        return resolve_format(rows, format=format, columns=columns, text_column=named, where=self._store.uri)

    def close(self) -> None:
        """Stops reading ahead and building; idempotent. What is committed can still be read."""
        with self._lock:
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.shutdown(cancel_futures=True)
        self._known.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, block_id: int) -> BlockEntry:
        if block_id >= 0:
            manifest = self._known.wait_until(lambda known: known.total_blocks > block_id)
            if block_id < manifest.total_blocks:
                return manifest.blocks[block_id]
        manifest = self._known.manifest
        growing = (
            "" if manifest.is_complete else " so far (it is not complete, and nobody is writing the rest)"
        )
        raise IndexError(
            f"{manifest.dataset_name} has {manifest.total_blocks} blocks{growing}; there is no block {block_id}."
        )

    def _locate(self, block_id: int, chunk_id: int, chunk_size: int | None) -> tuple[BlockEntry, Chunk]:
        size = self.dataset_chunk_size if chunk_size is None else chunk_size
        _check_chunk_size(size)
        entry = self._entry(block_id)
        return entry, self._chunk(entry, chunk_id, size)

    def _chunk(self, entry: BlockEntry, chunk_id: int, size: int) -> Chunk:
        start = chunk_id * size
        if chunk_id < 0 or start >= entry.sample_count:
            raise IndexError(
                f"block {entry.block_id} has {-(-entry.sample_count // size)} chunks of {size} samples; there is no "
                f"chunk {chunk_id}."
            )
        return Chunk(entry.block_id, chunk_id, start, min(start + size, entry.sample_count))

    def _await_read_ahead(self, chunk: Chunk) -> None:
        """Waits for a chunk that is being read ahead: reading the same bytes twice costs more.

        How that went does not matter: if it failed, the chunk is read again and fails as its own reader's.
        """
        with self._lock:
            pending = self._pending
        if pending is not None and pending[0] == chunk:
            wait([pending[1]])

    def _read_ahead(self, chunk: Chunk, size: int) -> None:
        """Reads the chunk after this one, if this one came after the one before it, as a sequential reader's does."""
        with self._lock:
            if self._ahead is None:
                return
            last, self._last_read = self._last_read, chunk
            following = self._following(chunk, size)
            if following is None or (last is not None and self._following(last, size) != chunk):
                return
            if self._pending is not None and self._pending[0] == following:
                return
            entry = self._known.manifest.blocks[following.block_id]
            future = self._ahead.submit(self._reader.read_ahead, entry, following.start, following.stop)
            self._pending = (following, future)

    def _following(self, chunk: Chunk, size: int) -> Chunk | None:
        manifest = self._known.manifest
        if chunk.stop < manifest.blocks[chunk.block_id].sample_count:
            number, rest = divmod(chunk.stop, size)
            # A chunk of another size may end where none of this size begins.
            return None if rest else self._chunk(manifest.blocks[chunk.block_id], number, size)
        # Other software leaves blocks without a row.
        later = islice(manifest.blocks, chunk.block_id + 1, None)
        block = next((block for block in later if block.sample_count), None)
        return None if block is None else self._chunk(block, 0, size)


def _check_chunk_size(chunk_size: object) -> None:
    if not isinstance(chunk_size, SupportsIndex) or index(chunk_size) < 1:
        raise ConfigError(f"a chunk must have at least 1 sample, got {chunk_size!r}.")
