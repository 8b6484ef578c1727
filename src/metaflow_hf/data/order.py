"""The order in which samples are trained: pure functions of the seed, the epoch and the sizes of the blocks.

Blocks are shuffled, then cut into windows of ``WINDOW_BLOCKS`` blocks, and the chunks of a window are shuffled
together; claims are shuffled within their chunk, rows within their claim. Every worker computes the same order
alone, in time and memory that do not grow with the number of positions.

Shuffles sort the raw 64-bit output of Philox, whose stream numpy guarantees never to change; numpy's and
Python's own shuffles give no such promise.
"""

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from metaflow_hf.errors import ConfigError

WINDOW_BLOCKS: Final = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples ``[start, stop)`` of one block; row numbers count within the block."""

    block_id: int
    chunk_id: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ClaimSpan:
    """Where one position lies: rows ``[start, stop)`` of a block, all of one chunk, in one epoch."""

    position: int
    epoch: int
    block_id: int
    chunk_id: int
    start: int
    stop: int


class SizedBlock(Protocol):
    """Anything that knows its number of samples: ``Block`` and the entries of a ``BlockManifest``."""

    @property
    def total_samples(self) -> int: ...


class Order(Protocol):
    """The order of claims as training uses it: ``ClaimOrder`` of one dataset, ``MixedOrder`` of a mixture."""

    @property
    def num_positions(self) -> int: ...
    @property
    def positions_per_epoch(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    def locate(self, position: int) -> ClaimSpan: ...
    def row_order(self, position: int) -> list[int]: ...
    def positions_of(self, epoch: int, block_id: int, chunk_id: int) -> Sequence[int]: ...
    def num_samples(self, epoch: int, first: int, stop: int) -> int: ...
    def chunks(self) -> Iterator[Sequence[int]]: ...


def permutation(n: int, *key: object) -> list[int]:
    """A shuffle of ``range(n)`` that depends on ``key`` only, on every machine and in every version of numpy."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    stream: Any = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    order: list[int] = np.argsort(stream.random_raw(n), kind="stable").tolist()
    return order


def chunk_order(
    seed: int,
    epoch: int,
    blocks: Sequence[int] | Sequence[SizedBlock],
    chunk_size: int,
    shuffle: bool = True,
) -> list[Chunk]:
    """All chunks of one epoch in the order of training; each sample of ``blocks`` is in exactly one of them.

    ``blocks`` gives the samples of each block in the order of block ids, ``chunk_size`` the samples of a full
    chunk. Without ``shuffle`` it is the order of the files.
    """
    samples = _sizes(blocks)
    _check_positive("chunk_size", chunk_size)
    seed, epoch = operator.index(seed), operator.index(epoch)
    windows = _windows(seed, epoch, len(samples), shuffle=shuffle)
    return [
        Chunk(block, chunk, chunk * chunk_size, min((chunk + 1) * chunk_size, samples[block]))
        for number, window in enumerate(windows)
        for block, chunk in _window_chunks(seed, epoch, number, window, samples, chunk_size, shuffle=shuffle)
    ]


