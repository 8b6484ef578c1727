"""Datasets of the hub, streamed at one commit.

``datasets`` decides by their names which files make a configuration and split; they are read by ranged requests with the same
readers as local files, so that a cursor is a file and a row (a byte, in JSON lines), and nothing is downloaded
twice after an interruption.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final, cast

from metaflow_hf.data.formats import detect_format
from metaflow_hf.data.roots import datasets_root
from metaflow_hf.data.sources.files import FileSource
from metaflow_hf.data.sources.layout import CONFIGURATION, README, documents_of, layout_of_files
from metaflow_hf.data.sources.remembered import Listing, Memory
from metaflow_hf.data.sources.stored import source_of_snapshot
from metaflow_hf.data.sources.views import NO_OPTIONS, FileView, SizedFile, rows_of
from metaflow_hf.errors import FormatError, HubUnavailable, NotFound, SelectionError
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.modalities import check_modalities
from metaflow_hf.hub.names import Repo, Selection, check_revision
from metaflow_hf.hub.ranged import RangedFile
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import content_key
from metaflow_hf.store import ObjectStore, datastore
from metaflow_hf.store.manifests import read_manifest

_LOCATION: Final = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[^:@]+)(?::(?P<config>[^:@]*))?(?::(?P<split>(?:[^:@\[]|\[[^\]@]*\])*))?"
    r"(?:@(?P<revision>.+))?"
)
# Where hubs keep what they converted: a directory for each configuration.
_CONVERTED: Final = "refs/convert/parquet"
_CONVERTED_FILE: Final = re.compile(r"[^/]+/[^/]+/\d{4,}\.parquet")


@dataclass(frozen=True, slots=True)
class HubLocation:
    """The parts of ``hf://[owner/]name[:config[:split]][@revision]``."""

    repo_id: str
    config: str | None
    split: str | None
    revision: str | None

    @property
    def asked(self) -> str:
        """Configuration and split as they were written."""
        return f"{self.config or ''}:{self.split or ''}"

    @classmethod
    def parse(cls, text: str) -> "HubLocation":
        """Raises ``SelectionError`` for anything of another form."""
        match = _LOCATION.fullmatch(text)
        if match is None:
            raise SelectionError(
                f"{text!r} is not a dataset of the hub: write hf://[owner/]name[:config[:split]][@revision]."
            )
        parts = match.groupdict()
        return cls(
            parts["repo"].strip("/"),
            parts["config"] or None,
            parts["split"] or None,
            parts["revision"] or None,
        )


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a dataset at a commit."""

    client: HubClient
    repo: Repo
    commit_hash: str
    remote: RemoteFile

    @property
    def name(self) -> str:
        return self.remote.path

    @property
    def size(self) -> int:
        return self.remote.size

    def open(self) -> BinaryIO:
        return RangedFile.open(self.client, self.repo, self.commit_hash, self.remote)


@dataclass(frozen=True, kw_only=True)
class HubSource(FileSource):
    """The files of one configuration and split; the kinds of their columns are remembered for work without the hub."""

    memory: Memory
    repo: Repo
    asked: str

    def first_rows(self) -> list[Mapping[str, Any]]:
        commit = str(self.commit_hash)
        remembered = self.memory.columns(self.repo, commit, self.asked)
        if remembered is not None and _has_certain_format(remembered):
            # A commit never changes: its first file is not downloaded again for this.
            return remembered
        try:
            rows = super().first_rows()
        except HubUnavailable:
            if remembered is None:
                raise
            return remembered
        self.memory.note_columns(self.repo, commit, self.asked, rows)
        return rows


def _has_certain_format(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nobody will want to see the values of these rows."""
    try:
        detect_format(rows)
    except FormatError:
        return False
    return True


def open_hub_dataset(text: str, split: str | None = None) -> FileSource:
    """The dataset at a ``hf://`` location, at the commit that its revision names now; ``split`` replaces its split.

    A repository of nothing but documents gives their texts. Without the hub the commit that it named last counts,
    with a warning that says when, if that commit is cached: as a snapshot, whose files are read instead of the
    hub's, or as blocks, which are found again. Raises ``SelectionError`` for an unknown configuration or split and
    for files that hold no text, ``UnsupportedModalityError``, and the hub's errors.
    """
    location = HubLocation.parse(text)
    if split is not None:
        location = replace(location, split=split)
    client = HubClient(Endpoint.of())
    repo = Repo.of(location.repo_id, "dataset")
    revision = check_revision(location.revision)
    memory = Memory(datasets_root().uri, client.endpoint)
    try:
        resolved = client.resolve(repo, revision)
    except HubUnavailable as error:
        return _open_cached(location, client, repo, memory, error)
    memory.note_commit(repo, revision, resolved)
    listing = _list(location, client, repo, resolved.commit_hash)
    memory.note_listing(repo, resolved.commit_hash, location.asked, listing)
    return _source(location, client, repo, memory, listing, resolved.commit_hash)


