"""From a source to a dataset of blocks, resumable anywhere."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from metaflow_hf.data.emptiness import nothing_stored
from metaflow_hf.data.formats import DetectedFormat, resolve_format
from metaflow_hf.data.left_out import LeftOutColumns
from metaflow_hf.data.manifest import BlockManifest, Compression, DatasetSpec, Documents, OnBadRow
from metaflow_hf.data.open_block import scratch_directory
from metaflow_hf.data.reading import encoded_batches
from metaflow_hf.data.records import is_published, read_completion, read_manifest
from metaflow_hf.data.roots import datasets_root
from metaflow_hf.data.sources import Source, open_source
from metaflow_hf.data.sources.documents import DOCUMENT_RULES, document_format
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.writer import LEASE_SECONDS, DatasetWriter, check_settings, hold_lease
from metaflow_hf.errors import ClaimLost, ConfigError, DatasetMismatch
from metaflow_hf.references import SnapshotRef
from metaflow_hf.store import ObjectStore, encode_json, open_store, quote_part
from metaflow_hf.store.leases import Lease

logger = logging.getLogger("metaflow_hf.data")

Progress = Callable[[BlockManifest], None]


def build_blocks(
    source: str | Path | SnapshotRef | Mapping[str, Any],
    output_dir: str | Path | None = None,
    *,
    samples_per_block: int = 100_000,
    format: str = "auto",  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
    text_column: str | None = None,
    on_bad_row: OnBadRow = "raise",
    num_proc: int = 1,
    ascii_only: bool = False,
    compression: Compression | None = None,
    max_rows: int | None = None,
    max_bytes: int | None = None,
    keep_columns: Sequence[str] | None = None,
    progress: Progress | None = None,
    dataset_name: str | None = None,
    documents: Documents = "whole",
    lease_seconds: float = LEASE_SECONDS,
) -> BlockManifest:
    """Streams ``source`` into the blocks of a dataset and returns its manifest; what is complete is returned at once.

    Interrupted anywhere, the next call with the same arguments goes on from the last committed block, and the
    result is byte for byte that of an uninterrupted call. Of several callers one writes, the others wait and
    return the same manifest.

    ``source`` is ``hf://[owner/]name[:config[:split]][@revision]``; a local file (.jsonl, .json, .csv, .parquet,
    .txt, …, also .gz, .zst, .bz2 and .xz), a pattern, an archive, a directory of such files, or a folder of
    ``save_to_disk``, all with ``:config:split`` behind them; the URI of such files, or of blocks, in a store (s3://…);
    or the reference of a cached snapshot of a dataset. A split may be a slice or a sum: ``train[:10%]``,
    ``train+test``. ``output_dir`` is a directory or a URI of a store; without it the dataset goes to the datastore of
    the running flow, outside of flows to the user's cache directory, under a key of its own.

    ``format`` is that of the rows: ``auto``, ``text``, ``messages``, ``sharegpt``, ``prompt_completion``, ``alpaca`` or
    one of your own, ``columns`` names the column of each of its roles, ``text_column`` that of a format with one (see
    ``detect_format``). Rows are stored as they are; the format decides which of them are blank or unusable.

    ``ascii_only`` keeps only rows with ASCII text; ``max_rows`` and ``max_bytes`` (of JSON lines) take the first
    ones; ``documents`` makes each document one row (``"whole"``), or each page of a PDF (``"pages"``); ``keep_columns``
    names the columns to store beside those that are trained (all by default); ``progress`` is called with the manifest
    so far after each block. Up to ``num_proc`` processes, this one included, read and encode files, or parts of local
    files, at once; the result does not depend on how many. Small sources (below 64 MiB of JSON Lines, or a third of that
    in other formats) are read by this process alone, and so is a single file that cannot be cut. What is read ahead is
    kept on the disk, beside local blocks. Raises ``FormatError`` when the format is not certain (before anything is
    written), ``BadRowError``, ``DatasetMismatch``, ``SelectionError`` (also for a source without a row that can be
    stored) and the hub's errors.
    """
    if num_proc < 1:
        raise ConfigError(f"num_proc must be at least 1, got {num_proc}.")
    opened = open_source(source, documents=documents)
    spec = plan_dataset(
        opened,
        samples_per_block=samples_per_block,
        format=format,
        columns=columns,
        text_column=text_column,
        on_bad_row=on_bad_row,
        ascii_only=ascii_only,
        compression=compression,
        max_rows=max_rows,
        max_bytes=max_bytes,
        keep_columns=keep_columns,
        dataset_name=dataset_name,
    )
    store = default_store(spec) if output_dir is None else open_store(output_dir)
    return write_dataset(
        opened, spec, store, progress=progress, lease_seconds=lease_seconds, num_proc=num_proc
    )


def process_raw_dataset_to_blocks(
    input_path: str | Path,
    output_dir: str | Path,
    dataset_name: str,
    block_size: int = 100_000,
    *,
    text_column: str | None = None,
    on_bad_row: OnBadRow = "raise",
    num_proc: int = 1,
    progress: Progress | None = None,
    documents: Documents = "whole",
) -> BlockManifest:
    """``build_blocks`` of a local file or directory, under a name of your choice."""
    return build_blocks(
        input_path,
        output_dir,
        samples_per_block=block_size,
        text_column=text_column,
        on_bad_row=on_bad_row,
        num_proc=num_proc,
        progress=progress,
        dataset_name=dataset_name,
        documents=documents,
    )


def plan_dataset(
    source: Source,
    *,
    samples_per_block: int,
    format: str = "auto",  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
    text_column: str | None = None,
    on_bad_row: OnBadRow = "raise",
    ascii_only: bool = False,
    compression: Compression | None = None,
    max_rows: int | None = None,
    max_bytes: int | None = None,
    keep_columns: Sequence[str] | None = None,
    dataset_name: str | None = None,
    documents: Documents | None = None,
) -> DatasetSpec:
    """What will be built, decided before anything is written.

    ``documents`` is what the source was opened with. Raises ``ConfigError``, also when it is not that.
    """
    if isinstance(keep_columns, str):
        raise ConfigError(f"keep_columns must be a list of names, got {keep_columns!r}.")
    spec = check_settings(
        DatasetSpec(
            dataset_name=dataset_name or source.name,
            source=source.source,
            source_digest=source.source_digest,
            commit_hash=source.commit_hash,
            block_size=samples_per_block,
            ascii_only=ascii_only,
            compression=compression,
            on_bad_row=on_bad_row,
            max_rows=max_rows,
            max_bytes=max_bytes,
            **_document_settings(source, documents),
            keep_columns=None if keep_columns is None else tuple(sorted(set(keep_columns))),
        )
    )
    rows = source.first_rows()
    if not rows:
        return spec
    _check_columns(spec, rows)
    found = resolve_format(
        rows,
        format=format,
        columns=columns,
        text_column=text_column,
        where=source.source.removeprefix("file:"),
    )
    return with_format(spec, found)


def with_format(spec: DatasetSpec, form: DetectedFormat) -> DatasetSpec:
    """The specification of a dataset whose rows have this format."""
    columns = {} if form.name == "text" else dict(form.columns)
    return msgspec.structs.replace(spec, text_column=form.main_column, format=form.name, columns=columns)


def _document_settings(source: Source, documents: Documents | None) -> dict[str, Any]:
    """The fields of a ``DatasetSpec`` by which documents become rows; none for a source without documents."""
    if not isinstance(source, FileSource):
        return {}
    if documents not in (None, source.documents):
        raise ConfigError(
            f"documents is {documents!r}, but the source was opened with {source.documents!r}. Give open_source the same."
        )
    formats = {document_format(file.name) for file in source.files} - {None}
    return {
        "documents": source.documents if ".pdf" in formats else None,
        "document_rules": DOCUMENT_RULES if formats else None,
    }


def _check_columns(spec: DatasetSpec, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ``ConfigError`` for a column to keep that none of the first rows has."""
    known = dict.fromkeys(column for row in rows for column in row)
    unknown = [column for column in spec.keep_columns or () if column not in known]
    if unknown:
        raise ConfigError(
            f"keep_columns: {spec.source.removeprefix('file:')} has no column {', '.join(map(repr, unknown))}. Its "
            f"columns: {', '.join(map(str, known))}."
        )


def write_dataset(
    source: Source,
    spec: DatasetSpec,
    store: ObjectStore,
    *,
    progress: Progress | None = None,
    lease_seconds: float = LEASE_SECONDS,
    stop: Callable[[], bool] = lambda: False,
    num_proc: int = 1,
    may_be_empty: bool = False,
) -> BlockManifest:
    """Writes what is missing of the dataset, or waits while another process does.

    Raises ``SelectionError`` for a source without a row that can be stored, unless it ``may_be_empty``. Up to ``num_proc``
    processes, this one included, read and encode. ``stop`` is asked between batches of rows; when it says so, what is
    committed so far is returned.
    """
    while (
        lease := hold_lease(store, ttl=lease_seconds, done=lambda: stop() or is_published(store))
    ) is not None:
        try:
            with lease:
                return _write(
                    source,
                    spec,
                    store,
                    lease,
                    progress=progress,
                    stop=stop,
                    num_proc=num_proc,
                    may_be_empty=may_be_empty,
                )
        except ClaimLost as error:
            # This process was held up for too long: the other one's work is as good.
            logger.warning("%s What it writes is waited for.", error)
    return _finished(store, spec)


def _write(
    source: Source,
    spec: DatasetSpec,
    store: ObjectStore,
    lease: Lease,
    *,
    progress: Progress | None,
    stop: Callable[[], bool],
    num_proc: int,
    may_be_empty: bool,
) -> BlockManifest:
    writer = DatasetWriter(store, spec, lease=lease, on_commit=progress)
    if writer.is_complete:
        return writer.finish()
    left_out = LeftOutColumns(spec.dataset_name)
    rows = encoded_batches(source, spec, writer.cursor, num_proc=num_proc, directory=scratch_directory(store))
    try:
        with closing(rows):
            for batch in rows:
                left_out.warn(batch.left_out)
                if stop():
                    return _finished(store, spec)
                if not writer.append(batch):
                    break
            else:
                if not (writer.total_samples or may_be_empty):
                    raise nothing_stored(source, spec)
        return writer.finish()
    finally:
        writer.discard()


def default_store(spec: DatasetSpec) -> ObjectStore:
    """Where a dataset goes when no place is named: the running flow's datastore, else the user's cache."""
    return datasets_root().child(f"datasets/{dataset_key(spec)}")


def dataset_key(spec: DatasetSpec) -> str:
    """The key part of a dataset: a readable name and what decides its bytes."""
    digest = hashlib.sha256(encode_json(spec.to_json())).hexdigest()
    return f"{quote_part(spec.dataset_name)}-{digest[:24]}"


def _finished(store: ObjectStore, spec: DatasetSpec) -> BlockManifest:
    completion = read_completion(store)
    if completion is not None:
        spec.check_same(completion.spec, where=store.uri)
    manifest = read_manifest(store)
    if manifest is not None:
        return manifest
    if completion is None:
        return BlockManifest.of(spec, [], skipped_rows=0, is_complete=False)
    raise DatasetMismatch(f"{store.uri} is complete but holds no blocks.")
