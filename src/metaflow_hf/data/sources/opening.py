"""From what the user wrote to a source of rows."""

import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.rows import InputLines, InputRows
from metaflow_hf.errors import SelectionError

HUB_SCHEME: Final = "hf://"
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


def open_source(location: str | Path) -> Source:
    """The source at ``hf://[owner/]name[:config[:split]][@revision]``, or at a local file or directory.

    Raises ``SelectionError`` for a path that does not exist or holds nothing readable, and the hub's errors.
    """
    text = str(location)
    if text.startswith(HUB_SCHEME):
        from metaflow_hf.data.sources.hub import open_hub_dataset

        return open_hub_dataset(text)
    if "://" in text and not text.startswith("file://"):
        raise SelectionError(
            f"{text!r} is not a source of rows: give hf://[owner/]name[:config[:split]][@revision], or a local file "
            "or directory."
        )
    from metaflow_hf.data.sources.local import open_local

    path = Path(text.removeprefix("file://")).expanduser()
    if not path.exists() and _LIKE_A_REPOSITORY.fullmatch(text):
        raise SelectionError(
            f"there is no file or directory {text!r} here; for the dataset of that name on the hub write hf://{text}."
        )
    return open_local(path)
