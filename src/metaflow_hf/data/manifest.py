"""What a dataset consists of: commits, one per block, and the manifest that is derived from them.

    blocks/block_00000.jsonl   one JSON object a line (.jsonl.zst when compressed, one frame a segment)
    blocks/block_00000.idx     see ``index``
    commits/00000.json         created once, after its block: what the block holds and where the source goes on
    commits/complete.json      created once: the dataset is complete
    block_manifest.json        derived from the commits, for other readers of this layout and for fast opening
    shards/00000/…             the same below each shard, where every source file has blocks of its own (``sharded``)

Nothing here names a machine, a path of one, or a time: the same source gives the same bytes everywhere.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Final, Literal, Self

import msgspec

from metaflow_hf.data.formats import DetectedFormat
from metaflow_hf.errors import DatasetMismatch
from metaflow_hf.store.objects import encode_json

SCHEMA: Final = 1
# Fields of a ``DatasetSpec`` that its digest leaves out when they are ``None``.
_SHARD_BLOCK: Final = re.compile(r"shards/\d+/blocks/[^/]+")

OnBadRow = Literal["raise", "skip"]
Documents = Literal["whole", "pages"]
Compression = Literal["zstd"]


class Cursor(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a source goes on: rows of file number ``file`` already consumed, and its byte offset where known.

    ``state`` is the state of a source that keeps its own; then ``row`` counts from that state.
    """

    file: int = 0
    row: int = 0
    offset: int = 0
    state: dict[str, Any] | None = None


_LATER: Final[dict[str, Any]] = {
    "format": "text",
    "columns": {},
    "documents": None,
    "document_rules": None,
    "keep_columns": None,
}


class DatasetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the bytes of a dataset, and nothing else.

    ``source_digest`` stands for the names, sizes and checksums of local files; a hub's commit needs none.
    ``by_shard`` says that no block spans two files of the source (see ``sharded``). ``format`` and ``columns`` (role ->
    column) say which rows have content; of plain texts ``text_column`` does.
    ``documents`` says what a row of a PDF is, and ``document_rules`` by which version of the rules text is taken out of
    documents; both are ``None`` for sources whose rows they do not change.
    ``keep_columns`` are the columns that are stored beside those that are trained, in the order of their names; ``None``
    stores all.
    """

    dataset_name: str
    source: str
    source_digest: str = ""
    commit_hash: str | None = None
    block_size: int = 100_000
    text_column: str | None = None
    ascii_only: bool = False
    compression: Compression | None = None
    on_bad_row: OnBadRow = "raise"
    max_rows: int | None = None
    max_bytes: int | None = None
    by_shard: bool = False
    format: str = "text"
    columns: dict[str, str] = {}
    documents: Documents | None = None
    document_rules: int | None = None
    keep_columns: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields; those that were added later only where they say something, so that digests stay."""
        values = {field: getattr(self, field) for field in self.__struct_fields__}
        return {
            field: value for field, value in values.items() if field not in _LATER or value != _LATER[field]
        }

    @property
    def detected(self) -> DetectedFormat:
        """The format of the rows, with its columns."""
        return DetectedFormat(self.format, self.columns or {"text": self.text_column or "text"})

    def digest(self) -> str:
        return hashlib.sha256(encode_json(self.to_json())).hexdigest()

    def check_same(self, other: "DatasetSpec", *, where: str) -> None:
        """Raises ``DatasetMismatch`` that lists what differs when ``other``, which is stored, is another dataset."""
        differences = [
            f"{field}: stored {getattr(other, field)!r}, asked for {getattr(self, field)!r}"
            for field in self.__struct_fields__
            if getattr(self, field) != getattr(other, field)
        ]
        if differences:
            raise DatasetMismatch(
                f"{where} holds another dataset ({'; '.join(differences)}). Choose another directory, or the same "
                "source and settings to go on with it."
            )


class BlockEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One block as the manifest lists it; ``end_index`` is exclusive, ``size_bytes`` is as stored."""

    block_id: int
    sample_count: int
    start_index: int
    end_index: int
    file_path: str
    size_bytes: int
    is_complete: bool = True
    sha256: str = ""

    @property
    def total_samples(self) -> int:
        return self.sample_count

    @property
    def file_name(self) -> str:
        """The name by which people find the block; with its folder in a dataset of shards."""
        path = self.file_path.replace("\\", "/")
        return path if _SHARD_BLOCK.fullmatch(path) else path.rpartition("/")[2]

    @property
    def key(self) -> str:
        """Where the block lies below the dataset, whatever path other software wrote down."""
        return self.file_name if "/" in self.file_name else f"blocks/{self.file_name}"

    @property
    def index_key(self) -> str:
        folder, _, name = self.key.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}.idx"


class BlockManifest(msgspec.Struct, frozen=True, kw_only=True):
    """All blocks of a dataset that are committed; the whole dataset if ``is_complete``.

    ``digest`` changes with any byte of any block; ``text_column`` is the column that is trained on;
    ``skipped_rows`` counts blank rows, rows without text and rows skipped as bad.
    """

    dataset_name: str
    total_samples: int
    total_blocks: int
    block_size: int
    blocks: tuple[BlockEntry, ...]
    text_column: str | None = None
    is_complete: bool = True
    skipped_rows: int = 0
    source: str = ""
    commit_hash: str | None = None
    ascii_only: bool = False
    compression: Compression | None = None
    spec_digest: str = ""
    digest: str = ""
    format: str | None = None
    columns: dict[str, str] = {}
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The fields of ``block_manifest.json``."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {**plain, "blocks": list(plain["blocks"])}

    @classmethod
    def of(
        cls, spec: DatasetSpec, blocks: Sequence[BlockEntry], *, skipped_rows: int, is_complete: bool
    ) -> Self:
        return cls(
            dataset_name=spec.dataset_name,
            total_samples=sum(block.sample_count for block in blocks),
            total_blocks=len(blocks),
            block_size=spec.block_size,
            blocks=tuple(blocks),
            text_column=spec.text_column,
            is_complete=is_complete,
            skipped_rows=skipped_rows,
            source=spec.source,
            commit_hash=spec.commit_hash,
            ascii_only=spec.ascii_only,
            compression=spec.compression,
            spec_digest=spec.digest(),
            digest=content_digest(blocks),
            format=spec.format if spec.text_column else None,
            columns=spec.columns,
        )


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """One committed block: created after the block and its index are durable.

    ``cursor`` is where the source goes on after the block's last row, ``skipped_rows`` how many rows were
    skipped and ``total_bytes`` how many bytes of JSON lines (before compression) were written up to there.
    """

    block: BlockEntry
    index_sha256: str
    cursor: Cursor
    skipped_rows: int
    total_bytes: int
    spec: DatasetSpec
    schema: int = SCHEMA


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset is complete: its size, digest, and what it was made from."""

    total_blocks: int
    total_samples: int
    skipped_rows: int
    digest: str
    spec: DatasetSpec
    schema: int = SCHEMA


def content_digest(blocks: Sequence[BlockEntry]) -> str:
    """One sha256 for the content of all blocks."""
    content = [[block.sample_count, block.size_bytes, block.sha256] for block in blocks]
    return hashlib.sha256(encode_json(content)).hexdigest()


def block_name(block_id: int, compression: Compression | None) -> str:
    return f"block_{block_id:05d}.jsonl{'.zst' if compression else ''}"
