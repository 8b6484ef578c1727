"""The datasets of blocks that a store holds, by their keys."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.records import read_manifest
from metaflow_hf.errors import IntegrityError, SelectionError
from metaflow_hf.store import ObjectStore

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


def find_stored(source: str, store: ObjectStore) -> str | None:
    """The key of the complete dataset of blocks that ``source`` names, or ``None`` when it names something else.

    A key is ``datasets/<name>-<digest>``, also with the store's URI before it. Raises ``SelectionError`` for a key
    under which there is nothing, or a dataset that is not complete.
    """
    key = source.removeprefix(f"{store.uri}/").rstrip("/")
    folder, _, name = key.partition("/")
    if folder != DATASETS or not name or "/" in name or Path(source).exists():
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
