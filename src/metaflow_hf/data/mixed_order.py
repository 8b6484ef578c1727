"""The order of claims of several datasets in one sequence of positions: a pure function of sizes, weights and seed.

Each dataset keeps the order that it has alone. The claim of a dataset that is due first comes next: the one whose
middle row, counted in rows of its dataset and divided by the dataset's weight, is the smallest. So at every position
the share of a dataset differs from its weight by about one claim at most.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from metaflow_hf.data.order import ClaimOrder, ClaimSpan
from metaflow_hf.errors import ConfigError

# Each dataset is shuffled with a seed of its own; configured seeds are below 2**31.
_SEED_STRIDE: Final = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPart:
    """One dataset of a mixture: the samples of each of its blocks, its share, and how often it may be trained.

    ``weight`` is relative to those of the other datasets, or ``None`` in all of them: then each dataset is trained
    ``epochs`` times as a whole.
    """

    block_samples: Sequence[int]
    epochs: int = 1
    weight: float | None = None

    @property
    def available(self) -> int:
        """The samples over all epochs."""
        return sum(self.block_samples) * self.epochs


def samples_of_mixture(available: Sequence[int], weights: Sequence[float | None]) -> list[float]:
    """How many samples of each dataset a mixture trains, before they are rounded to claims.

    Args:
        available: The samples of each dataset over all its epochs.
        weights: The weight of each dataset, or ``None`` for all of them.

    Returns:
        All of ``available`` without weights. With weights as many as the weights allow until one dataset has run out.

    """
    rates = _rates(available, weights)
    end = min(samples / rate for samples, rate in zip(available, rates, strict=True))
    return [min(rate * end, float(samples)) for samples, rate in zip(available, rates, strict=True)]


def part_seed(seed: int, number: int) -> int:
    """The seed of dataset ``number``: datasets of equal sizes must not be shuffled in the same way."""
    return seed + number * _SEED_STRIDE


class MixedOrder:
    """The order of claims of a mixture, with the interface of ``ClaimOrder``.

    Blocks are numbered through over all datasets. The mixture is one epoch; ``ClaimSpan.epoch`` is that of the claim's
    dataset. With weights the mixture ends where the first dataset has run out. Memory: about 13 bytes a position.

    Args:
        parts: The datasets, in the order of their block ids.
        chunk_size: Samples of a full chunk.
        claim_samples: Samples of a full claim.
        seed: Of all shuffles.
        shuffle: ``False`` keeps the order of the files within each dataset.

    Raises:
        ConfigError: for a dataset without samples, and where some datasets have a weight and others none.

    """

    def __init__(
        self,
        parts: Sequence[OrderPart],
        chunk_size: int,
        claim_samples: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        available = [part.available for part in parts]
        rates = _rates(available, [part.weight for part in parts])
        end = min(samples / rate for samples, rate in zip(available, rates, strict=True))
        self._orders = [
            ClaimOrder(
                part.block_samples,
                chunk_size,
                claim_samples,
                seed=part_seed(seed, number),
                epochs=part.epochs,
                shuffle=shuffle,
            )
            for number, part in enumerate(parts)
        ]
        self._first_blocks = [0, *accumulate(len(part.block_samples) for part in parts)]
        found = [
            _due(order, part, rate, end) for order, part, rate in zip(self._orders, parts, rates, strict=True)
        ]
        due = np.concatenate([times for times, _ in found])
        sequence = np.argsort(due, kind="stable")
        counts = [len(times) for times, _ in found]
        self._part = np.repeat(np.arange(len(parts), dtype=np.int16), counts)[sequence]
        self._index = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[sequence]
        self._sizes = np.concatenate([sizes for _, sizes in found])[sequence]
        places = np.empty(len(sequence), np.int32)
        places[sequence] = np.arange(len(sequence), dtype=np.int32)
        # Of each dataset: the position in the mixture of each of its claims.
        self._places = np.split(places, np.cumsum(counts)[:-1])
        self.samples = tuple(int(sizes.sum()) for _, sizes in found)
        self.epochs = 1
        self.num_positions = self.positions_per_epoch = len(sequence)

    def part_of(self, position: int) -> int:
        """The number of the dataset that a position is of."""
        self._check(position)
        return int(self._part[position])

    def locate(self, position: int) -> ClaimSpan:
        """Where ``position`` lies. Raises ``IndexError`` outside of ``[0, num_positions)``."""
        part = self.part_of(position)
        span = self._orders[part].locate(int(self._index[position]))
        block_id = self._first_blocks[part] + span.block_id
        return ClaimSpan(position, span.epoch, block_id, span.chunk_id, span.start, span.stop)

    def row_order(self, position: int) -> list[int]:
        """The order in which the claim's rows are used, as offsets from its ``start``."""
        return self._orders[self.part_of(position)].row_order(int(self._index[position]))

    def positions_of(self, epoch: int, block_id: int, chunk_id: int) -> list[int]:
        """The positions whose claims make up one chunk in one epoch of its dataset.

        With weights fewer where the mixture ends within the chunk. Raises ``IndexError`` if there is none.
        """
        part = bisect_right(self._first_blocks, block_id) - 1
        if not 0 <= part < len(self._orders):
            raise IndexError(f"there is no block {block_id}.")
        claims = self._orders[part].positions_of(epoch, block_id - self._first_blocks[part], chunk_id)
        found = self._mixed(part, claims)
        if not found:
            raise IndexError(f"chunk {chunk_id} of block {block_id}, epoch {epoch}, is not trained.")
        return found

    def chunks(self) -> Iterator[list[int]]:
        """The positions of every chunk, dataset by dataset."""
        for part, order in enumerate(self._orders):
            for claims in order.chunks():
                found = self._mixed(part, claims)
                if not found:
                    break
                yield found

    def num_samples(self, epoch: int, first: int, stop: int) -> int:
        """The samples of the positions ``[first, stop)``; ``epoch`` is 0, because the mixture is one epoch."""
        del epoch
        return int(self._sizes[first:stop].sum())

    def samples_at(self, positions: Sequence[tuple[int, int]]) -> list[int]:
        """The samples of each dataset in ranges ``[start, stop)`` of positions."""
        counted = np.zeros(len(self._orders), np.int64)
        for start, stop in positions:
            sizes = self._sizes[start:stop]
            counted += np.bincount(self._part[start:stop], sizes, len(counted)).astype(np.int64)
        return counted.tolist()

    def _mixed(self, part: int, claims: range) -> list[int]:
        places: list[int] = self._places[part][claims.start : claims.stop].tolist()
        return places

    def _check(self, position: int) -> None:
        if not 0 <= position < self.num_positions:
            raise IndexError(f"position {position} is outside of [0, {self.num_positions}).")


def _rates(available: Sequence[int], weights: Sequence[float | None]) -> list[float]:
    """What the datasets contribute in a unit of time: their weights, or all of each dataset in the same time."""
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise ConfigError("either all datasets of a mixture have a weight, or none has.")
    if not available or min(available) < 1:
        raise ConfigError("each dataset of a mixture must have at least 1 sample.")
    return given or [float(samples) for samples in available]


def _due(
    order: ClaimOrder, part: OrderPart, rate: float, end: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """When each claim of a dataset is due, and its rows; only the claims that are due until ``end``."""
    epochs = min(math.ceil(rate * end / sum(part.block_samples)) + 1, part.epochs)
    sizes = np.concatenate([order.claim_sizes(epoch) for epoch in range(epochs)])
    stops = np.cumsum(sizes, dtype=np.int64)
    times = (2 * stops - sizes) / (2.0 * rate)
    count = int(np.searchsorted(times, end))
    return times[:count], sizes[:count]
