"""The ledger for people with a training loop of their own: create-only objects in any store.

``epochs/<epoch>.json`` holds the order of an epoch and is created by who starts it; ``epoch`` describes the rest.
What is done rests on ``create`` alone; claims only keep workers from doing the same work twice. A worker looks at
the one or two thousands of positions that are being worked on, so what a claim or a start costs does not grow
with the dataset.
"""

import logging
import random
import threading
from collections.abc import Callable
from operator import index
from typing import Any, Final

from metaflow_hf.data.epoch import THOUSAND, EpochRecords
from metaflow_hf.data.ledger import Claim
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.errors import ClaimLost, DatasetMismatch, StoreUnavailable, UserError
from metaflow_hf.store import ObjectStore, encode_json
from metaflow_hf.store.leases import Lease, Observer, acquire, current_owner
from metaflow_hf.store.objects import new_nonce

logger = logging.getLogger("metaflow_hf.data")

SCHEMA: Final = 1
# How many of the free positions are tried in random order, so that workers seldom try the same one.
SPREAD: Final = 128


class StandaloneLedger:
    """Claims whole chunks of a dataset, exactly once per epoch whatever is killed. Thread-safe.

    ``blocks`` gives the manifest as known now; while it grows, epoch 0 runs in the order of the files. ``whole``
    waits for the complete one (default: what ``blocks`` gives). All
    workers give the same ``seed``, ``shuffle`` and ``chunk_size``: another order for an epoch that was started
    raises ``DatasetMismatch``. A claim whose worker died is free again after ``lease_seconds``.
    """

    def __init__(
        self,
        store: ObjectStore,
        blocks: Callable[[], BlockManifest],
        *,
        whole: Callable[[], BlockManifest] | None = None,
        chunk_size: int,
        worker_id: str,
        lease_seconds: float = 120.0,
        seed: int = 0,
        shuffle: bool = True,
        rng: random.Random | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._whole = whole or blocks
        self._chunk_size = index(chunk_size)
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._seed = index(seed)
        self._shuffle = shuffle
        self._rng = rng or random.Random()
        self._observer = observer or Observer()
        self._lock = threading.RLock()
        # What this worker holds now: token -> its lease.
        self._held: dict[str, tuple[Claim, Lease]] = {}
        started = [int(name.removesuffix(".json")) for name in store.children("epochs")]
        self._records = self._enter(max(started, default=0))

    def claim(self) -> Claim | None:
        with self._lock:
            claim = self._take_over(everywhere=False)
            while claim is None and self._first_open < self._records.num_thousands:
                claim, is_used_up = self._claim_free(self._first_open)
                if claim is None and not is_used_up:
                    break
                self._first_open += is_used_up
            return claim or self._take_over(everywhere=True)

    def complete(self, claim: Claim, steps: int) -> None:
        with self._lock:
            _, lease = self._held.get(claim.token, (None, None))
            current = self._records
        records = current if claim.epoch == current.epoch else self._records_of(claim.epoch, shuffle=False)
        if lease is None:
            record = records.done_record(claim.position)
            if record is None or record["token"] != claim.token:
                raise ClaimLost(f"{_spell(claim)} is not held by this worker: drop its work.")
            return
        # A process that was stopped for a while does not know that its claim was taken over until it asks.
        # It stays held through an outage, so that the caller may try again.
        lease.renew()
        if lease.lost:
            self._let_go(claim, lease)
            raise ClaimLost(f"{_spell(claim)} was taken over by another worker: drop its work.")
        record = {"token": claim.token, "worker": self._worker_id, "steps": steps}
        created = records.create_done(claim.position, record)
        self._let_go(claim, lease)
        if not created:
            raise ClaimLost(f"{_spell(claim)} was completed by another worker: drop its work.")

    def release(self, claim: Claim) -> None:
        with self._lock:
            _, lease = self._held.get(claim.token, (None, None))
            if claim.epoch == self._records.epoch:
                self._outstanding.add(claim.position)
        if lease is None:
            raise ClaimLost(f"{_spell(claim)} is not held by this worker.")
        self._let_go(claim, lease)

    def _let_go(self, claim: Claim, lease: Lease) -> None:
        with self._lock:
            self._held.pop(claim.token, None)
        lease.release()

    def is_chunk_trained(self, block_id: int, chunk_id: int) -> bool:
        with self._lock:
            return self._records.is_done(self._records.position_of(block_id, chunk_id))

    def is_epoch_complete(self) -> bool:
        with self._lock:
            return self._records.is_complete()

    def progress(self) -> dict[str, Any]:
        with self._lock:
            done, claimed = self._records.survey()
            owners = [current_owner(self._store, self._records.claim_key(position)) for position in claimed]
            held = [owner for owner in owners if owner is not None]
            chunks, samples = self._records.num_done(done)
            return {
                "epoch": self._records.epoch,
                "total_chunks": self._records.num_positions,
                "done_chunks": chunks,
                "claimed_chunks": len(held),
                "done_samples": samples,
                "workers": len(set(held)),
            }

    def start_new_epoch(self) -> None:
        with self._lock:
            if not self.is_epoch_complete():
                stats = self.progress()
                raise UserError(
                    f"epoch {stats['epoch']} is not complete: {stats['done_chunks']} of {stats['total_chunks']} "
                    "chunks are done. Claim until check_epoch_complete() says so."
                )
            self._records = self._enter(self._records.epoch + 1)

    def close(self) -> None:
        """Gives back whatever is still claimed; idempotent."""
        with self._lock:
            held, self._held = self._held, {}
        for _, lease in held.values():
            lease.release()

    def _enter(self, epoch: int) -> EpochRecords:
        manifest = self._blocks()
        record = self._epoch_record(manifest)
        stored = self._store.create(f"epochs/{epoch:05d}.json", encode_json(record)).json()
        if stored["dataset"] is not None and not manifest.is_complete:
            # Who began it knew already that the dataset was complete.
            record = self._epoch_record(self._whole())
        elif stored["dataset"] is None:
            # The epoch was begun while the dataset grew, in the order of the files.
            record |= {"dataset": None, "shuffle": False}
        differences = [
            f"{k}: {stored.get(k)!r} there, {record[k]!r} here" for k in record if stored.get(k) != record[k]
        ]
        if differences:
            raise DatasetMismatch(
                f"{self._store.uri} tracks epoch {epoch} of other chunks ({'; '.join(differences)}): use the same "
                "dataset, chunk size, seed and shuffle, or another root."
            )
        # The first thousand that may have positions nobody ever claimed.
        self._first_open = 0
        # Positions that others claimed and that were not done when last seen.
        self._outstanding: set[int] = set()
        records = self._records_of(epoch, shuffle=bool(stored["shuffle"]))
        records.refresh()
        return records

    def _epoch_record(self, manifest: BlockManifest) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "seed": self._seed,
            "chunk_size": self._chunk_size,
            "shuffle": self._shuffle and manifest.is_complete,
            "dataset": manifest.digest if manifest.is_complete else None,
        }

    def _records_of(self, epoch: int, *, shuffle: bool) -> EpochRecords:
        return EpochRecords(
            self._store,
            self._blocks,
            epoch=epoch,
            chunk_size=self._chunk_size,
            seed=self._seed,
            shuffle=shuffle,
        )

    def _claim_free(self, thousand: int) -> tuple[Claim | None, bool]:
        """Claims a position that nobody ever claimed, or says whether the thousand has none left for good."""
        if thousand in self._records.full:
            return None, True
        # Asked before the positions are counted: more may come while the free ones are tried.
        is_growing = self._records.is_growing
        done, claimed = self._records.look(thousand)
        self._note_outstanding(thousand, done, claimed)
        positions = self._records.positions(thousand)
        free = [p for p in positions if p not in done and p not in claimed]
        candidates = free[:SPREAD]
        self._rng.shuffle(candidates)
        for position in candidates:
            claim = self._try(position)
            if claim is not None:
                return claim, False
            self._outstanding.add(position)
        may_grow = is_growing and len(positions) < THOUSAND
        return None, len(free) <= SPREAD and not may_grow

    def _take_over(self, *, everywhere: bool) -> Claim | None:
        """Claims what was released or whose worker died: one try in the oldest thousand that others hold a part of,
        or every try there is.
        """
        thousands = sorted({position // THOUSAND for position in self._outstanding})
        for thousand in thousands if everywhere else thousands[:1]:
            self._note_outstanding(thousand, *self._records.look(thousand))
            waiting = sorted(p for p in self._outstanding if p // THOUSAND == thousand)
            for position in waiting if everywhere else self._rng.sample(waiting, min(1, len(waiting))):
                claim = self._try(position)
                if claim is not None:
                    self._outstanding.discard(position)
                    return claim
        return None

    def _note_outstanding(self, thousand: int, done: set[int], claimed: set[int]) -> None:
        mine = {claim.position for claim, _ in self._held.values() if claim.epoch == self._records.epoch}
        self._outstanding = {p for p in self._outstanding if p // THOUSAND != thousand} | (
            claimed - done - mine
        )

    def _try(self, position: int) -> Claim | None:
        lease = acquire(
            self._store,
            self._records.claim_key(position),
            owner=self._worker_id,
            ttl=self._lease_seconds,
            observer=self._observer,
        )
        if lease is None:
            return None
        try:
            is_done = self._records.is_done(position)
        except StoreUnavailable:
            # Nobody would ever give back what is not held: without a heartbeat it is free again in the end.
            lease.abandon()
            raise
        if is_done:
            lease.release()
            return None
        span = self._records.span(position)
        claim = Claim(
            block_id=span.block_id,
            chunk_id=span.chunk_id,
            start=span.start,
            stop=span.stop,
            epoch=self._records.epoch,
            position=position,
            token=new_nonce(),
        )
        self._held[claim.token] = (claim, lease)
        return claim


def _spell(claim: Claim) -> str:
    return f"chunk {claim.chunk_id} of block {claim.block_id} (epoch {claim.epoch})"
