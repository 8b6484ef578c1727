"""From what a reader names to the store of its blocks: those that are there, or those that are built now."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from metaflow_hf.data.build import dataset_key, default_store, plan_dataset
from metaflow_hf.data.foreign import manifest_of_bare_blocks
from metaflow_hf.data.growth import GrowingBlocks, KnownBlocks, StoredBlocks, first_manifest
from metaflow_hf.data.sources import open_source
from metaflow_hf.data.sources.opening import local_path
from metaflow_hf.data.writer import LEASE_KEY
from metaflow_hf.errors import SelectionError
from metaflow_hf.references import SnapshotRef
from metaflow_hf.store import ObjectStore, open_store

logger = logging.getLogger("metaflow_hf.data")

# What tells a directory of blocks, even one that was only just begun, from a directory of raw files.
_PARTS: Final = ("blocks", "commits", LEASE_KEY)


def open_blocks(
    dataset_path: str | Path | ObjectStore | SnapshotRef | Mapping[str, Any],
    cache_dir: str | Path | None,
    **settings: Any,
) -> tuple[ObjectStore, KnownBlocks]:
    """The store of a dataset and what is known of it; a source of rows begins to be built.

    ``settings`` are those of ``plan_dataset``; they matter where rows become blocks. Raises ``SelectionError`` for a
    place that holds neither, and the errors of the source.
    """
    if not isinstance(dataset_path, (str, Path, SnapshotRef, Mapping)):
        return dataset_path, _stored(dataset_path)
    if isinstance(dataset_path, (str, Path)) and not str(dataset_path).startswith("hf://"):
        store = _blocks_at(str(dataset_path))
        if store is not None:
            return store, _stored(store)
    source = open_source(dataset_path, documents=settings.get("documents", "whole"))
    spec = plan_dataset(source, **settings)
    store = open_store(cache_dir).child(dataset_key(spec)) if cache_dir else default_store(spec)
    return store, GrowingBlocks(source, spec, store)


def _blocks_at(location: str) -> ObjectStore | None:
    """The store at a directory or URI that holds blocks, or begins to; ``None`` for one of rows."""
    if "://" in location and not location.startswith("file://"):
        store = open_store(location)
        names = store.children()
        return store if "block_manifest.json" in names or not set(_PARTS).isdisjoint(names) else None
    path = local_path(location)
    if (path / "block_manifest.json").is_file() or any((path / part).is_dir() for part in _PARTS):
        return open_store(path)
    return None


def _stored(store: ObjectStore) -> StoredBlocks:
    manifest = first_manifest(store) or manifest_of_bare_blocks(store)
    if manifest is None:
        raise SelectionError(
            f"{store.uri} holds no dataset of blocks: neither block_manifest.json nor commits/ nor blocks/. Build one "
            "with build_blocks."
        )
    if not manifest.is_complete and not manifest.spec_digest:
        # There are no commits to follow, so what it lists is all that there will be for this reader.
        logger.warning("%s says that it is not complete: only what it lists is read", store.uri)
        manifest = msgspec.structs.replace(manifest, is_complete=True)
    return StoredBlocks(store, manifest)
