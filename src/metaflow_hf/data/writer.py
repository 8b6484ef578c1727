"""Lines -> committed blocks. What is committed is never written again, and a killed writer loses its open block
only.

One block is open at a time, as a local file; only its sparse index is in memory. A full block is committed in
three steps, each durable before the next: the block and its index are uploaded, ``commits/<n>.json`` is created
with the source's cursor, and now and then the derived manifest is written. The next run goes on from the last
commit, and its bytes are those of an uninterrupted run.
"""

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import index
from typing import Final, SupportsIndex

import msgspec
import numpy as np

from metaflow_hf.data.manifest import (
    BlockEntry,
    BlockManifest,
    Commit,
    Completion,
    Cursor,
    DatasetSpec,
    block_name,
)
from metaflow_hf.data.open_block import OpenBlock, remove_leftovers
from metaflow_hf.data.records import (
    COMPLETE_KEY,
    MANIFEST_KEY,
    commit_key,
    encode,
    read_commit,
    read_completion,
    read_manifest,
)
from metaflow_hf.data.rows import EncodedRows
from metaflow_hf.errors import ClaimLost, ConfigError, DatasetMismatch, NotFound
from metaflow_hf.store import ObjectStore
from metaflow_hf.store.leases import Lease, wait_for

logger = logging.getLogger("metaflow_hf.data")

LEASE_KEY: Final = "leases/writer"
LEASE_SECONDS: Final = 20.0
MANIFEST_SECONDS: Final = 60.0
MANIFEST_GROWTH: Final = 1.1

OnCommit = Callable[[BlockManifest], None]


class DatasetWriter:
    """Writes one dataset into a store, under its lease, from where the last commit ended.

    ``cursor`` is where the source has to go on. Raises ``DatasetMismatch`` when the store holds another dataset.
    """

    def __init__(
        self,
        store: ObjectStore,
        spec: DatasetSpec,
        *,
        lease: Lease,
        on_commit: OnCommit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self._store = store
        self._lease = lease
        self._on_commit = on_commit
        self._clock = clock
        manifest = read_manifest(store)
        self._blocks = list(manifest.blocks) if manifest else []
        self._completion = read_completion(store)
        self.cursor = Cursor()
        self._skipped = 0
        # Where the source goes on behind the last row that was kept, and how many were skipped since: whether these
        # count depends on whether another row comes, not on what happens to be read together.
        self._behind_kept, self._skipped_since = self.cursor, 0
        self._committed_bytes = 0
        self._is_full = False
        self._restore(manifest)
        remove_leftovers(store)
        self._written_blocks, self._written_at = len(self._blocks), clock()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="block hash")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="block file")
        self._open = self._begin_block()

    @property
    def is_complete(self) -> bool:
        return self._completion is not None

    @property
    def total_samples(self) -> int:
        """Rows written so far, those of the open block included."""
        return sum(block.sample_count for block in self._blocks) + self._open.rows

    @property
    def block_room(self) -> int:
        """How many rows are missing until the open block is full, and committed."""
        return self.spec.block_size - self._open.rows

    @property
    def total_bytes(self) -> int:
        """Bytes of JSON lines written so far, before compression, those of the open block included."""
        return self._committed_bytes + self._open.num_bytes

    def append(self, batch: EncodedRows) -> bool:
        """Takes the lines over and commits blocks that become full; ``False`` once the dataset has enough."""
        batch = self._within_limits(batch)
        total = len(batch.ends)
        if total and (self.is_complete or self._is_closed_by_partial_block()):
            raise DatasetMismatch(
                f"{self._store.uri} is complete with {self.total_samples} samples, but the source has more: it "
                "changed since. Choose another directory."
            )
        taken = 0
        while taken < total:
            stop = min(total, taken + self.block_room)
            self._open.append(batch.data, batch.ends, taken, stop)
            taken = stop
            if not self.block_room:
                used = batch.consumed[taken - 1]
                self._commit(batch.after(used), self._skipped + self._skipped_since + used - taken)
        if total:
            used = batch.consumed[-1]
            self._skipped += self._skipped_since + used - total
            self._behind_kept, self._skipped_since = batch.after(used), 0
        else:
            used = 0
        self._skipped_since += batch.total_consumed - used
        self.cursor = batch.after(batch.total_consumed)
        return not self._is_full

    def finish(self) -> BlockManifest:
        """Commits the last block and the completeness of the dataset. Idempotent."""
        if self._completion is None:
            if self._is_full:
                self.cursor = self._behind_kept
            else:
                self._skipped += self._skipped_since
            self._skipped_since = 0
            if self._open.rows:
                self._commit(self.cursor, self._skipped)
            self._completion = Completion(
                total_blocks=len(self._blocks),
                total_samples=sum(block.sample_count for block in self._blocks),
                skipped_rows=self._skipped,
                digest=self._manifest(is_complete=True).digest,
                spec=self.spec,
            )
            self._create(COMPLETE_KEY, self._completion)
        self.discard()
        manifest = self._manifest(is_complete=True)
        self._write_manifest(manifest)
        return manifest

    def discard(self) -> None:
        """Drops the open block; what is committed stays. Idempotent."""
        self._open.discard()
        self._hashing.shutdown()
        self._writing.shutdown()

    def _begin_block(self) -> OpenBlock:
        return OpenBlock(
            self._store,
            len(self._blocks),
            self.spec.compression,
            hashing=self._hashing,
            writing=self._writing,
        )

    def _restore(self, manifest: BlockManifest | None) -> None:
        if manifest is not None and not self._blocks and self._completion is None:
            return
        last = read_commit(self._store, len(self._blocks) - 1) if self._blocks else None
        stored = self._completion.spec if self._completion else last.spec if last else None
        if self._blocks and stored is None:
            raise DatasetMismatch(
                f"{self._store.uri} holds blocks of other software: read them with BlockManager, or choose another "
                "directory to build into."
            )
        if stored is not None:
            self.spec.check_same(stored, where=self._store.uri)
        if last is not None:
            self.cursor = self._behind_kept = last.cursor
            self._skipped = last.skipped_rows
            self._committed_bytes = last.total_bytes
        if self._completion is not None:
            self._skipped = self._completion.skipped_rows

    def _within_limits(self, batch: EncodedRows) -> EncodedRows:
        total = room = len(batch.ends)
        if self.spec.max_rows is not None:
            room = min(room, self.spec.max_rows - self.total_samples)
        if self.spec.max_bytes is not None:
            left = self.spec.max_bytes - self.total_bytes
            room = min(room, int(np.searchsorted(batch.ends, left, side="right")))
        self._is_full = room < total or self.total_samples + room == self.spec.max_rows
        return batch if room == total else batch.first(room)

    def _is_closed_by_partial_block(self) -> bool:
        return bool(self._blocks) and self._blocks[-1].sample_count < self.spec.block_size

    def _commit(self, cursor: Cursor, skipped: int) -> None:
        # A process that was stopped for a while does not know that its lease was taken over until it asks.
        self._lease.renew()
        if self._lease.lost:
            raise self._lost()
        before = self._blocks[-1].end_index if self._blocks else 0
        name = block_name(self._open.block_id, self.spec.compression)
        self._committed_bytes += self._open.num_bytes
        digest, rows, index_data = self._open.close()
        try:
            self._store.take(self._open.path, f"blocks/{name}", digest)
        except NotFound as error:
            # Whoever took over removed the open block.
            raise self._lost() from error
        block = BlockEntry(
            block_id=self._open.block_id,
            sample_count=rows,
            start_index=before,
            end_index=before + rows,
            file_path=f"blocks/{name}",
            size_bytes=digest.size,
            sha256=digest.sha256,
        )
        self._store.put(block.index_key, index_data)
        commit = Commit(
            block=block,
            index_sha256=hashlib.sha256(index_data).hexdigest(),
            cursor=cursor,
            skipped_rows=skipped,
            total_bytes=self._committed_bytes,
            spec=self.spec,
        )
        self._create(commit_key(block.block_id), commit)
        self._open.discard()
        self._blocks.append(block)
        self._open = self._begin_block()
        manifest = self._manifest(is_complete=False)
        if self._is_manifest_due():
            self._write_manifest(manifest)
        logger.info("%s: block %d with %d samples", self.spec.dataset_name, block.block_id, rows)
        if self._on_commit is not None:
            self._on_commit(manifest)

    def _lost(self) -> ClaimLost:
        return ClaimLost(f"another process took over writing {self._store.uri}; this one stops.")

    def _create(self, key: str, record: msgspec.Struct) -> None:
        result = self._store.create(key, encode(record))
        if not result.created:
            raise DatasetMismatch(
                f"{self._store.uri}/{key} was written with other content by another process at the same time: the "
                "source gives different rows each time it is read, or changed. Build into another directory."
            )

    def _is_manifest_due(self) -> bool:
        grown = len(self._blocks) >= self._written_blocks * MANIFEST_GROWTH
        return grown or self._clock() - self._written_at >= MANIFEST_SECONDS

    def _manifest(self, *, is_complete: bool) -> BlockManifest:
        return BlockManifest.of(self.spec, self._blocks, skipped_rows=self._skipped, is_complete=is_complete)

    def _write_manifest(self, manifest: BlockManifest) -> None:
        self._store.put(MANIFEST_KEY, msgspec.json.format(encode(manifest), indent=2) + b"\n")
        self._written_blocks, self._written_at = len(self._blocks), self._clock()


def hold_lease(store: ObjectStore, *, ttl: float, done: Callable[[], bool] = lambda: False) -> Lease | None:
    """The right to write this dataset, waited for while another process has it; ``None`` once ``done()``."""
    lease = wait_for(store, LEASE_KEY, owner=f"{socket.gethostname()}:{os.getpid()}", ttl=ttl, done=done)
    if lease is not None and lease.term > 1:
        logger.info("going on with the dataset at %s", store.uri)
    return lease


def check_settings(spec: DatasetSpec) -> DatasetSpec:
    """Returns it, with counts of whatever type (numpy's, …) as plain ones, or raises ``ConfigError`` for a setting that
    is none.
    """
    counts = {"samples_per_block": spec.block_size, "max_rows": spec.max_rows, "max_bytes": spec.max_bytes}
    for name, count in counts.items():
        may_lack = count is None and name != "samples_per_block"
        if not may_lack and (not isinstance(count, SupportsIndex) or count < 1):
            raise ConfigError(f"{name} must be at least 1, got {count!r}.")
    if spec.on_bad_row not in ("raise", "skip"):
        raise ConfigError(f"on_bad_row must be 'raise' or 'skip', got {spec.on_bad_row!r}.")
    if spec.compression not in (None, "zstd"):
        raise ConfigError(f"compression must be None or 'zstd', got {spec.compression!r}.")
    size, rows, size_bytes = (None if count is None else index(count) for count in counts.values())
    return msgspec.structs.replace(spec, block_size=size, max_rows=rows, max_bytes=size_bytes)
