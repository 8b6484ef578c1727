"""Which rows are trained, and which are held out, so that no worker trains them.

A row is held out by the hash of what it says: wherever it lies, however the dataset is cut or grows, a text and its
copies are on the same side. So are the copies, in the dataset, of what is measured of an evaluation dataset.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Self

from metaflow_hf.config import TrainConfig
from metaflow_hf.data.formats import DetectedFormat, Example, RowProblem
from metaflow_hf.data.formats.examples import contents
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.encoding import row_format

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


def example_of(row: Mapping[str, Any], form: DetectedFormat) -> Example | None:
    """What a row says, as it is before any tokenizer; ``None`` for a row without content, or one that is unusable.

    An unusable row is refused, or skipped, where rows are encoded.
    """
    try:
        return form.example(row)
    except RowProblem:
        return None


def key_of(example: Example) -> bytes:
    """Equal for equal contents."""
    return hashlib.sha256(json.dumps(contents(example), sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The side of each row: held out are those whose hash is below ``limit`` (of 2**64), or one of ``keys``."""

    limit: int = 0
    keys: frozenset[bytes] = frozenset()

    @classmethod
    def copies_of(cls, rows: Sequence["HeldOutRow"]) -> Self:
        """What holds out the rows that say the same as one of ``rows``."""
        return cls(keys=frozenset(key_of(row.value) for row in rows))

    @property
    def holds_any(self) -> bool:
        """Whether any row may be held out."""
        return self.limit > 0 or bool(self.keys)

    @property
    def digest(self) -> str | None:
        """How many ``keys`` there are, and which, for people to compare; ``None`` without."""
        if not self.keys:
            return None
        return f"{len(self.keys):,} texts, {hashlib.sha256(b''.join(sorted(self.keys))).hexdigest()[:12]}"

    def holds(self, example: Example) -> bool:
        """Whether an example is held out."""
        if not self.holds_any:
            return False
        key = key_of(example)
        return key in self.keys or _number(key) < self.limit


NOTHING_HELD_OUT: Final = HeldOut()


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
    blocks: BlockManager, heldout: BlockManager | None, config: TrainConfig, *, samples: int | None = None
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
    target = heldout_target(total, config)
    if total <= SETTLED_ROWS:
        return _lowest(_keys(blocks, sizes, config), target, config)
    limit = int(target / total * 2**64)
    lowest, is_trained = 2**64, False
    for key in _keys(blocks, sizes, config):
        lowest, is_trained = min(lowest, key), is_trained or key >= limit
        if lowest < limit and is_trained:
            return HeldOut(limit)
    # Many copies of few texts.
    return _lowest(_keys(blocks, sizes, config), 1, config)


def _lowest(keys: Iterable[int], wanted: int, config: TrainConfig) -> HeldOut:
    """What holds out so many rows: those of the texts with the lowest hashes, and never all of them."""
    rows = Counter(keys)
    different = sorted(rows)
    if len(different) < 2:
        raise ConfigError(
            f"the rows of {config.data.dataset} hold {len(different)} different text{'s' * (len(different) != 1)}, so none "
            "can be held out: name a data.evaluation_dataset."
        )
    held = accumulate(rows[key] for key in different[:-1])
    last = next((number for number, count in enumerate(held) if count >= wanted), len(different) - 2)
    return HeldOut(different[last] + 1)


def _keys(blocks: BlockManager, sizes: Sequence[int], config: TrainConfig) -> Iterator[int]:
    form = row_format(blocks, config)
    for block_id, size in enumerate(sizes):
        for start in range(0, size, _ROWS_AT_ONCE):
            for row in blocks.read_rows(block_id, start, min(start + _ROWS_AT_ONCE, size)):
                if (example := example_of(row, form)) is not None:
                    yield _number(key_of(example))


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8])


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """A held-out example, and where it is stored."""

    value: Example
    block_id: int
    row: int

    def __str__(self) -> str:
        return f"block {self.block_id}, row {self.row}"


