"""The records of a dataset in its store: written once, with a checksum of their own, and read back.

Publish data first, records last: a reader trusts a block only when its commit exists.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final, TypeVar

import msgspec

from metaflow_hf.data.manifest import SCHEMA, BlockManifest, Commit, Completion, content_digest
from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.objects import ObjectStore, encode_json

MANIFEST_KEY: Final = "block_manifest.json"
COMPLETE_KEY: Final = "commits/complete.json"
_CHECKSUM: Final = "checksum"

Record = TypeVar("Record", bound=msgspec.Struct)


def commit_key(block_id: int) -> str:
    return f"commits/{block_id:05d}.json"


def encode(value: msgspec.Struct) -> bytes:
    """Canonical JSON of a record, with the sha256 of the rest under ``checksum``."""
    fields: dict[str, Any] = msgspec.to_builtins(value)
    return encode_json({**fields, _CHECKSUM: _checksum_of(fields)})


def read_commit(store: ObjectStore, block_id: int) -> Commit | None:
    """The commit of one block, or ``None`` while there is none."""
    try:
        return _decode(store, commit_key(block_id), store.get(commit_key(block_id)), Commit)
    except NotFound:
        return None


def read_completion(store: ObjectStore) -> Completion | None:
    """The record of completion, or ``None`` while the dataset grows."""
    try:
        return _decode(store, COMPLETE_KEY, store.get(COMPLETE_KEY), Completion)
    except NotFound:
        return None


def read_manifest(store: ObjectStore) -> BlockManifest | None:
    """What the store holds of a dataset now, or ``None`` when it holds none.

    The truth is ``block_manifest.json`` plus later commits; a dataset of other software has only the former.
    Raises ``IntegrityError`` for a manifest that cannot be read or contradicts itself.
    """
    manifest = _read_stored_manifest(store)
    if manifest is not None and manifest.is_complete:
        return manifest
    completion = read_completion(store)
    known = list(manifest.blocks) if manifest else []
    latest = None
    for commit in commits_after(store, len(known)):
        known.append(commit.block)
        latest = commit
    if latest is not None:
        spec, skipped = latest.spec, latest.skipped_rows
    elif completion is not None:
        spec, skipped = completion.spec, completion.skipped_rows
    else:
        return manifest
    if completion is not None:
        skipped = completion.skipped_rows
    return BlockManifest.of(spec, known, skipped_rows=skipped, is_complete=completion is not None)


def is_published(store: ObjectStore) -> bool:
    """Whether the dataset is complete and ``block_manifest.json`` says so: nothing is left to be written."""
    if read_completion(store) is None:
        return False
    manifest = _read_stored_manifest(store)
    return manifest is not None and manifest.is_complete


def commits_after(store: ObjectStore, block_id: int) -> Iterator[Commit]:
    """The commits from ``block_id`` on, in order, as far as they exist now."""
    while (commit := read_commit(store, block_id)) is not None:
        yield commit
        block_id += 1


def _read_stored_manifest(store: ObjectStore) -> BlockManifest | None:
    try:
        raw = store.get(MANIFEST_KEY)
    except NotFound:
        return None
    where = f"{store.uri}/{MANIFEST_KEY}"
    try:
        fields = json.loads(raw)
        if _CHECKSUM in fields or "spec_digest" in fields:
            _check(fields, where)
        # Other software leaves out what it does not know, and may write null for it.
        manifest = msgspec.convert({k: v for k, v in fields.items() if v is not None}, BlockManifest)
    except (ValueError, AttributeError, msgspec.ValidationError) as error:
        raise IntegrityError(f"{where} is not a block manifest: {error}.") from error
    if manifest.schema > SCHEMA:
        raise IntegrityError(f"{where} was written by a newer metaflow-hf: upgrade metaflow-hf.")
    if [block.block_id for block in manifest.blocks] != list(range(manifest.total_blocks)):
        raise IntegrityError(
            f"{where} contradicts itself: it names {len(manifest.blocks)} blocks, not numbers 0 to "
            f"{manifest.total_blocks - 1}."
        )
    digest = manifest.digest or content_digest(manifest.blocks)
    return msgspec.structs.replace(manifest, digest=digest)


def _decode(store: ObjectStore, key: str, raw: bytes, kind: type[Record]) -> Record:
    where = f"{store.uri}/{key}"
    try:
        fields = json.loads(raw)
        _check(fields, where)
        return msgspec.convert(fields, kind)
    except (ValueError, AttributeError, msgspec.ValidationError) as error:
        raise IntegrityError(f"{where} cannot be read: {error}.") from error


def _check(fields: dict[str, Any], where: str) -> None:
    stored = fields.pop(_CHECKSUM, None)
    if stored != _checksum_of(fields):
        raise IntegrityError(
            f"{where} is damaged: its checksum is not that of its content. Restore it, or build again."
        )


def _checksum_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(encode_json(fields)).hexdigest()
