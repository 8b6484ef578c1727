"""Objects of a store as sources of rows: files below a URI, blocks that were built, snapshots by reference."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Final, cast

from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.layout import CONFIGURATION, README, Layout, layout_of_files, layout_of_splits
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


def open_stored(uri: str, split: str | None = None) -> FileSource:
    """The files below a URI, one object, or the blocks of a dataset; `uri:config:split` where nothing is at `uri`.

    Raises ``SelectionError`` when there is nothing to read, or no such split, and ``StoreUnavailable``.
    """
    uri = uri.rstrip("/")
    found = _open_exactly(uri, None, split)
    head, *named = uri.removeprefix(scheme := f"{uri.partition('://')[0]}://").split(":", 2)
    if found is None and named:
        found = _open_exactly(f"{scheme}{head}", named[0] or None, split or "".join(named[1:]) or None)
    if found is None:
        raise SelectionError(
            f"{uri} holds no file with rows; readable are {READABLE}; an archive only by its own name."
        )
    return found


def _open_exactly(uri: str, config: str | None, split: str | None) -> FileSource | None:
    blocks = source_of_blocks(_store(uri), uri, split)
    if blocks is not None:
        return blocks
    parent, _, name = uri.rpartition("/")
    files, listing = [], []
    layout: Layout | None = None
    if file_format(name) and not parent.endswith("/"):
        try:
            info = _store(parent).head(name)
        except NotFound:
            pass
        else:
            files = [StoreFile(name, info.size, parent, name)]
            listing = [[name, info.size, info.last_modified.isoformat()]]
            layout = layout_of_splits({"train": [name]}, split, where=uri)
    if not files:
        below = {info.key: info for info in _store(uri).list()}
        visible = [key for key in below if not any(part.startswith(".") for part in key.split("/"))]
        if not any(map(holds_rows, visible)):
            return None
        descriptions = {key: _store(uri).get(key) for key in (README, CONFIGURATION) if key in below}
        layout = layout_of_files(
            visible,
            descriptions,
            config,
            split,
            where=uri,
            open_path=lambda key: StoreFile(key, below[key].size, uri, key),
        )
        for info in map(below.__getitem__, dict.fromkeys(layout.paths)):
            files.append(StoreFile(info.key, info.size, uri, info.key))
            listing.append([info.key, info.size, info.last_modified.isoformat()])
    # Reading everything for a checksum would cost as much as building: sizes and times stand for it.
    digest = hashlib.sha256(encode_json(listing)).hexdigest()
    assert layout is not None
    views = layout.files({file.name: file for file in files}.__getitem__, where=uri)
    named = f":{config or ''}:{layout.split}" if config or layout.split != "train" else ""
    return FileSource(
        name=name.partition(".")[0] or name, source=f"{uri}{named}", files=views, source_digest=digest
    )


def source_of_blocks(store: ObjectStore, where: str, split: str | None = None) -> FileSource | None:
    """The rows of a dataset of blocks, or ``None`` if there is none; they are one split, `train`.

    Raises ``SelectionError`` while it grows, and for another split.
    """
    manifest = read_manifest(store)
    if manifest is None:
        return None
    if not manifest.is_complete:
        raise SelectionError(
            f"{where} holds a dataset that is not complete ({manifest.total_blocks} blocks so far): finish building it."
        )
    files = {
        block.file_path: StoreFile(
            block.file_path,
            block.size_bytes or store.head(block.key).size,
            store.uri,
            block.key,
            block.sha256,
        )
        for block in manifest.blocks
    }
    layout = layout_of_splits({"train": list(files)}, split, where=where)
    named = f"::{layout.split}" if layout.split != "train" else ""
    return FileSource(
        name=manifest.dataset_name,
        source=f"blocks:{manifest.dataset_name}{named}",
        files=layout.files(files.__getitem__, where=where),
        source_digest=manifest.digest,
    )


def open_reference(
    reference: SnapshotRef | Mapping[str, Any],
    store: ObjectStore | None = None,
    *,
    split: str | None = None,
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
        store,
        manifest,
        known.repo_id,
        known.commit_hash,
        split=split,
        source_digest="" if is_whole else manifest.digest,
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
    where = f"hf://{repo_id}"
    descriptions = {name: store.get(stored[name].blob) for name in (README, CONFIGURATION) if name in stored}

    def open_path(path: str) -> StoreFile:
        file = stored[path]
        return StoreFile(file.path, file.size, store.uri, file.blob, file.sha256)

    layout = layout_of_files(stored, descriptions, config, split, where=where, open_path=open_path)
    return FileSource(
        name=repo_id.rpartition("/")[2],
        source=f"hf://{repo_id}:{layout.config}:{layout.split}",
        files=layout.files(open_path, where=where),
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
