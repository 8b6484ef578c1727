"""Which rows are trained, and which are held out, so that no worker trains them.

A row is held out by the hash of what it says: wherever it lies, however the dataset is cut or grows, a text and its
copies are on the same side. So are the copies, in the dataset, of what is measured of an evaluation dataset.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Final

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.formats import Example
from metaflow_hf.data.mixture import MixedBlocks, ReadableBlocks
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.encoding import row_format
from metaflow_hf.train.mixtures import describe_parts, measured_samples
from metaflow_hf.train.sides import (
    HASHES,
    NOTHING_HELD_OUT,
    HeldOut,
    HeldOutRow,
    Texts,
    example_of,
    hold_out_of_each,
    key_of,
    number_of,
)

# Of a very large dataset more rows are held out than are measured, so that few have to be read to find them.
LEAST_FRACTION: Final = 0.001
# With heldout_samples: auto so many, but at most one row in ten.
AUTO_SAMPLES: Final = 256
AUTO_SHARE: Final = 10
# Of datasets up to this size exactly the wanted number of texts is held out; of larger ones about as many.
SETTLED_ROWS: Final = 20_000
# The held-out rows that are measured come from so many blocks, spread over the dataset.
_BLOCKS_READ: Final = 32
_ROWS_AT_ONCE: Final = 1_000
# Copies are counted for the plan in about so much of the dataset; workers look at every row that they train.
COUNTED_BYTES: Final = 256 * 2**20
# Texts that begin otherwise need not be compared.
_BEGINNING: Final = 32


def heldout_target(num_samples: int, config: TrainConfig) -> int:
    """About how many of so many rows are held out: ``data.heldout_samples``, and at least one in a thousand.

    Raises ``ConfigError`` when that would be all.
    """
    total, configured = min(num_samples, config.data.max_samples or num_samples), config.data.heldout_samples
    wanted = min(AUTO_SAMPLES, max(total // AUTO_SHARE, 1)) if configured == "auto" else configured
    if wanted >= total > 0:
        raise ConfigError(
            f"{total} samples are to be used, of which data.heldout_samples = {config.data.heldout_samples} are "
            "held out: nothing is left to train on. Lower data.heldout_samples, or name a "
            "data.evaluation_dataset."
        )
    return max(wanted, math.ceil(total * LEAST_FRACTION))


def training_samples(block_samples: Sequence[int], config: TrainConfig) -> list[int]:
    """Samples per block that the order covers: all but those beyond ``max_samples``. Which of them are held out, rows
    say themselves (``heldout``).

    Raises ``ConfigError`` when nothing would be left.
    """
    total = sum(block_samples)
    limit = min(total, config.data.max_samples or total)
    if limit < 1:
        raise ConfigError("the dataset has no samples: nothing is left to train on.")
    if config.data.evaluation_dataset is None:
        heldout_target(total, config)
    kept = []
    for samples in block_samples:
        kept.append(min(samples, limit))
        limit -= kept[-1]
    return kept


def held_out(
    blocks: ReadableBlocks, heldout: ReadableBlocks | None, config: TrainConfig, *, samples: int | None = None
) -> HeldOut:
    """The side of the rows of a complete dataset; ``heldout`` is the evaluation dataset, if there is one.

    Some text is on either side wherever there are two different ones. ``samples`` are those of the dataset where
    ``blocks`` hold only its beginning. Raises ``ConfigError`` where all rows say the same, or too many were to be held
    out.
    """
    if heldout is not None:
        return HeldOut.copies_of(evaluation_rows(heldout, config))
    if config.data.evaluation_dataset is not None:
        return NOTHING_HELD_OUT
    sizes = training_samples([block.sample_count for block in blocks.wait_complete().blocks], config)
    total = sum(sizes) if samples is None else samples
    if isinstance(blocks, MixedBlocks):
        return _held_out_of_mixture(blocks, config)
    target = heldout_target(total, config)
    if total <= SETTLED_ROWS:
        return _lowest(_numbers(blocks, sizes, config), target, config)
    limit = int(target / total * HASHES)
    lowest, is_trained = HASHES, False
    for key in _numbers(blocks, sizes, config):
        lowest, is_trained = min(lowest, key), is_trained or key >= limit
        if lowest < limit and is_trained:
            return HeldOut(limit)
    # Many copies of few texts.
    return _lowest(_numbers(blocks, sizes, config), 1, config)


def _held_out_of_mixture(blocks: MixedBlocks, config: TrainConfig) -> HeldOut:
    entries = blocks.manifest.blocks
    datasets = [
        Texts(
            part.name,
            part.samples,
            partial(
                _keys,
                blocks,
                [(block_id, entries[block_id].sample_count) for block_id in blocks.blocks_of(number)],
                config,
            ),
        )
        for number, part in enumerate(blocks.parts)
    ]
    # A weight may use few rows of a large dataset: what is held out is a part of the rows that are used.
    used = sum(min(one["rows"], one["samples"]) for one in describe_parts(blocks, config))
    return hold_out_of_each(datasets, heldout_target(used, config) / used, settled_rows=SETTLED_ROWS)


def _lowest(keys: Iterable[int], wanted: int, config: TrainConfig) -> HeldOut:
    """What holds out so many rows: those of the texts with the lowest hashes, and never all of them."""
    rows = Counter(keys)
    different = sorted(rows)
    if len(different) < 2:
        raise ConfigError(
            f"the rows of {config.data.title} hold {len(different)} different text{'s' * (len(different) != 1)}, so none "
            "can be held out: name a data.evaluation_dataset."
        )
    held = accumulate(rows[key] for key in different[:-1])
    last = next((number for number, count in enumerate(held) if count >= wanted), len(different) - 2)
    return HeldOut(different[last] + 1)


def _numbers(blocks: ReadableBlocks, sizes: Sequence[int], config: TrainConfig) -> Iterator[int]:
    return map(number_of, _keys(blocks, list(enumerate(sizes)), config))


def _keys(blocks: ReadableBlocks, sizes: Sequence[tuple[int, int]], config: TrainConfig) -> Iterator[bytes]:
    """The keys of the texts of the first rows of blocks; ``sizes`` are (block id, rows)."""
    form = row_format(blocks, config)
    for block_id, size in sizes:
        for start in range(0, size, _ROWS_AT_ONCE):
            for row in blocks.read_rows(block_id, start, min(start + _ROWS_AT_ONCE, size)):
                if (example := example_of(row, form)) is not None:
                    yield key_of(example)


def heldout_rows(blocks: ReadableBlocks, config: TrainConfig) -> list[HeldOutRow]:
    """Rows of the dataset that no worker trains, without copies, at most ``evaluation.max_samples``.

    They come from blocks spread over the whole dataset, as many from each; where those few blocks hold none, from the
    first other one that does. Raises ``ConfigError`` as ``held_out``, and when an ``evaluation_dataset`` is configured,
    whose rows are to be used instead.
    """
    if config.data.evaluation_dataset is not None:
        raise ConfigError("data.evaluation_dataset is configured: its texts are the held-out ones.")
    sides, wanted = held_out(blocks, None, config), config.evaluation.max_samples
    sizes = training_samples([block.sample_count for block in blocks.wait_complete().blocks], config)
    if not isinstance(blocks, MixedBlocks):
        return _spread_rows(
            blocks, config, [(i, size) for i, size in enumerate(sizes) if size], sides, wanted
        )
    rows = []
    for number, share in enumerate(measured_samples(blocks, config)):
        ids = blocks.blocks_of(number)
        found = _spread_rows(blocks, config, [(i, sizes[i]) for i in ids if sizes[i]], sides, share)
        name = blocks.parts[number].name
        rows += [HeldOutRow(row.value, row.block_id - ids.start, row.row, name) for row in found]
    return rows


def _spread_rows(
    blocks: ReadableBlocks,
    config: TrainConfig,
    sizes: Sequence[tuple[int, int]],
    sides: HeldOut,
    wanted: int,
) -> list[HeldOutRow]:
    """At most ``wanted`` held-out rows, without copies, of blocks given as (block id, rows)."""
    chosen = _spread(len(sizes), min(_BLOCKS_READ, wanted))
    found: dict[bytes, HeldOutRow] = {}
    # Blocks of few, long rows: the chosen ones may hold none of the held-out rows.
    others = [number for number in range(len(sizes)) if number not in set(chosen)]
    for number, place in enumerate([*chosen, *others]):
        if found and number >= len(chosen):
            break
        share = math.ceil((wanted - len(found)) / max(len(chosen) - number, 1))
        for row in _of_block(blocks, config, *sizes[place], sides):
            if share == 0:
                break
            key = key_of(row.value)
            share -= key not in found
            found.setdefault(key, row)
    return list(found.values())


def evaluation_rows(blocks: ReadableBlocks, config: TrainConfig) -> list[HeldOutRow]:
    """The first ``evaluation.max_samples`` rows of an evaluation dataset, without those that have no content."""
    found: list[HeldOutRow] = []
    wanted, form = config.evaluation.max_samples, row_format(blocks, config)
    for block in blocks.manifest.blocks:
        rows = blocks.read_rows(block.block_id, 0, min(block.sample_count, wanted))
        wanted -= len(rows)
        found += [
            HeldOutRow(value, block.block_id, number)
            for number, row in enumerate(rows)
            if (value := example_of(row, form)) is not None
        ]
    return found


def measured_rows(
    training: ReadableBlocks, heldout: ReadableBlocks | None, config: TrainConfig
) -> list[HeldOutRow]:
    """What a run measures: the rows of its evaluation dataset, or those of the dataset that it holds out."""
    if heldout is not None:
        return evaluation_rows(heldout, config)
    return heldout_rows(training, config)


@dataclass(frozen=True, slots=True)
class Copies:
    """How many of the first ``looked_at`` of ``samples`` rows of a dataset are in its evaluation dataset too.

    ``setting`` names what is trained.
    """

    found: int = 0
    looked_at: int = 0
    samples: int = 0
    setting: str = "data.dataset"

    def notes(self) -> list[str]:
        """What a plan says about it."""
        if not self.found:
            return []
        part = "" if self.looked_at == self.samples else f"the first {self.looked_at:,} of "
        are = f"row of {self.setting} is" if self.found == 1 else f"rows of {self.setting} are"
        return [
            f"{self.found:,} {are} in data.evaluation_dataset too (of {part}{self.samples:,}): held out, not trained."
        ]


NO_COPIES: Final = Copies()


def count_copies(
    blocks: ReadableBlocks, heldout: ReadableBlocks | None, config: TrainConfig, *, samples: int | None = None
) -> Copies:
    """How many rows of the dataset are held out because they say the same as what is measured of the evaluation
    dataset; counted in the first 256 MiB or so. ``samples`` are those of the dataset where ``blocks`` hold only its
    beginning.

    Raises ``ConfigError`` when that are all rows.
    """
    if heldout is None:
        return NO_COPIES
    measured = evaluation_rows(heldout, config)
    sides, form = HeldOut.copies_of(measured), row_format(blocks, config)
    beginnings = {_beginning(row.value) for row in measured}
    sizes = training_samples([block.sample_count for block in blocks.manifest.blocks], config)
    samples = sum(sizes) if samples is None else samples
    setting = "data.datasets" if config.data.datasets else "data.dataset"
    found, looked_at, left = 0, 0, float(COUNTED_BYTES)
    for block, size in zip(blocks.manifest.blocks, sizes, strict=True):
        for start in range(0, size, _ROWS_AT_ONCE):
            if left <= 0:
                return Copies(found, looked_at, samples, setting)
            rows = blocks.read_rows(block.block_id, start, min(start + _ROWS_AT_ONCE, size))
            values = [value for row in rows if (value := example_of(row, form)) is not None]
            found += sum(_beginning(value) in beginnings and sides.holds(value) for value in values)
            looked_at += len(rows)
            left -= block.size_bytes * len(rows) / block.sample_count
    if found and found == samples:
        raise ConfigError(
            f"data.evaluation_dataset: {config.data.evaluation_dataset} holds all {found:,} rows of "
            f"{config.data.title}, and what is measured is not trained: nothing is left to train on. Name another "
            "evaluation dataset, or leave it out: then about data.heldout_samples = "
            f"{config.data.heldout_samples} rows are held out."
        )
    return Copies(found, looked_at, samples, setting)


def _beginning(example: Example) -> str:
    return example[:_BEGINNING] if isinstance(example, str) else ""


def _spread(available: int, wanted: int) -> list[int]:
    """At most ``wanted`` of so many numbers, evenly spaced."""
    number = min(available, wanted)
    return [index * available // number for index in range(number)]


def _of_block(
    blocks: ReadableBlocks, config: TrainConfig, block_id: int, size: int, sides: HeldOut
) -> Iterator[HeldOutRow]:
    form = row_format(blocks, config)
    for start in range(0, size, _ROWS_AT_ONCE):
        for number, row in enumerate(blocks.read_rows(block_id, start, min(start + _ROWS_AT_ONCE, size))):
            value = example_of(row, form)
            if value is not None and sides.holds(value):
                yield HeldOutRow(value, block_id, start + number)