def heldout_rows(blocks: BlockManager, config: TrainConfig) -> list[HeldOutRow]:
    """Rows of the dataset that no worker trains, without copies, at most ``evaluation.max_samples``.

    They come from blocks spread over the whole dataset, as many from each; where those few blocks hold none, from the
    first other one that does. Raises ``ConfigError`` as ``held_out``, and when an ``evaluation_dataset`` is configured,
    whose rows are to be used instead.
    """
    if config.data.evaluation_dataset is not None:
        raise ConfigError("data.evaluation_dataset is configured: its texts are the held-out ones.")
    sides, wanted = held_out(blocks, None, config), config.evaluation.max_samples
    sizes = _sizes(blocks, config)
    chosen = _spread(len(sizes), min(_BLOCKS_READ, wanted))
    found: dict[bytes, HeldOutRow] = {}
    # Blocks of few, long rows: the chosen ones may hold none of the held-out rows.
    others = [block_id for block_id in range(len(sizes)) if block_id not in set(chosen)]
    for number, block_id in enumerate([*chosen, *others]):
        if found and number >= len(chosen):
            break
        share = math.ceil((wanted - len(found)) / max(len(chosen) - number, 1))
        for row in _of_block(blocks, config, block_id, sizes[block_id], sides):
            if share == 0:
                break
            key = key_of(row.value)
            share -= key not in found
            found.setdefault(key, row)
    return list(found.values())


def evaluation_rows(blocks: BlockManager, config: TrainConfig) -> list[HeldOutRow]:
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
    training: BlockManager, heldout: BlockManager | None, config: TrainConfig
) -> list[HeldOutRow]:
    """What a run measures: the rows of its evaluation dataset, or those of the dataset that it holds out."""
    if heldout is not None:
        return evaluation_rows(heldout, config)
    return heldout_rows(training, config)


@dataclass(frozen=True, slots=True)
class Copies:
    """How many of the first ``looked_at`` of ``samples`` rows of a dataset are in its evaluation dataset too."""

    found: int = 0
    looked_at: int = 0
    samples: int = 0

    def notes(self) -> list[str]:
        """What a plan says about it."""
        if not self.found:
            return []
        part = "" if self.looked_at == self.samples else f"the first {self.looked_at:,} of "
        are = "row of data.dataset is" if self.found == 1 else "rows of data.dataset are"
        return [
            f"{self.found:,} {are} in data.evaluation_dataset too (of {part}{self.samples:,}): held out, not trained."
        ]


NO_COPIES: Final = Copies()


def count_copies(
    blocks: BlockManager, heldout: BlockManager | None, config: TrainConfig, *, samples: int | None = None
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
    found, looked_at, left = 0, 0, float(COUNTED_BYTES)
    for block, size in zip(blocks.manifest.blocks, sizes, strict=True):
        for start in range(0, size, _ROWS_AT_ONCE):
            if left <= 0:
                return Copies(found, looked_at, samples)
            rows = blocks.read_rows(block.block_id, start, min(start + _ROWS_AT_ONCE, size))
            values = [value for row in rows if (value := example_of(row, form)) is not None]
            found += sum(_beginning(value) in beginnings and sides.holds(value) for value in values)
            looked_at += len(rows)
            left -= block.size_bytes * len(rows) / block.sample_count
    if found and found == samples:
        raise ConfigError(
            f"data.evaluation_dataset: {config.data.evaluation_dataset} holds all {found:,} rows of "
            f"{config.data.dataset}, and what is measured is not trained: nothing is left to train on. Name another "
            "evaluation dataset, or leave it out: then about data.heldout_samples = "
            f"{config.data.heldout_samples} rows are held out."
        )
    return Copies(found, looked_at, samples)


def _beginning(example: Example) -> str:
    return example[:_BEGINNING] if isinstance(example, str) else ""


def _sizes(blocks: BlockManager, config: TrainConfig) -> list[int]:
    sizes = training_samples([block.sample_count for block in blocks.wait_complete().blocks], config)
    return [size for size in sizes if size]


def _spread(available: int, wanted: int) -> list[int]:
    """At most ``wanted`` of so many numbers, evenly spaced."""
    number = min(available, wanted)
    return [index * available // number for index in range(number)]


def _of_block(
    blocks: BlockManager, config: TrainConfig, block_id: int, size: int, sides: HeldOut
) -> Iterator[HeldOutRow]:
    form = row_format(blocks, config)
    for start in range(0, size, _ROWS_AT_ONCE):
        for number, row in enumerate(blocks.read_rows(block_id, start, min(start + _ROWS_AT_ONCE, size))):
            value = example_of(row, form)
            if value is not None and sides.holds(value):
                yield HeldOutRow(value, block_id, start + number)
