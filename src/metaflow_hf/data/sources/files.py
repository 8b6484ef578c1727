"""A source that is a list of files, whatever machine they lie on."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Final, Protocol

import msgspec

from metaflow_hf.data.manifest import Cursor, Documents
from metaflow_hf.data.rows import InputLines, InputRows, Unreadable
from metaflow_hf.data.sources.readers import reader_for

PEEK_ROWS: Final = 100


class SourceFile(Protocol):
    """One file of a source: ``name`` tells people which, and its ending says the format."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def open(self) -> BinaryIO:
        """The file for reading; seekable."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """The rows of ``files``, one file after the other; ``documents`` says what a row of a PDF is."""

    name: str
    source: str
    files: Sequence[SourceFile]
    source_digest: str = ""
    commit_hash: str | None = None
    documents: Documents = "whole"

    def first_rows(self) -> list[Mapping[str, Any]]:
        with closing(self.batches(Cursor())) as batches:
            for batch in batches:
                rows = [row for row in map(_as_mapping, islice(batch.rows, PEEK_ROWS)) if row]
                if rows:
                    return rows
        return []

    def batches(self, cursor: Cursor) -> Generator[InputRows | InputLines]:
        for number in range(cursor.file, len(self.files)):
            file = self.files[number]
            begin = cursor if number == cursor.file else Cursor(file=number)
            yield from reader_for(file.name, documents=self.documents)(file, begin)


def _as_mapping(row: bytes | Mapping[str, Any] | Unreadable) -> Mapping[str, Any] | None:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, Unreadable):
        return None
    try:
        return msgspec.json.decode(row, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Refused by its number when its turn comes.
        return None
