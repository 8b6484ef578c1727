"""The datasets of blocks that a store holds, by their keys."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.records import read_manifest
from metaflow_hf.environment import node_cache_root
from metaflow_hf.errors import IntegrityError, SelectionError
from metaflow_hf.store import ObjectStore, configured_store, open_store

DATASETS: Final = "datasets"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDataset:
    """What a listing shows of one dataset; ``size`` is that of its blocks in bytes, ``problem`` why it is unreadable."""

    key: str
    uri: str
    dataset_name: str = ""
    source: str = ""
    commit_hash: str | None = None
    text_column: str | None = None
    total_samples: int = 0
    total_blocks: int = 0
    size: int = 0
    is_complete: bool = False
    problem: str = ""

    @classmethod
    def of(cls, manifest: BlockManifest, *, key: str, uri: str) -> Self:
        return cls(
            key=key,
            uri=uri,
            dataset_name=manifest.dataset_name,
            source=manifest.source,
            commit_hash=manifest.commit_hash,
            text_column=manifest.text_column,
            total_samples=manifest.total_samples,
            total_blocks=manifest.total_blocks,
            size=sum(block.size_bytes for block in manifest.blocks),
            is_complete=manifest.is_complete,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stored_datasets(store: ObjectStore) -> Iterator[StoredDataset]:
    """The datasets below ``datasets/``, by key; one that was begun and has no block yet is listed as well."""
    for name in store.children(DATASETS):
        key = f"{DATASETS}/{name}"
        dataset = store.child(key)
        try:
            manifest = read_manifest(dataset)
        except IntegrityError as error:
            yield StoredDataset(key=key, uri=dataset.uri, problem=str(error))
            continue
        if manifest is None:
            yield StoredDataset(key=key, uri=dataset.uri, dataset_name=name.rpartition("-")[0])
        else:
            yield StoredDataset.of(manifest, key=key, uri=dataset.uri)


def known_stores() -> list[tuple[str, ObjectStore]]:
    """Where datasets without a directory of their own lie: Metaflow's datastore and this user's cache."""
    return [("datastore", configured_store()), ("cache", open_store(node_cache_root()))]


def open_dataset(name: str) -> ObjectStore:
    """The store of a dataset of blocks: a directory, a URI, or a key in the datastore or in the cache.

    Raises ``SelectionError`` when there is none.
    """
    found = find_dataset(name)
    if found is None:
        raise SelectionError(
            f"{name!r} is no dataset of blocks: give its directory, URI or key; `metaflow hf blocks ls` lists keys."
        )
    return found


def find_dataset(name: str) -> ObjectStore | None:
    """As ``open_dataset``; ``None`` when there is no such dataset."""
    if "://" in name:
        return None if name.startswith("hf://") else open_store(name)
    path = Path(name).expanduser()
    if any((path / entry).exists() for entry in ("block_manifest.json", "blocks", "commits")):
        return open_store(path)
    key = name if name.startswith(f"{DATASETS}/") else f"{DATASETS}/{name}"
    if path.is_absolute() or path.exists() or key.count("/") != 1:
        return None
    return next((store.child(key) for _, store in known_stores() if store.children(key)), None)


def find_stored(source: str, store: ObjectStore) -> str | None:
    """The key of the complete dataset of blocks that ``source`` names, or ``None`` when it names something else.

    A key is ``datasets/<name>-<digest>``, also with the store's URI before it. Raises ``SelectionError`` for a key
    under which there is nothing, or a dataset that is not complete.
    """
    from metaflow_hf.data.sources.local import LocalPlace

    key = source.removeprefix(f"{store.uri}/").rstrip("/")
    folder, _, name = key.partition("/")
    if folder != DATASETS or not name or "/" in name or LocalPlace.parse(Path(source).absolute()).exists:
        return None
    manifest = read_manifest(store.child(key))
    if manifest is None:
        raise SelectionError(
            f"{source!r}: there is no dataset of blocks in {store.uri}; `metaflow hf blocks ls` lists them."
        )
    if not manifest.is_complete:
        raise SelectionError(
            f"{source!r} is not complete: {manifest.total_samples:,} rows in {manifest.total_blocks} blocks so far. Let "
            "its build end first."
        )
    return key
