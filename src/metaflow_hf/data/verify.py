"""Whether every byte of a dataset is as written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metaflow_hf.data.foreign import load_index, manifest_of_bare_blocks
from metaflow_hf.data.index import BlockIndex
from metaflow_hf.data.manifest import BlockEntry, BlockManifest, content_digest
from metaflow_hf.data.records import read_commit, read_completion, read_manifest
from metaflow_hf.errors import IntegrityError, NotFound, SelectionError
from metaflow_hf.store import ObjectStore, open_store

READ_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and with which file of the dataset."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify_blocks(directory: str | Path | ObjectStore) -> list[Problem]:
    """Reads a whole dataset and lists what is not as written; empty when every byte is.

    Blocks, indexes, commits and manifest are compared with each other. Blocks of other software have no
    checksums: only what their manifest says is checked. Raises ``SelectionError`` where there is no dataset.
    """
    store = open_store(directory) if isinstance(directory, (str, Path)) else directory
    try:
        manifest = read_manifest(store) or manifest_of_bare_blocks(store)
    except IntegrityError as error:
        return [Problem("block_manifest.json", str(error))]
    if manifest is None:
        raise SelectionError(f"{store.uri} holds no dataset of blocks.")
    return [*_check_manifest(store, manifest), *(p for b in manifest.blocks for p in _check_block(store, b))]


def _check_manifest(store: ObjectStore, manifest: BlockManifest) -> Iterator[Problem]:
    where = "block_manifest.json"
    try:
        completion = read_completion(store)
    except IntegrityError as error:
        yield Problem("commits/complete.json", str(error))
        return
    if manifest.digest != content_digest(manifest.blocks):
        yield Problem(where, "its digest is not that of its blocks")
    if completion is not None and (completion.digest, completion.skipped_rows, completion.spec.digest()) != (
        manifest.digest,
        manifest.skipped_rows,
        manifest.spec_digest,
    ):
        yield Problem(where, "it says something else than commits/complete.json")
    if manifest.total_samples != sum(block.sample_count for block in manifest.blocks):
        yield Problem(where, "total_samples is not the sum of its blocks")


def _check_block(store: ObjectStore, block: BlockEntry) -> Iterator[Problem]:
    name = block.file_name
    try:
        yield from _check_commit(store, block)
        index = load_index(store, block)
        size, sha256 = _hash(store, block.key)
    except NotFound:
        yield Problem(name, "it is missing")
        return
    except IntegrityError as error:
        yield Problem(name, str(error))
        return
    if block.size_bytes and size != block.size_bytes:
        yield Problem(name, f"{size} bytes instead of {block.size_bytes}")
    elif block.sha256 and sha256 != block.sha256:
        yield Problem(name, f"its sha256 is {sha256} instead of {block.sha256}")
    else:
        yield from _check_index(store, block, index)


def _check_commit(store: ObjectStore, block: BlockEntry) -> Iterator[Problem]:
    commit = read_commit(store, block.block_id)
    if commit is None:
        return
    if commit.block != block:
        yield Problem(block.file_name, "its commit and the manifest disagree")
    index = hashlib.sha256(store.get(block.index_key)).hexdigest()
    if index != commit.index_sha256:
        yield Problem(
            block.index_key.rpartition("/")[2], f"its sha256 is {index} instead of {commit.index_sha256}"
        )


def _check_index(store: ObjectStore, block: BlockEntry, index: BlockIndex) -> Iterator[Problem]:
    segments = range(len(index.checksums))
    for at in range(0, len(segments), 16):
        part = segments[at : at + 16]
        try:
            index.split(store.get_range(block.key, *index.byte_range(part)), part, where=block.file_name)
        except IntegrityError as error:
            yield Problem(block.file_name, str(error))


def _hash(store: ObjectStore, key: str) -> tuple[int, str]:
    sha, size = hashlib.sha256(), 0
    while data := store.get_range(key, size, size + READ_BYTES):
        sha.update(data)
        size += len(data)
    return size, sha.hexdigest()
