"""``ChunkTracker``: which chunk is whose, and which are trained."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from metaflow_hf.data.ledger import Claim, Ledger
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.standalone import StandaloneLedger
from metaflow_hf.errors import ConfigError
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.store.objects import new_nonce

DEFAULT_CHUNK_SIZE: Final = 4_000


class ChunkTracker:
    """Hands out chunks to any number of workers so that each is trained exactly once per epoch.

    ``root`` is the directory or URI of the tracker's state, shared by all workers; ``dataset`` a ``BlockManager``
    (whose chunk size counts) or a manifest (then chunks of 4,000). A worker that is killed loses its claims after
    ``lease_seconds`` (any from 1 up); nothing has to be repaired. ``seed`` and ``shuffle`` decide the order, another
    one in each epoch. With ``ledger`` the claims of a training by rounds are kept there instead, and ``root`` and
    the rest are not used. Thread-safe.
    """

    def __init__(
        self,
        root: str | Path | ObjectStore | None,
        dataset: BlockManager | BlockManifest,
        *,
        ledger: Ledger | None = None,
        worker_id: str | None = None,
        lease_seconds: float = 120.0,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{new_nonce()[:8]}"
        self._dataset = dataset
        self._ledger = ledger or _standalone(
            root, dataset, worker_id=self.worker_id, lease_seconds=lease_seconds, seed=seed, shuffle=shuffle
        )

    def claim_chunk(self) -> Claim | None:
        """A chunk (or a claim of the rounds) for this worker alone, or ``None`` when nothing is free now.

        After ``None``, ``check_epoch_complete`` tells whether the epoch is over or others are still at work. A dataset
        that its manager builds is waited for, block by block. While others write it, more chunks may come after
        ``None``; if nobody is writing the rest of it, ``UserError`` says so.
        """
        while True:
            known = self._dataset.manifest if isinstance(self._dataset, BlockManager) else None
            claim = self._ledger.claim()
            if claim is not None or not isinstance(self._dataset, BlockManager):
                return claim
            if known is None or known.is_complete:
                return None
            self._dataset.check_growing()
            if not self._dataset.wait_growth(known):
                return None

    def mark_chunk_complete(self, claim: Claim, steps: int = 0) -> None:
        """Records the claim as trained; once, for ever. Raises ``ClaimLost`` when another worker took it over."""
        self._ledger.complete(claim, steps)

    def release(self, claim: Claim) -> None:
        """Gives the claim back untrained; others may have it at once."""
        self._ledger.release(claim)

    def is_chunk_trained(self, block_id: int, chunk_id: int) -> bool:
        """Whether the whole chunk is trained in the current epoch. Raises ``IndexError`` for one that is none."""
        return self._ledger.is_chunk_trained(block_id, chunk_id)

    def check_epoch_complete(self) -> bool:
        """Whether every chunk of the current epoch is trained."""
        return self._ledger.is_epoch_complete()

    def get_progress_stats(self) -> dict[str, Any]:
        """``epoch, total_chunks, done_chunks, claimed_chunks, done_samples, workers`` as known now."""
        return self._ledger.progress()

    def start_new_epoch(self) -> None:
        """Advances by one epoch, once, however many workers call it. Raises ``UserError`` before the current one
        is complete.
        """
        self._ledger.start_new_epoch()

    def close(self) -> None:
        """Gives back the claims that are still held by the standalone ledger; idempotent."""
        if isinstance(self._ledger, StandaloneLedger):
            self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _standalone(
    root: str | Path | ObjectStore | None,
    dataset: BlockManager | BlockManifest,
    *,
    worker_id: str,
    lease_seconds: float,
    seed: int,
    shuffle: bool,
) -> StandaloneLedger:
    if root is None:
        raise ConfigError("a ChunkTracker without a ledger needs a root: a directory or a URI for its state.")
    if lease_seconds < 1:
        raise ConfigError(f"lease_seconds must be at least 1, got {lease_seconds}.")
    blocks: Callable[[], BlockManifest]
    if isinstance(dataset, BlockManager):
        manager = dataset
        blocks, whole, chunk_size = (
            (lambda: manager.manifest),
            manager.wait_complete,
            manager.dataset_chunk_size,
        )
    elif not isinstance(dataset, BlockManifest):
        raise ConfigError(f"a ChunkTracker tracks a BlockManager or a manifest, not {dataset!r:.80}.")
    else:
        manifest = dataset
        blocks = whole = lambda: manifest
        chunk_size = DEFAULT_CHUNK_SIZE
    return StandaloneLedger(
        open_store(root) if isinstance(root, (str, Path)) else root,
        blocks,
        whole=whole,
        chunk_size=chunk_size,
        worker_id=worker_id,
        lease_seconds=lease_seconds,
        seed=seed,
        shuffle=shuffle,
    )
