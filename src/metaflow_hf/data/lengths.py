"""How long the texts of a dataset are, in characters and in tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from metaflow_hf.data.formats import Conversation, DetectedFormat, RowProblem
from metaflow_hf.data.formats.examples import show
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.tokens import ExampleEncoder
from metaflow_hf.errors import ConfigError

PERCENTILES: Final = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SLICE_ROWS: Final = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of ``measured`` rows: the total, and by percentile (0 is the shortest, 100 the longest)."""

    measured: int
    total: int
    percentiles: dict[int, int]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        percentiles = (
            {p: int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES} if lengths else {}
        )
        return cls(measured=len(lengths), total=sum(lengths), percentiles=percentiles)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_lengths(
    blocks: BlockManager, tokenizer: Any = None, *, max_rows: int = 100_000
) -> tuple[Lengths, Lengths | None]:
    """The lengths of the texts in characters, and with a ``tokenizer`` in tokens as training counts them.

    Of more than ``max_rows`` rows so many are taken, in slices spread evenly over the dataset. A conversation is as
    long as what is said in it. Raises ``ConfigError`` for ``max_rows`` below 1.
    """
    if max_rows < 1:
        raise ConfigError(f"max_rows must be at least 1, got {max_rows}.")
    characters: list[int] = []
    tokens: list[int] = []
    encoder = None if tokenizer is None else ExampleEncoder(tokenizer, blocks.format, loss_on="all")
    for rows in _slices(blocks, max_rows):
        characters += [_length(row, blocks.format) for row in rows]
        if encoder is not None:
            tokens += [len(example.input_ids) for example in encoder.encode(rows)]
    return Lengths.of(characters), None if tokenizer is None else Lengths.of(tokens)


def _slices(blocks: BlockManager, max_rows: int) -> Iterator[list[dict[str, Any]]]:
    manifest = blocks.manifest
    slices = [
        (block.block_id, start, min(start + SLICE_ROWS, block.sample_count))
        for block in manifest.blocks
        for start in range(0, block.sample_count, SLICE_ROWS)
    ]
    wanted = _count(manifest, max_rows, len(slices))
    left = max_rows
    for number in range(wanted):
        block_id, start, stop = slices[number * len(slices) // wanted]
        stop = min(stop, start + left)
        left -= stop - start
        if stop > start:
            yield blocks.read_rows(block_id, start, stop)


def _count(manifest: BlockManifest, max_rows: int, slices: int) -> int:
    """How many slices are read: all, or about ``max_rows`` rows' worth."""
    if manifest.total_samples <= max_rows:
        return slices
    return min(slices, -(-max_rows // SLICE_ROWS))


def _length(row: Mapping[str, Any], form: DetectedFormat) -> int:
    try:
        example = form.example(row)
    except RowProblem:
        return 0
    if isinstance(example, Conversation):
        return sum(len(message["content"]) for message in example.messages)
    return 0 if example is None else len(show(example))