def _list(location: HubLocation, client: HubClient, repo: Repo, commit: str) -> Listing:
    where = f"hf://{location.repo_id}"
    if "/" not in repo.repo_id:
        repo = Repo.of(client.canonical_id(repo, commit), "dataset")
    remote = {file.path: file for file in client.tree(repo, commit)}
    check_modalities(client, repo, commit, has_documents=bool(documents_of(remote)))
    _refuse_script(repo, remote, where)

    def open_path(path: str) -> HubFile:
        return HubFile(client, repo, commit, remote[path])

    descriptions = {name: _content(open_path(name)) for name in (README, CONFIGURATION) if name in remote}
    names, config = list(remote), location.config
    if location.revision == _CONVERTED or (location.config and _is_converted(names)):
        names, config = _converted(names, location.config, f"{where}@{_CONVERTED}"), None
    layout = layout_of_files(names, descriptions, config, location.split, where=where, open_path=open_path)
    views = layout.files(open_path, where=where)
    return Listing(
        repo.repo_id,
        location.config if location.config and config is None else layout.config,
        layout.split,
        [_hub_file(view).remote for view in views],
        layout.options,
        [(rows_of(view), view.share if isinstance(view, FileView) else 1.0) for view in views],
    )


def _content(file: HubFile) -> bytes:
    with file.open() as stream:
        return stream.read()


def _hub_file(file: SizedFile) -> HubFile:
    return cast("HubFile", file.file if isinstance(file, FileView) else file)


def _refuse_script(repo: Repo, names: Collection[str], where: str) -> None:
    script = f"{repo.repo_id.rpartition('/')[2]}.py"
    if script in names:
        raise SelectionError(
            f"{where} is made by a loading script ({script}), which `datasets` does not run any more. Hubs keep most "
            f"of these datasets as parquet too: use {where}@{_CONVERTED}."
        )


def _is_converted(names: Sequence[str]) -> bool:
    """Whether these are the files of a converted branch, at whatever revision it is named."""
    shown = [name for name in names if not name.startswith(".")]
    return bool(shown) and all(map(_CONVERTED_FILE.fullmatch, shown))


def _converted(names: Sequence[str], config: str | None, where: str) -> list[str]:
    """The files of one configuration among those that a hub converted."""
    known = list(dict.fromkeys(name.partition("/")[0] for name in names if name.endswith(".parquet")))
    if config is None and len(known) > 1 and "default" not in known:
        raise SelectionError(
            f"{where} has several configurations: {', '.join(known)}. Name one: "
            f"{where.replace('@', ':CONFIGURATION@')}."
        )
    config = config or ("default" if "default" in known or not known else known[0])
    if config not in known:
        raise SelectionError(
            f"{where}: there is no configuration {config!r}, only {', '.join(known) or 'none'}."
        )
    return [name for name in names if name.startswith(f"{config}/")]


def _source(
    location: HubLocation, client: HubClient, repo: Repo, memory: Memory, listing: Listing, commit: str
) -> FileSource:
    named = Repo.of(listing.repo_id, "dataset")
    files: list[SizedFile] = [HubFile(client, named, commit, file) for file in listing.files]
    if listing.options != NO_OPTIONS or listing.rows:
        rows = listing.rows or [(None, 1.0)] * len(files)
        files = [
            FileView(file, listing.options, rows=bounds, share=share)
            for file, (bounds, share) in zip(files, rows, strict=True)
        ]
    return HubSource(
        name=listing.repo_id.rpartition("/")[2],
        source=f"hf://{listing.repo_id}:{listing.config}:{listing.split}",
        files=files,
        commit_hash=commit,
        memory=memory,
        repo=repo,
        asked=location.asked,
    )


def _open_cached(
    location: HubLocation, client: HubClient, repo: Repo, memory: Memory, cause: HubUnavailable
) -> FileSource:
    request = SnapshotRequest.of(location.repo_id, repo_type="dataset", revision=location.revision)
    stores = [datasets_root()]
    if not datastore.is_active():
        # Snapshots of scripts lie in the datastore that Metaflow is configured with.
        stores.append(datastore.configured_store())
    commit = _commit_of(request, stores, client.endpoint, cause)
    listing = memory.listing(repo, commit, location.asked)
    repo_id = listing.repo_id if listing else repo.repo_id
    for store in stores:
        try:
            manifest = read_manifest(
                store, f"manifests/{content_key(client.endpoint, repo, commit, Selection())}"
            )
        except NotFound:
            continue
        return source_of_snapshot(
            store, manifest, repo_id, commit, config=location.config, split=location.split
        )
    if listing is None:
        raise cause
    return _source(location, client, repo, memory, listing, commit)


def _commit_of(
    request: SnapshotRequest, stores: Sequence[ObjectStore], endpoint: Endpoint, cause: HubUnavailable
) -> str:
    for store in stores[:-1]:
        with suppress(HubUnavailable):
            return Memory(store.uri, endpoint).commit_of(request, cause).commit_hash
    return Memory(stores[-1].uri, endpoint).commit_of(request, cause).commit_hash
