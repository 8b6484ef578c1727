"""The beginning of a dataset as blocks, and how many rows all of it would have, without building it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from metaflow_hf.data.build import dataset_key, plan_dataset, write_dataset
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.progress import BuildProgress, source_bytes
from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.sources import Source, open_source
from metaflow_hf.data.sources.files import FileSource, SourceFile
from metaflow_hf.data.sources.views import rows_of
from metaflow_hf.data.stored import find_stored
from metaflow_hf.store import ObjectStore

SAMPLE_BYTES: Final = 16 * 2**20
_FOOTERS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledDataset:
    """Blocks to look at, in ``store``: all of a dataset that is built already, else the first 16 MiB.

    ``rows`` are those of the whole dataset, ``is_exact`` says whether that is a count or an estimate; ``num_bytes`` is
    the size that its blocks have, or will have.
    """

    store: ObjectStore
    manifest: BlockManifest
    rows: int
    is_exact: bool
    is_built: bool
    num_bytes: int


def sample_dataset(
    location: str, scratch: ObjectStore, datastore: ObjectStore, **settings: Any
) -> SampledDataset:
    """Looks at the dataset at ``location``; ``settings`` are those of ``plan_dataset``.

    Only ``scratch`` is written. What ``datastore`` holds already is read from there. Raises ``SelectionError``,
    ``ConfigError`` for an unclear text column, ``BadRowError`` and the hub's errors.
    """
    if (key := find_stored(location, datastore)) is not None:
        return _built(datastore.child(key))
    source = open_source(location, documents=settings.get("documents", "whole"))
    spec = plan_dataset(source, **settings)
    finished = datastore.child(f"datasets/{dataset_key(spec)}")
    if (manifest := read_manifest(finished)) is not None and manifest.is_complete:
        return _built(finished)
    told = BuildProgress(spec.dataset_name, lambda _: None, total_bytes=source_bytes(source))
    some = plan_dataset(source, **{**settings, "max_bytes": SAMPLE_BYTES})
    store = scratch.child(f"datasets/{dataset_key(some)}")
    manifest = write_dataset(told.meter(source), some, store)
    size = sum(block.size_bytes for block in manifest.blocks)
    # The row that would not have fitted any more is not among them.
    is_whole = size < SAMPLE_BYTES - _largest_row(manifest) or manifest.total_samples == spec.max_rows
    rows = manifest.total_samples if is_whole else _rows(source, manifest, told.state().read_bytes)
    rows = min(rows, spec.max_rows or rows)
    return SampledDataset(
        store=store,
        manifest=manifest,
        rows=rows,
        is_exact=is_whole,
        is_built=False,
        num_bytes=round(size * rows / max(manifest.total_samples, 1)),
    )


def _built(store: ObjectStore) -> SampledDataset:
    manifest = read_manifest(store)
    assert manifest is not None
    return SampledDataset(
        store=store,
        manifest=manifest,
        rows=manifest.total_samples,
        is_exact=True,
        is_built=True,
        num_bytes=sum(block.size_bytes for block in manifest.blocks),
    )


def _largest_row(manifest: BlockManifest) -> int:
    """A row larger than a hundred average ones is rare enough."""
    size = sum(block.size_bytes for block in manifest.blocks)
    return 100 * size // max(manifest.total_samples, 1)


def _rows(source: Source, manifest: BlockManifest, read_bytes: int) -> int:
    """All rows of a source of which some were read: parquet counts them, otherwise by bytes."""
    total = source_bytes(source)
    if isinstance(source, FileSource) and all(file.name.endswith(".parquet") for file in source.files):
        return _counted(source.files)
    if not total or not read_bytes:
        return manifest.total_samples
    return round(manifest.total_samples * max(total / read_bytes, 1.0))


def _counted(files: Sequence[SourceFile]) -> int:
    """What the footers of some files say, for all of them."""
    import pyarrow as pa
    import pyarrow.parquet

    rows, size = 0, 0
    for file in files[:_FOOTERS]:
        view = rows_of(file)
        if view is not None:
            rows += view[1] - view[0]
        else:
            with file.open() as stream:
                rows += pa.parquet.ParquetFile(stream).metadata.num_rows
        size += file.size
    return round(rows * sum(file.size for file in files) / max(size, 1))
