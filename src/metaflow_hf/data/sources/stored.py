"""Objects of a store as sources of rows: files below a URI, blocks that were built, snapshots by reference."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Final, cast

from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.layout import layout_of_files
from metaflow_hf.data.sources.readers import READABLE, file_format, holds_rows
from metaflow_hf.errors import IntegrityError, NotFound, SelectionError
from metaflow_hf.references import SnapshotRef, parse_reference
from metaflow_hf.store import ObjectStore, open_store
from metaflow_hf.store.manifests import Manifest
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.objects import encode_json

REQUEST_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoreFile:
    """One object, known to people as ``name``; ``sha256`` where it is known what it must be."""

    name: str
    size: int
    uri: str
    key: str
    sha256: str = ""

    def open(self) -> BinaryIO:
        raw = _StoredObject(_store(self.uri), self)
        return cast("BinaryIO", io.BufferedReader(raw, REQUEST_BYTES))


def open_stored(uri: str) -> FileSource:
    """The files below a URI in the order of their keys, one object, or the blocks of a dataset.

    Raises ``SelectionError`` when there is nothing to read, and ``StoreUnavailable``.
    """
    uri = uri.rstrip("/")
    blocks = source_of_blocks(_store(uri), uri)
    if blocks is not None:
        return blocks
    parent, _, name = uri.rpartition("/")
    files, listing = [], []
    if file_format(name) and not parent.endswith("/"):
        try:
            info = _store(parent).head(name)
        except NotFound:
            pass
        else:
            files = [StoreFile(name, info.size, parent, name)]
            listing = [[name, info.size, info.last_modified.isoformat()]]
    if not files:
        for info in _store(uri).list():
            is_hidden = any(part.startswith(".") for part in info.key.split("/"))
            if not is_hidden and holds_rows(info.key):
                files.append(StoreFile(info.key, info.size, uri, info.key))
                listing.append([info.key, info.size, info.last_modified.isoformat()])
    if not files:
        raise SelectionError(
            f"{uri} holds no file with rows; readable are {READABLE}; an archive only by its own name."
        )
    # Reading everything for a checksum would cost as much as building: sizes and times stand for it.
    digest = hashlib.sha256(encode_json(listing)).hexdigest()
    return FileSource(name=name.partition(".")[0] or name, source=uri, files=files, source_digest=digest)


def source_of_blocks(store: ObjectStore, where: str) -> FileSource | None:
    """The rows of a dataset of blocks, or ``None`` if there is none. Raises ``SelectionError`` while it grows."""
    manifest = read_manifest(store)
    if manifest is None:
        return None
    if not manifest.is_complete:
        raise SelectionError(
            f"{where} holds a dataset that is not complete ({manifest.total_blocks} blocks so far): finish building it."
        )
    return FileSource(
        name=manifest.dataset_name,
        source=f"blocks:{manifest.dataset_name}",
        files=[
            StoreFile(
                block.file_path,
                block.size_bytes or store.head(block.key).size,
                store.uri,
                block.key,
                block.sha256,
            )
            for block in manifest.blocks
        ],
        source_digest=manifest.digest,
    )


def open_reference(
    reference: SnapshotRef | Mapping[str, Any], store: ObjectStore | None = None
) -> FileSource:
    """The default configuration and split of a cached snapshot of a dataset, from the datastore, without a hub.

    What is built of it is what is built of the same commit on the hub. Raises ``SelectionError`` for a reference
    to anything else and for files that hold no text, and ``NotFound`` when the datastore does not hold it.
    """
    known = reference if isinstance(reference, SnapshotRef) else parse_reference(reference)
    if not isinstance(known, SnapshotRef) or known.repo_type != "dataset":
        kind = known.repo_type if isinstance(known, SnapshotRef) else known.TYPE
        raise SelectionError(
            f"{known.key!r} is a reference to a {kind}, not to a dataset: rows come from what "
            "snapshot_download(…, repo_type='dataset') returned."
        )
    if store is None:
        from metaflow_hf.store import configured_store

        store = configured_store()
    _, manifest = find_manifest(store, known)
    is_whole = known.key.endswith("/all.json")
    return source_of_snapshot(
        store, manifest, known.repo_id, known.commit_hash, source_digest="" if is_whole else manifest.digest
    )


def source_of_snapshot(
    store: ObjectStore,
    manifest: Manifest,
    repo_id: str,
    commit_hash: str,
    *,
    config: str | None = None,
    split: str | None = None,
    source_digest: str = "",
) -> FileSource:
    """One configuration and split of the files of a snapshot; they are checked against the manifest while read."""
    stored = {file.path: file for file in manifest.files}
    readme = store.get(stored["README.md"].blob) if "README.md" in stored else None
    layout = layout_of_files(stored, readme, config, split, where=f"hf://{repo_id}")
    chosen = [stored[path] for path in layout.paths]
    return FileSource(
        name=repo_id.rpartition("/")[2],
        source=f"hf://{repo_id}:{layout.config}:{layout.split}",
        files=[StoreFile(file.path, file.size, store.uri, file.blob, file.sha256) for file in chosen],
        commit_hash=commit_hash,
        source_digest=source_digest,
    )


@lru_cache(maxsize=16)
def _store(uri: str) -> ObjectStore:
    return open_store(uri)


class _StoredObject(io.RawIOBase):
    """An object as a seekable stream; each read is one ranged request.

    Raises ``IntegrityError`` once an object that was read from its beginning to its end is not what it must be.
    """

    def __init__(self, store: ObjectStore, file: StoreFile) -> None:
        self._store = store
        self._file = file
        self._position = 0
        self._sha = hashlib.sha256()
        self._checked = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        length = min(len(buffer), self._file.size - start, REQUEST_BYTES)
        if length <= 0:
            return 0
        data = self._store.get_range(self._file.key, start, start + length)
        if len(data) != length:
            raise IntegrityError(
                f"{self._where} ends at byte {start + len(data)}: it was changed or cut off."
            )
        buffer[:length] = data
        self._position = start + length
        if self._file.sha256 and start <= self._checked < self._position:
            self._check(memoryview(data)[self._checked - start :])
        return length

    @property
    def _where(self) -> str:
        return f"{self._file.name} ({self._store.uri}/{self._file.key})"

    def _check(self, data: memoryview) -> None:
        self._sha.update(data)
        self._checked += len(data)
        if self._checked == self._file.size and self._sha.hexdigest() != self._file.sha256:
            raise IntegrityError(
                f"{self._where} is damaged: its sha256 is {self._sha.hexdigest()}, not {self._file.sha256}. Restore it, "
                "or download or build it again; throw away what was made of it."
            )