class ClaimOrder:
    """The order of claims over all epochs, computed where it is asked for.

    ``block_samples`` are the samples of each block in the order of block ids. A claim is ``claim_samples``
    consecutive rows of one chunk, fewer at a chunk's end. Positions ``0 <= p < num_positions`` run through the
    epochs one after the other; within an epoch every row lies in exactly one claim.
    """

    def __init__(
        self,
        block_samples: Sequence[int] | Sequence[SizedBlock],
        chunk_size: int,
        claim_samples: int,
        *,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
    ) -> None:
        for name, value in (("chunk_size", chunk_size), ("claim_samples", claim_samples), ("epochs", epochs)):
            _check_positive(name, value)
        self._samples = _sizes(block_samples)
        self._chunk_size = chunk_size
        self._claim_samples = min(claim_samples, chunk_size)
        self._seed = operator.index(seed)
        self._shuffle = shuffle
        # Nearly all blocks have the same size.
        claims = {samples: self._claims_of_block(samples) for samples in set(self._samples)}
        self._block_claims = [claims[samples] for samples in self._samples]
        self.epochs = epochs
        self.positions_per_epoch = sum(self._block_claims)
        self.num_positions = self.positions_per_epoch * epochs
        # Workers walk through the order: what they ask next lies in the same window of the same epoch.
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._window_of = lru_cache(maxsize=2)(self._windows_by_block)
        self._window = lru_cache(maxsize=8)(self._lay_out_window)
        self._within_chunk = lru_cache(maxsize=64)(self._order_within_chunk)

    def locate(self, position: int) -> ClaimSpan:
        """Where ``position`` lies. Raises ``IndexError`` outside of ``[0, num_positions)``."""
        if not 0 <= position < self.num_positions:
            raise IndexError(f"position {position} is outside of [0, {self.num_positions}).")
        epoch, index = divmod(position, self.positions_per_epoch)
        starts, windows = self._epoch(epoch)
        number = bisect_right(starts, index) - 1
        claim_starts, chunks = self._window(epoch, number, windows[number])
        index -= starts[number]
        place = bisect_right(claim_starts, index) - 1
        block_id, chunk_id = chunks[place]
        claim = self._within_chunk(epoch, block_id, chunk_id)[index - claim_starts[place]]
        start = chunk_id * self._chunk_size + claim * self._claim_samples
        stop = min(start + self._claim_samples, self._chunk_stop(block_id, chunk_id))
        return ClaimSpan(position, epoch, block_id, chunk_id, start, stop)

    def positions_of(self, epoch: int, block_id: int, chunk_id: int) -> range:
        """The positions whose claims make up one chunk in one epoch. Raises ``IndexError`` if there is none."""
        if not (0 <= epoch < self.epochs and 0 <= block_id < len(self._samples) and chunk_id >= 0):
            raise IndexError(f"there is no chunk {chunk_id} in block {block_id}, epoch {epoch}.")
        starts, windows = self._epoch(epoch)
        number = self._window_of(epoch)[block_id]
        claim_starts, chunks = self._window(epoch, number, windows[number])
        try:
            place = chunks.index((block_id, chunk_id))
        except ValueError:
            raise IndexError(f"block {block_id} has no chunk {chunk_id}.") from None
        first = epoch * self.positions_per_epoch + starts[number] + claim_starts[place]
        return range(first, first + self._claims_of_chunk(block_id, chunk_id))

    def chunks(self) -> Iterator[range]:
        """The positions of every chunk, over all epochs, in the order of training."""
        position = 0
        while position < self.num_positions:
            span = self.locate(position)
            chunk = self.positions_of(span.epoch, span.block_id, span.chunk_id)
            yield chunk
            position = chunk.stop

    def claim_sizes(self, epoch: int) -> npt.NDArray[np.int32]:
        """The rows of each claim of one epoch, in the order of positions."""
        sizes = np.full(self.positions_per_epoch, self._claim_samples, np.int32)
        starts, windows = self._epoch(epoch)
        for number, window in enumerate(windows):
            for first, (block, chunk) in zip(*self._window(epoch, number, window), strict=True):
                last = self._claims_of_chunk(block, chunk) - 1
                rest = self._chunk_stop(block, chunk) - chunk * self._chunk_size - last * self._claim_samples
                if rest < self._claim_samples:
                    # The last claim of a chunk, wherever the shuffle put it.
                    place = self._order_within_chunk(epoch, block, chunk).index(last)
                    sizes[starts[number] + first + place] = rest
        return sizes

    def num_samples(self, epoch: int, first: int, stop: int) -> int:
        """The samples of the positions ``[first, stop)``, counted within one epoch; cheap however many these are."""
        return self._samples_before(epoch, stop) - self._samples_before(epoch, first)

    def row_order(self, position: int) -> list[int]:
        """The order in which the claim's rows are used, as offsets from its ``start``."""
        span = self.locate(position)
        count = span.stop - span.start
        if not self._shuffle:
            return list(range(count))
        return permutation(count, "rows", self._seed, span.epoch, span.block_id, span.start)

    def _samples_before(self, epoch: int, index: int) -> int:
        starts, windows = self._epoch(epoch)
        number = bisect_right(starts, index) - 1
        if number < 0:
            return 0
        whole = sum(self._samples[block] for window in windows[:number] for block in window)
        begin = epoch * self.positions_per_epoch
        part = (self.locate(begin + i) for i in range(starts[number], index))
        return whole + sum(span.stop - span.start for span in part)

    def _claims_of_block(self, samples: int) -> int:
        full, rest = divmod(samples, self._chunk_size)
        return full * _ceil(self._chunk_size, self._claim_samples) + _ceil(rest, self._claim_samples)

    def _chunk_stop(self, block_id: int, chunk_id: int) -> int:
        return min((chunk_id + 1) * self._chunk_size, self._samples[block_id])

    def _claims_of_chunk(self, block_id: int, chunk_id: int) -> int:
        return _ceil(self._chunk_stop(block_id, chunk_id) - chunk_id * self._chunk_size, self._claim_samples)

    def _lay_out_epoch(self, epoch: int) -> tuple[list[int], list[tuple[int, ...]]]:
        windows = list(_windows(self._seed, epoch, len(self._samples), shuffle=self._shuffle))
        counts = (sum(self._block_claims[block] for block in window) for window in windows)
        return [0, *accumulate(counts)][:-1], windows

    def _windows_by_block(self, epoch: int) -> dict[int, int]:
        return {block: number for number, window in enumerate(self._epoch(epoch)[1]) for block in window}

    def _lay_out_window(
        self, epoch: int, number: int, window: tuple[int, ...]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        chunks = _window_chunks(
            self._seed, epoch, number, window, self._samples, self._chunk_size, shuffle=self._shuffle
        )
        counts = (self._claims_of_chunk(block, chunk) for block, chunk in chunks)
        return [0, *accumulate(counts)][:-1], chunks

    def _order_within_chunk(self, epoch: int, block_id: int, chunk_id: int) -> Sequence[int]:
        count = self._claims_of_chunk(block_id, chunk_id)
        if not self._shuffle:
            return range(count)
        return permutation(count, "claims", self._seed, epoch, block_id, chunk_id)


def _windows(seed: int, epoch: int, num_blocks: int, *, shuffle: bool) -> Iterator[tuple[int, ...]]:
    order = permutation(num_blocks, "blocks", seed, epoch) if shuffle else range(num_blocks)
    for start in range(0, num_blocks, WINDOW_BLOCKS):
        yield tuple(order[start : start + WINDOW_BLOCKS])


def _window_chunks(
    seed: int,
    epoch: int,
    number: int,
    window: tuple[int, ...],
    samples: Sequence[int],
    chunk_size: int,
    *,
    shuffle: bool,
) -> list[tuple[int, int]]:
    chunks = [(block, chunk) for block in window for chunk in range(_ceil(samples[block], chunk_size))]
    if not shuffle:
        return chunks
    return [chunks[i] for i in permutation(len(chunks), "chunks", seed, epoch, number)]


def _sizes(blocks: Sequence[int] | Sequence[SizedBlock]) -> list[int]:
    return [block if isinstance(block, int) else block.total_samples for block in blocks]


def _ceil(amount: int, unit: int) -> int:
    return -(-amount // unit)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}.")
