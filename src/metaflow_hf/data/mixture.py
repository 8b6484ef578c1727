"""Several datasets of blocks, read as one: blocks are numbered through, and each row knows the dataset that it is of."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, Final, Protocol, Self

import msgspec

from metaflow_hf.data.formats import DetectedFormat
from metaflow_hf.data.formats.examples import Example
from metaflow_hf.data.manager import BlockManager
from metaflow_hf.data.manifest import BlockEntry, BlockManifest
from metaflow_hf.store.objects import encode_json

MIXTURE: Final = "mixture"


class ReadableBlocks(Protocol):
    """A complete dataset as training reads it: a ``BlockManager``, or ``MixedBlocks``."""

    dataset_chunk_size: int

    @property
    def manifest(self) -> BlockManifest: ...
    def wait_complete(self) -> BlockManifest: ...
    def read_rows(self, block_id: int, start: int, stop: int) -> list[dict[str, Any]]: ...
    def format_as(
        self,
        *,
        format: str = "auto",  # noqa: A002  the name of the setting
        columns: Mapping[str, str] | None = None,
        text_column: str | None = None,
    ) -> DetectedFormat: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MixedRow(dict[str, Any]):
    """A row, with the number of its dataset as ``part``."""

    __slots__ = ("part",)

    def __init__(self, row: Mapping[str, Any], part: int) -> None:
        super().__init__(row)
        self.part = part


@dataclass(frozen=True, slots=True)
class MixedFormat(DetectedFormat):
    """The format of rows of a mixture: each row is read by the format of its own dataset."""

    parts: tuple[DetectedFormat, ...] = ()

    @property
    def main_column(self) -> str:
        """No column: the datasets of a mixture need not share one."""
        return ""

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """What a row of ``MixedBlocks`` says, ``None`` for a blank row. Raises ``RowProblem``."""
        assert isinstance(row, MixedRow)
        return self.parts[row.part].example(row)

    def __str__(self) -> str:
        return f"{self.name} of {', '.join(map(str, self.parts))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPart:
    """One dataset of a mixture.

    Args:
        name: Its name in reports.
        blocks: Its blocks, all of them or, for a plan, the beginning.
        max_samples: Only the first so many samples are used.
        total_samples: The samples of the whole dataset where ``blocks`` hold only the beginning.

    """

    name: str
    blocks: BlockManager
    max_samples: int | None = None
    total_samples: int | None = None

    def entries(self) -> list[BlockEntry]:
        """The blocks that are used, with the samples that are used of each."""
        left = self.blocks.wait_complete().total_samples if self.max_samples is None else self.max_samples
        found = []
        for entry in self.blocks.manifest.blocks:
            if left <= 0:
                break
            samples = min(entry.sample_count, left)
            left -= samples
            found.append(msgspec.structs.replace(entry, sample_count=samples))
        return found

    @property
    def samples(self) -> int:
        """The samples that are used, of the whole dataset."""
        total = self.total_samples or self.blocks.manifest.total_samples
        return min(total, self.max_samples or total)


class MixedBlocks:
    """Reads the datasets of a mixture as ``BlockManager`` reads one.

    ``manifest`` lists the blocks of all datasets, numbered through; its digest covers the content of all of them.
    ``close`` closes the datasets.
    """

    def __init__(self, parts: Sequence[MixedPart]) -> None:
        self.parts = tuple(parts)
        entries = [part.entries() for part in self.parts]
        self._first = [0, *accumulate(map(len, entries))]
        self.manifest = _manifest(self.parts, entries)
        self.dataset_chunk_size = self.parts[0].blocks.dataset_chunk_size
        self.format = MixedFormat(MIXTURE, {}, tuple(part.blocks.format for part in self.parts))
        self.text_column = self.format.main_column

    def wait_complete(self) -> BlockManifest:
        """The manifest: the datasets of a mixture are complete from the beginning."""
        return self.manifest

    def blocks_of(self, part: int) -> range:
        """The block ids of one dataset."""
        return range(self._first[part], self._first[part + 1])

    def part_of(self, block_id: int) -> int:
        """The number of the dataset that a block is of. Raises ``IndexError``."""
        if not 0 <= block_id < self.manifest.total_blocks:
            raise IndexError(
                f"the mixture has {self.manifest.total_blocks} blocks; there is no block {block_id}."
            )
        return bisect_right(self._first, block_id) - 1

    def alone(self, part: int) -> "MixedBlocks":
        """A mixture of this dataset alone, which reads through the same ``BlockManager``."""
        return MixedBlocks([self.parts[part]])

    def read_rows(self, block_id: int, start: int, stop: int) -> list[dict[str, Any]]:
        """All columns of rows ``[start, stop)`` of a block, as ``MixedRow``. Raises ``IndexError``."""
        part = self.part_of(block_id)
        samples = self.manifest.blocks[block_id].sample_count
        if not 0 <= start <= stop <= samples:
            raise IndexError(f"block {block_id} has {samples} rows; [{start}, {stop}) is not within it.")
        rows = self.parts[part].blocks.read_rows(block_id - self._first[part], start, stop)
        return [MixedRow(row, part) for row in rows]

    def format_as(
        self,
        *,
        format: str = "auto",  # noqa: A002  the name of the setting
        columns: Mapping[str, str] | None = None,
        text_column: str | None = None,
    ) -> MixedFormat:
        """The format of the mixture; each dataset was opened with its own settings, so these change nothing."""
        del format, columns, text_column
        return self.format

    def place_of(self, block_id: int) -> tuple[str, int]:
        """The name of a block's dataset, and the number of the block there."""
        part = self.part_of(block_id)
        return self.parts[part].name, block_id - self._first[part]

    def name_block(self, block_id: int) -> str:
        """A block as people find it: its dataset, and its number there."""
        name, number = self.place_of(block_id)
        return f"{name}, block {number}"

    def close(self) -> None:
        """Closes all datasets; idempotent."""
        for part in self.parts:
            part.blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def name_block(blocks: object, block_id: int) -> str:
    """A block for messages: with its dataset where ``blocks`` are those of a mixture."""
    return blocks.name_block(block_id) if isinstance(blocks, MixedBlocks) else f"block {block_id}"


def _manifest(parts: Sequence[MixedPart], entries: Sequence[Sequence[BlockEntry]]) -> BlockManifest:
    blocks: list[BlockEntry] = []
    start = 0
    for entry in (entry for found in entries for entry in found):
        stop = start + entry.sample_count
        blocks.append(msgspec.structs.replace(entry, block_id=len(blocks), start_index=start, end_index=stop))
        start = stop
    manifests = [part.blocks.manifest for part in parts]
    return BlockManifest(
        dataset_name=MIXTURE,
        total_samples=start,
        total_blocks=len(blocks),
        block_size=max(manifest.block_size for manifest in manifests),
        blocks=tuple(blocks),
        skipped_rows=sum(manifest.skipped_rows for manifest in manifests),
        digest=hashlib.sha256(encode_json([manifest.digest for manifest in manifests])).hexdigest(),
    )
