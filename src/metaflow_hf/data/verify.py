"""Whether every byte of a dataset is as written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metaflow_hf.data.foreign import load_index, manifest_of_bare_blocks
from metaflow_hf.data.index import BlockIndex
from metaflow_hf.data.manifest import BlockEntry, BlockManifest, Completion, content_digest
from metaflow_hf.data.records import COMPLETE_KEY, MANIFEST_KEY, read_commit, read_completion, read_manifest
from metaflow_hf.data.sharded import SHARDS, join_blocks
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
    return list(_problems(store))


def _problems(store: ObjectStore) -> Iterator[Problem]:
    try:
        manifest = read_manifest(store) or manifest_of_bare_blocks(store)
    except IntegrityError as error:
        yield Problem(_file_of(error, store), str(error))
        return
    if manifest is None:
        raise SelectionError(f"{store.uri} holds no dataset of blocks.")
    try:
        completion = read_completion(store)
    except IntegrityError as error:
        yield Problem(COMPLETE_KEY, str(error))
        completion = None
    yield from _check_manifest(manifest, completion)
    if completion is not None and completion.spec.by_shard:
        yield from _check_shards(store, manifest)
        return
    # Other software writes no commits; ours has one for each block.
    is_ours = bool(manifest.spec_digest)
    for block in manifest.blocks:
        yield from _check_block(store, block, is_ours=is_ours)


def _check_manifest(manifest: BlockManifest, completion: Completion | None) -> Iterator[Problem]:
    if manifest.digest != content_digest(manifest.blocks):
        yield Problem(MANIFEST_KEY, "its digest is not that of its blocks")
    if completion is None and manifest.spec_digest and manifest.is_complete:
        yield Problem(
            COMPLETE_KEY, "it is missing or damaged, but the manifest says that the dataset is complete"
        )
    if completion is not None and (completion.digest, completion.skipped_rows, completion.spec.digest()) != (
        manifest.digest,
        manifest.skipped_rows,
        manifest.spec_digest,
    ):
        yield Problem(MANIFEST_KEY, f"it says something else than {COMPLETE_KEY}")
    if manifest.total_samples != sum(block.sample_count for block in manifest.blocks):
        yield Problem(MANIFEST_KEY, "total_samples is not the sum of its blocks")


def _check_shards(store: ObjectStore, manifest: BlockManifest) -> Iterator[Problem]:
    """Each shard as the dataset that it is, and the whole as what they make together."""
    shards = []
    for name in store.children(SHARDS):
        shard = store.child(f"{SHARDS}/{name}")
        try:
            found = list(_problems(shard))
        except SelectionError as error:
            found = [Problem(MANIFEST_KEY, str(error))]
        yield from (Problem(f"{SHARDS}/{name}/{_key_of(problem)}", problem.message) for problem in found)
        if not found:
            shards.append(read_manifest(shard))
        else:
            return
    if tuple(join_blocks([shard for shard in shards if shard])) != manifest.blocks:
        yield Problem(MANIFEST_KEY, "its blocks are not those of the shards")


def _check_block(store: ObjectStore, block: BlockEntry, *, is_ours: bool) -> Iterator[Problem]:
    name = block.file_name
    try:
        yield from _check_commit(store, block, is_ours=is_ours)
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


def _check_commit(store: ObjectStore, block: BlockEntry, *, is_ours: bool) -> Iterator[Problem]:
    commit = read_commit(store, block.block_id)
    if commit is None:
        if is_ours:
            yield Problem(block.file_name, "its commit is missing")
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


def _key_of(problem: Problem) -> str:
    is_record = problem.file.endswith(".json")
    return problem.file if is_record else f"blocks/{problem.file}"


def _file_of(error: IntegrityError, store: ObjectStore) -> str:
    """Which record could not be read: errors about records begin with where they are."""
    path = str(error).removeprefix(f"{store.uri}/").partition(" ")[0]
    return path if path.endswith(".json") else MANIFEST_KEY
