"""Blocks without an index: those of other software in this layout, and those whose index was lost.

The index is built once, by reading the block from its beginning to its end, and kept beside it if that place is
writable.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from typing import Final

import msgspec

from metaflow_hf.data.index import SEGMENT_ROWS, BlockIndex, IndexBuilder
from metaflow_hf.data.manifest import BlockEntry, BlockManifest, content_digest
from metaflow_hf.errors import IntegrityError, NotFound, StoreUnavailable
from metaflow_hf.store import ObjectStore

logger = logging.getLogger("metaflow_hf.data")

READ_BYTES: Final = 8 * 1024 * 1024
_BLOCK_NAME: Final = re.compile(r"block_(\d+)\.jsonl")


def load_index(store: ObjectStore, block: BlockEntry) -> BlockIndex:
    """The index of a block, built if there is none.

    Raises ``IntegrityError`` naming the block when index, manifest and block contradict each other.
    """
    try:
        data = store.get(block.index_key)
    except NotFound:
        return _build_and_keep(store, block)
    index = BlockIndex.from_bytes(
        data, where=f"{store.uri}/{block.index_key} (the index of {block.file_name})"
    )
    # Of a block without rows the index has no bytes either, whatever blank lines there are.
    is_other_size = index.num_rows > 0 and block.size_bytes not in (0, index.size_bytes)
    if index.num_rows != block.sample_count or is_other_size:
        raise IntegrityError(
            f"{block.file_name} and its index disagree: {index.num_rows} rows in {index.size_bytes} bytes indexed, "
            f"{block.sample_count} rows in {block.size_bytes} bytes in the manifest. Restore the block, or delete "
            "its .idx if the block is right."
        )
    return index


def manifest_of_bare_blocks(store: ObjectStore) -> BlockManifest | None:
    """The manifest of a dataset that is nothing but ``blocks/``; ``None`` without blocks.

    Blocks without an index are read once, from beginning to end. Raises ``IntegrityError`` when the numbers of the
    files have a gap, because then one is lost.
    """
    sizes = {info.key.removeprefix("blocks/"): info.size for info in store.list("blocks")}
    names = {int(match[1]): name for name in sizes if (match := _BLOCK_NAME.fullmatch(name))}
    numbers = sorted(names)
    if not numbers:
        return None
    lost = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    if lost:
        raise IntegrityError(
            f"{store.uri}/blocks has no block {', '.join(map(str, lost[:5]))}, but later ones: restore what is lost, "
            "or number the blocks anew."
        )
    blocks: list[BlockEntry] = []
    start = 0
    for number in numbers:
        block = BlockEntry(
            block_id=len(blocks),
            sample_count=0,
            start_index=0,
            end_index=0,
            file_path=f"blocks/{names[number]}",
            size_bytes=sizes[names[number]],
        )
        rows = _index_of_bare_block(store, block).num_rows
        blocks.append(
            msgspec.structs.replace(block, sample_count=rows, start_index=start, end_index=start + rows)
        )
        start += rows
    return BlockManifest(
        dataset_name=store.uri.rstrip("/").rpartition("/")[2],
        total_samples=start,
        total_blocks=len(blocks),
        block_size=max(block.sample_count for block in blocks),
        blocks=tuple(blocks),
        digest=content_digest(blocks),
    )


def _index_of_bare_block(store: ObjectStore, block: BlockEntry) -> BlockIndex:
    """The index beside the block if it is of a block of this size, else a new one."""
    try:
        index = BlockIndex.from_bytes(store.get(block.index_key), where=block.index_key)
    except (NotFound, IntegrityError):
        index = None
    if index is None or index.size_bytes != block.size_bytes:
        index, _ = _scan(store, block)
        _keep(store, block, index)
    return index


def _build_and_keep(store: ObjectStore, block: BlockEntry) -> BlockIndex:
    index, sha256 = _scan(store, block)
    if index.num_rows != block.sample_count:
        raise IntegrityError(
            f"{block.file_name} holds {index.num_rows} rows, but the manifest says {block.sample_count}: it is cut off "
            "or was changed. Restore it, or build the dataset again."
        )
    if block.sha256 not in ("", sha256):
        raise IntegrityError(
            f"{block.file_name} is damaged: its sha256 is {sha256}, not {block.sha256}. Restore it, or build the "
            "dataset again."
        )
    _keep(store, block, index)
    return index


def _keep(store: ObjectStore, block: BlockEntry, index: BlockIndex) -> None:
    try:
        store.put(block.index_key, index.to_bytes())
    except StoreUnavailable as error:
        logger.info("the index of %s is built again each time: %s", block.file_name, error)


def _scan(store: ObjectStore, block: BlockEntry) -> tuple[BlockIndex, str]:
    if block.key.endswith(".zst"):
        raise IntegrityError(
            f"{block.index_key} is gone, and a compressed block cannot be read without it: restore it, or build the "
            "dataset again."
        )
    sha, builder = hashlib.sha256(), IndexBuilder()
    segment: list[bytes] = []
    for row in _rows(store, block):
        sha.update(row)
        segment.append(row)
        if len(segment) == SEGMENT_ROWS:
            builder.add(b"".join(segment), SEGMENT_ROWS)
            segment = []
    if segment:
        builder.add(b"".join(segment), len(segment))
    return builder.finish(), sha.hexdigest()


def _rows(store: ObjectStore, block: BlockEntry) -> Iterator[bytes]:
    """The bytes of each row: its line, and the blank lines around it that no row counts."""
    row, is_begun = b"", False
    for line in _lines(store, block):
        if line.strip():
            if is_begun:
                yield row
                row = b""
            is_begun = True
        row += line
    if is_begun:
        yield row


def _lines(store: ObjectStore, block: BlockEntry) -> Iterator[bytes]:
    offset, rest = 0, b""
    while data := store.get_range(block.key, offset, offset + READ_BYTES):
        offset += len(data)
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest
