"""From what the user wrote to a source of rows."""

import dataclasses
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

from metaflow_hf.data.manifest import Cursor, Documents
from metaflow_hf.data.rows import InputLines, InputRows
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.errors import ConfigError, SelectionError
from metaflow_hf.references import SnapshotRef

HUB_SCHEME: Final = "hf://"
STORE_SCHEMES: Final = ("s3://", "gs://", "az://", "memory://")
_LIKE_A_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}(@\S+)?")


class Source(Protocol):
    """Rows in a fixed order, readable from any cursor on.

    ``name`` names the dataset; ``source``, ``source_digest`` and ``commit_hash`` decide its content. The end of
    the data is the end of the iteration; an outage is ``HubUnavailable`` or ``StoreUnavailable`` after bounded
    retries; everything else is an error.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def source_digest(self) -> str: ...

    @property
    def commit_hash(self) -> str | None: ...

    def first_rows(self) -> list[Mapping[str, Any]]:
        """Some rows from the beginning, by which the text column is found; none for an empty dataset."""
        ...

    def batches(self, cursor: Cursor) -> Generator[InputRows | InputLines]:
        """All rows from ``cursor`` on; close it when not all are wanted."""
        ...


def open_source(
    location: str | Path | SnapshotRef | Mapping[str, Any],
    *,
    split: str | None = None,
    documents: Documents = "whole",
) -> Source:
    """The source at ``hf://[owner/]name[:config[:split]][@revision]``, at a local file or directory, at the URI of a
    store (an object, a prefix, or a dataset of blocks), or in the snapshot of a dataset that a reference names.

    ``split`` names the split in place of one in the location: `test`, `train[:10%]`, `train+test`. Local paths and
    URIs name configuration and split behind colons too, where nothing of the whole name exists. With
    ``documents="pages"`` each page of a PDF is a row of its own, otherwise each document is one row.

    Raises ``SelectionError`` for a place that does not exist or holds nothing readable, ``ConfigError`` for another
    value of ``documents``, and the errors of the hub and of the store.
    """
    if documents not in ("whole", "pages"):
        raise ConfigError(f"documents must be 'whole' or 'pages', got {documents!r}.")
    source = _open(location, split)
    return dataclasses.replace(source, documents=documents) if isinstance(source, FileSource) else source


def _open(location: str | Path | SnapshotRef | Mapping[str, Any], split: str | None) -> Source:
    if not location or not isinstance(location, (str, Path, SnapshotRef, Mapping)):
        raise SelectionError(
            f"{type(location).__name__} {location!r:.80} names no source: give hf://…, a path, a URI of a store or a "
            "reference; rows that you have in hand are written by StreamingBlockWriter."
        )
    if not isinstance(location, (str, Path)):
        from metaflow_hf.data.sources.stored import open_reference

        return open_reference(location, split=split)
    text = str(location)
    if text.startswith(HUB_SCHEME):
        from metaflow_hf.data.sources.hub import open_hub_dataset

        return open_hub_dataset(text, split)
    if text.startswith(STORE_SCHEMES):
        from metaflow_hf.data.sources.stored import open_stored

        return open_stored(text, split)
    if "://" in text and not text.startswith("file://"):
        raise SelectionError(
            f"{text!r} is not a source of rows: give hf://[owner/]name[:config[:split]][@revision], a local file or "
            "directory, or s3://bucket/…, gs://bucket/… or az://container/…."
        )
    from metaflow_hf.data.sources.local import LocalPlace, open_local

    path = local_path(text)
    if not LocalPlace.parse(path.absolute()).exists and _LIKE_A_REPOSITORY.fullmatch(text):
        raise SelectionError(
            f"there is no file or directory {text!r} here; for the dataset of that name on the hub write hf://{text}."
        )
    return open_local(path, split)


def local_path(location: str) -> Path:
    """The path that a path or a ``file://`` URI names."""
    return Path(unquote(urlsplit(location).path) if "://" in location else location).expanduser()
