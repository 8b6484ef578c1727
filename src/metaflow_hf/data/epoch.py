"""What the store knows of one epoch of the standalone ledger, thousand by thousand.

    claims/<epoch>/<thousand>/<position>/…    a lease: terms and heartbeats
    done/<epoch>/<thousand>/<position>        created once: the chunk is trained
    full/<epoch>/<thousand>.json              created once: all positions of this thousand are done

A position is the number of a chunk in the epoch's order.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.order import ClaimOrder, ClaimSpan
from metaflow_hf.errors import NotFound
from metaflow_hf.store import ObjectStore, encode_json

THOUSAND: Final = 1000


class EpochRecords:
    """Done and claimed positions of ``epoch``; what it remembers is never wrong, only behind.

    ``blocks`` gives the manifest as known now: while it grows, so does the last thousand.
    """

    def __init__(
        self,
        store: ObjectStore,
        blocks: Callable[[], BlockManifest],
        *,
        epoch: int,
        chunk_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.epoch = epoch
        self.full: set[int] = set()
        self._store = store
        self._blocks = blocks
        self._chunk_size = chunk_size
        self._seed = seed
        self._shuffle = shuffle
        self._order: tuple[int, ClaimOrder] | None = None

    @property
    def num_positions(self) -> int:
        return self._current_order().positions_per_epoch

    @property
    def num_thousands(self) -> int:
        return -(-self.num_positions // THOUSAND)

    @property
    def is_growing(self) -> bool:
        return not self._blocks().is_complete

    def positions(self, thousand: int) -> range:
        """The positions of one thousand; the last is smaller."""
        first = thousand * THOUSAND
        return range(first, min(first + THOUSAND, self.num_positions))

    def span(self, position: int) -> ClaimSpan:
        """Which chunk a position is."""
        return self._current_order().locate(self.epoch * self.num_positions + position)

    def position_of(self, block_id: int, chunk_id: int) -> int:
        """The position of a chunk. Raises ``IndexError`` for one that is none."""
        first = self._current_order().positions_of(self.epoch, block_id, chunk_id).start
        return first - self.epoch * self.num_positions

    def look(self, thousand: int) -> tuple[set[int], set[int]]:
        """Which positions of a thousand are done, and which were ever claimed."""
        place = f"{self.epoch:05d}/{thousand:06d}"
        # Claims first: what is done between the two listings is then in both.
        claimed = {int(name) for name in self._store.children(f"claims/{place}")}
        done = {int(name) for name in self._store.children(f"done/{place}")}
        self.note_full(thousand, done)
        return done, claimed

    def survey(self) -> tuple[list[int], list[int]]:
        """Done and claimed (not done) positions of all thousands that are begun and not full."""
        self.refresh()
        done_positions: list[int] = []
        claimed_positions: list[int] = []
        for thousand in range(self.num_thousands):
            if thousand in self.full:
                continue
            done, claimed = self.look(thousand)
            if not done and not claimed:
                break
            if thousand not in self.full:
                done_positions += done
                claimed_positions += claimed - done
        return done_positions, claimed_positions

    def is_complete(self) -> bool:
        """Whether every position is done."""
        if self.is_growing:
            return False
        self.refresh()
        for thousand in range(self.num_thousands):
            if thousand not in self.full:
                self.look(thousand)
            if thousand not in self.full:
                return False
        return True

    def is_done(self, position: int) -> bool:
        return position // THOUSAND in self.full or self.done_record(position) is not None

    def done_record(self, position: int) -> dict[str, Any] | None:
        """What was written when the position was done, or ``None``."""
        try:
            record: dict[str, Any] = json.loads(self._store.get(self._done_key(position)))
        except NotFound:
            return None
        return record

    def create_done(self, position: int, record: dict[str, Any]) -> bool:
        """Makes the position done, once; ``False`` when somebody else did."""
        return self._store.create(self._done_key(position), encode_json(record)).created

    def num_done(self, done: Iterable[int]) -> tuple[int, int]:
        """Chunks and samples of the full thousands and of ``done`` besides."""
        chunks = samples = 0
        for first, stop in self._full_runs():
            chunks += stop - first
            samples += self._current_order().num_samples(self.epoch, first, stop)
        for position in done:
            chunks, samples = chunks + 1, samples + self._num_samples(position)
        return chunks, samples

    def note_full(self, thousand: int, done: set[int]) -> None:
        """Records that a thousand is done, if it is, so that nobody has to list it again."""
        # Asked first: what is complete then has all its positions, what grows may have more by the time they are counted.
        is_growing = self.is_growing
        positions = self.positions(thousand)
        may_grow = is_growing and len(positions) < THOUSAND
        if may_grow or len(done) < len(positions) or thousand in self.full:
            return
        samples = self._current_order().num_samples(self.epoch, positions.start, positions.stop)
        self._store.create(
            self._full_key(thousand), encode_json({"chunks": len(positions), "samples": samples})
        )
        self.full.add(thousand)

    def refresh(self) -> None:
        """Learns which thousands others found to be full."""
        names = self._store.children(f"full/{self.epoch:05d}")
        self.full |= {int(name.removesuffix(".json")) for name in names}

    def claim_key(self, position: int) -> str:
        """The key of the position's lease."""
        return f"claims/{self.epoch:05d}/{position // THOUSAND:06d}/{position:09d}"

    def _full_runs(self) -> Iterator[tuple[int, int]]:
        """The positions ``[first, stop)`` of consecutive full thousands."""
        run: tuple[int, int] | None = None
        for thousand in sorted(self.full):
            positions = self.positions(thousand)
            if run is not None and run[1] == positions.start:
                run = run[0], positions.stop
                continue
            if run is not None:
                yield run
            run = positions.start, positions.stop
        if run is not None:
            yield run

    def _num_samples(self, position: int) -> int:
        span = self.span(position)
        return span.stop - span.start

    def _current_order(self) -> ClaimOrder:
        manifest = self._blocks()
        if self._order is None or self._order[0] != manifest.total_blocks:
            order = ClaimOrder(
                manifest.blocks,
                self._chunk_size,
                self._chunk_size,
                seed=self._seed,
                epochs=self.epoch + 1,
                shuffle=self._shuffle,
            )
            self._order = (manifest.total_blocks, order)
        return self._order[1]

    def _done_key(self, position: int) -> str:
        return f"done/{self.epoch:05d}/{position // THOUSAND:06d}/{position:09d}"

    def _full_key(self, thousand: int) -> str:
        return f"full/{self.epoch:05d}/{thousand:06d}.json"
