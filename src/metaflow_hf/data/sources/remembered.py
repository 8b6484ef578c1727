"""What is known of a hub's dataset while the hub cannot be asked: its commit, its files, its columns.

``sources/<endpoint>/<repo>/<commit>/<config:split>.json`` says which files they are, ``….columns.json`` what the
first rows held; neither holds any text. With both, blocks that are complete are found again without the hub.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from metaflow_hf.data.formats.columns import MESSAGES, TURNS, kind_of, parsed_list
from metaflow_hf.data.sources.views import NO_OPTIONS, ReadOptions
from metaflow_hf.errors import HubUnavailable, NotFound, StoreUnavailable
from metaflow_hf.hub.client import RemoteFile
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo
from metaflow_hf.hub.offline import recorded
from metaflow_hf.hub.records import Refs, Resolved
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.store import ObjectStore, encode_json, open_store, quote_part

logger = logging.getLogger("metaflow_hf.data")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one configuration and split, in order; ``repo_id`` is the hub's own.

    ``rows`` are the bounds of a slice in each file, and how much of the file that is.
    """

    repo_id: str
    config: str
    split: str
    files: Sequence[RemoteFile]
    options: ReadOptions = NO_OPTIONS
    rows: Sequence[tuple[tuple[int, int] | None, float]] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """The records of one store. What cannot be written is not remembered, and nothing fails for it."""

    uri: str
    endpoint: Endpoint

    def note_commit(self, repo: Repo, revision: str, resolved: Resolved) -> None:
        """What the hub says now."""
        with _unless_unavailable():
            Refs(self._store).add(self.endpoint, repo, revision, resolved)

    def commit_of(self, request: SnapshotRequest, cause: HubUnavailable) -> Resolved:
        """The commit that the hub named last, with a warning that says when. Raises ``cause`` without one."""

        def in_scope(commit_hash: str) -> bool:
            return bool(self._store.children(self._folder(request.repo, commit_hash)))

        return recorded(request, Refs(self._store), str(cause), cause=cause, in_scope=in_scope)

    def note_listing(self, repo: Repo, commit_hash: str, asked: str, listing: Listing) -> None:
        """``asked`` is the configuration and split as the user named them."""
        files = [[file.path, file.size, file.oid, file.sha256] for file in listing.files]
        record: dict[str, Any] = {
            "repo_id": listing.repo_id,
            "config": listing.config,
            "split": listing.split,
            "files": files,
        }
        if listing.options != NO_OPTIONS:
            record["options"] = asdict(listing.options)
        if any(rows is not None for rows, _ in listing.rows):
            record["rows"] = listing.rows
        with _unless_unavailable():
            self._store.create(self._key(repo, commit_hash, asked), encode_json(record))

    def listing(self, repo: Repo, commit_hash: str, asked: str) -> Listing | None:
        try:
            record = json.loads(self._store.get(self._key(repo, commit_hash, asked)))
        except NotFound:
            return None
        files = [RemoteFile(path, size, oid, sha256) for path, size, oid, sha256 in record["files"]]
        columns = record.get("options", {}).pop("columns", None)
        options = ReadOptions(**record.get("options", {}), columns=columns and tuple(columns))
        rows = [(bounds and tuple(bounds), share) for bounds, share in record.get("rows", ())]
        return Listing(record["repo_id"], record["config"], record["split"], files, options, rows)

    def note_columns(self, repo: Repo, commit_hash: str, asked: str, rows: Sequence[Row]) -> None:
        """What kinds of values the columns of these rows hold."""
        examples = [{name: _example(value) for name, value in row.items()} for row in rows]
        with _unless_unavailable():
            self._store.create(self._key(repo, commit_hash, f"{asked}.columns"), encode_json(examples))

    def columns(self, repo: Repo, commit_hash: str, asked: str) -> list[Row] | None:
        """Rows with values of the same kinds."""
        try:
            rows: list[Row] = json.loads(self._store.get(self._key(repo, commit_hash, f"{asked}.columns")))
        except NotFound:
            return None
        return rows

    @property
    def _store(self) -> ObjectStore:
        return open_store(self.uri)

    def _folder(self, repo: Repo, commit_hash: str) -> str:
        return f"sources/{self.endpoint.key}/{repo.key}/{commit_hash}"

    def _key(self, repo: Repo, commit_hash: str, asked: str) -> str:
        return f"{self._folder(repo, commit_hash)}/{quote_part(asked)}.json"


@contextmanager
def _unless_unavailable() -> Iterator[None]:
    try:
        yield
    except StoreUnavailable as error:
        logger.debug("not remembered for work without the hub: %s", error)


def _example(value: Any) -> Any:
    """A value of the same kind, by which the format of rows is found, that says nothing."""
    if isinstance(value, str):
        if kind_of(value) in {MESSAGES, TURNS}:
            return json.dumps(_example(parsed_list(value)))
        return "x" if value.strip() else ""
    if isinstance(value, list):
        return [_example(item) for item in value[:1]]
    if isinstance(value, dict):
        return {name: _example(item) for name, item in value.items()}
    return type(value)() if isinstance(value, (bool, int, float)) else None
