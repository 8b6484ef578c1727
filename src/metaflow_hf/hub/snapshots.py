"""Snapshots of hub repositories in the flow's datastore: downloaded once, by one task, for everyone.

    revision -> commit, once per run (and this user's access)      records, client
    entry in scope, or manifest of this commit and selection?      nothing is listed or downloaded
    no: one task downloads under a lease, the others wait          fetch
    reference -> files                                             store.materialize

Nothing of huggingface_hub is imported while everything is cached.
"""

import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from metaflow_hf.errors import HubUnavailable, NotFound, SelectionError
from metaflow_hf.events import OnEvent, ignore
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.loading import load_manifest
from metaflow_hf.hub.names import Repo, Selection
from metaflow_hf.hub.records import Pins, Refs, Resolved, RunContext
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.tally import Tally
from metaflow_hf.references import SnapshotRef
from metaflow_hf.store import leases
from metaflow_hf.store.manifests import Manifest, read_manifest
from metaflow_hf.store.models import find_manifest
from metaflow_hf.store.node_cache import NodeCache, Verify
from metaflow_hf.store.objects import ObjectStore, encode_json, quote_part

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

    from metaflow_hf.hub.client import HubClient
    from metaflow_hf.hub.fetch import Fetcher

logger = logging.getLogger("metaflow_hf.hub")

Scope = Literal["checkpoint", "flow", "global"]
SCOPES: Final[tuple[Scope, ...]] = ("checkpoint", "flow", "global")
LEASE_SECONDS: Final = 20.0
GLOBAL_NAMESPACE: Final = "_global"


class Snapshots:
    """The snapshots of one store, on behalf of one task (``run``) or of a script outside any flow (``None``)."""

    def __init__(
        self,
        store: ObjectStore,
        cache: NodeCache,
        *,
        run: RunContext | None = None,
        scope: Scope = "checkpoint",
        on_event: OnEvent = ignore,
        lease_seconds: float = LEASE_SECONDS,
        client: "Callable[[SnapshotRequest], HubClient] | None" = None,
    ) -> None:
        if scope not in SCOPES:
            raise SelectionError(f"cache_scope {scope!r} is none of {', '.join(SCOPES)}.")
        self._store = store
        self.cache = cache
        self._run = run
        self._scope: Scope = scope if run is not None else "global"
        self._on_event = on_event
        self._lease_seconds = lease_seconds
        self._make_client = client or _client

    def resolve(self, request: SnapshotRequest) -> Resolved:
        """The commit that the revision means for this run, with this user's access checked once per run.

        ``force_download`` asks the hub again. Offline, or with the hub out of reach, the last recorded answer
        counts, with a warning that names its age; without one ``HubUnavailable``. A ``dry_run`` records nothing.
        """
        pins = Pins(self._store, self._run) if self._run else None
        endpoint, repo, revision = request.endpoint, request.repo, request.revision
        pinned = pins.get(endpoint, repo, revision) if pins and not request.force_download else None
        if pinned is not None:
            return pinned
        inherited = pins.inherited(endpoint, repo, revision) if pins and not request.force_download else None
        if inherited is not None:
            # A restricted repository at the commit of the resumed run: this user's own access counts.
            request = replace(request, revision=inherited.commit_hash)
        refs = Refs(self._store)
        if request.offline:
            resolved = self._recorded(request, refs, "HF_HUB_OFFLINE=1 or local_files_only")
        else:
            try:
                resolved = self._make_client(request).resolve(repo, request.revision)
            except HubUnavailable as error:
                if request.force_download:
                    raise
                resolved = self._recorded(request, refs, str(error), cause=error)
            else:
                if not request.dry_run:
                    refs.add(endpoint, repo, request.revision, resolved)
        if pins is None or request.dry_run:
            return resolved
        return pins.add(endpoint, repo, revision, resolved, renew=request.force_download)

    def ensure(self, request: SnapshotRequest) -> SnapshotRef:
        """A reference to the snapshot, downloaded and stored if it was not; safe among any number of tasks."""
        resolved = self.resolve(request)
        manifest_key = _manifest_key(request.endpoint, request.repo, resolved.commit_hash, request.selection)
        manifest = None if request.force_download else self._cached(manifest_key)
        if manifest is None:
            manifest = self._fetch(request, resolved, manifest_key)
        else:
            self._tell_cached(request, resolved, manifest)
        key = self._entry_key(request, resolved.commit_hash)
        entry = {"schema": 1, "type": SnapshotRef.TYPE, "manifest": manifest_key}
        self._store.create(key, encode_json(entry))
        return SnapshotRef(
            key=key,
            digest=manifest.digest,
            size=manifest.size,
            num_files=len(manifest.files),
            created_on=datetime.now(UTC).isoformat(timespec="seconds"),
            pathspec=self._run.pathspec if self._run else "",
            repo_id=request.repo.repo_id,
            repo_type=request.repo.repo_type,
            revision=request.revision,
            commit_hash=resolved.commit_hash,
        )

    def plan(self, request: SnapshotRequest) -> "list[DryRunFileInfo]":
        """What ``ensure`` would download now, file by file; nothing is downloaded, stored or recorded.

        ``is_cached`` says that the store holds the bytes, from whatever repository or flow. ``local_path`` is below
        ``local_dir``, and empty without one. Errors as ``ensure``.
        """
        from huggingface_hub import DryRunFileInfo

        commit = self.resolve(request).commit_hash
        manifest = self._cached(_manifest_key(request.endpoint, request.repo, commit, request.selection))
        if manifest is not None:
            files = [(file.path, file.size, True) for file in manifest.files]
        else:
            planned = self._fetcher(request, commit).plan(commit)
            files = [(file.path, file.size, is_stored) for file, is_stored in planned]
        return [
            DryRunFileInfo(
                commit_hash=commit,
                file_size=size,
                filename=path,
                local_path=str(Path(request.local_dir, path)) if request.local_dir is not None else "",
                is_cached=is_stored,
                will_download=request.force_download or not is_stored,
            )
            for path, size, is_stored in files
        ]

    def load(
        self,
        reference: SnapshotRef,
        target: Path,
        *,
        verify: Verify = "once",
        link_large: bool = False,
        materialize_mode: str | None = None,
        token: bool | str | None = None,
    ) -> Path:
        """Writes the snapshot's files below ``target``; see ``load_manifest``."""
        key, manifest = find_manifest(self._store, reference)
        return load_manifest(
            self._store,
            key,
            manifest,
            target,
            cache=self.cache,
            verify=verify,
            link_large=link_large,
            materialize_mode=materialize_mode,
            token=token,
            on_event=self._on_event,
        )

    def _tell_cached(self, request: SnapshotRequest, resolved: Resolved, manifest: Manifest) -> None:
        name = f"{request.repo.repo_id}@{resolved.commit_hash[:12]}"
        Tally(name, manifest.size, self._on_event, cached_bytes=manifest.size).tell()

    def _cached(self, manifest_key: str) -> Manifest | None:
        try:
            return read_manifest(self._store, manifest_key)
        except NotFound:
            return None

    def _fetcher(self, request: SnapshotRequest, commit_hash: str) -> "Fetcher":
        if not request.offline:
            return self._fetcher_from(self._make_client(request), request)
        if (hub := self._cached_hub(request, commit_hash)) is not None:
            return self._fetcher_from(hub, request)
        raise HubUnavailable(
            f"{request.repo} at revision {request.revision!r} ({request.selection}) is not cached, and offline mode "
            f"forbids asking {request.endpoint}. Run once online, or unset HF_HUB_OFFLINE."
        )

    def _fetcher_from(self, hub: "HubClient", request: SnapshotRequest) -> "Fetcher":
        from metaflow_hf.hub.fetch import Fetcher

        return Fetcher(self._store, self.cache, hub, request, self._on_event)

    def _cached_hub(self, request: SnapshotRequest, commit_hash: str) -> "HubClient | None":
        from metaflow_hf.hub.offline import cached_hub

        return None if request.force_download else cached_hub(request, commit_hash)

    def _fetch(self, request: SnapshotRequest, resolved: Resolved, manifest_key: str) -> Manifest:
        commit = resolved.commit_hash
        fetcher = self._fetcher(request, commit)
        lease = leases.wait_for(
            self._store,
            f"leases/snapshots/{request.endpoint.key}/{request.repo.key}/{commit}",
            owner=f"{self._run.pathspec if self._run else 'script'} pid {os.getpid()} on {socket.gethostname()}",
            ttl=self._lease_seconds,
            done=lambda: not request.force_download and self._cached(manifest_key) is not None,
        )
        if lease is None:
            manifest = read_manifest(self._store, manifest_key)
            self._tell_cached(request, resolved, manifest)
            return manifest
        with lease:
            try:
                return fetcher.fetch(commit, manifest_key)
            except HubUnavailable as error:
                # An image or volume that was filled before may have it all.
                hub = self._cached_hub(request, commit)
                if hub is None:
                    raise
                logger.warning("%s Trying huggingface_hub's cache instead.", error)
                with suppress(HubUnavailable):
                    return self._fetcher_from(hub, request).fetch(commit, manifest_key)
                raise

    def _recorded(
        self, request: SnapshotRequest, refs: Refs, reason: str, cause: Exception | None = None
    ) -> Resolved:
        from metaflow_hf.hub.offline import recorded

        def in_scope(commit_hash: str) -> bool:
            return self._in_scope(request, commit_hash)

        return recorded(request, refs, reason, cause=cause, in_scope=in_scope)

    def _in_scope(self, request: SnapshotRequest, commit_hash: str) -> bool:
        try:
            self._store.head(self._entry_key(request, commit_hash))
        except NotFound:
            return False
        return True

    def _entry_key(self, request: SnapshotRequest, commit_hash: str) -> str:
        run = self._run
        scope = "global"
        if run is not None and self._scope == "checkpoint":
            namespace = quote_part(run.namespace, empty=GLOBAL_NAMESPACE)
            scope = f"checkpoint/{quote_part(run.flow)}/{quote_part(run.step)}/{namespace}"
        elif run is not None and self._scope == "flow":
            scope = f"flow/{quote_part(run.flow)}"
        content = content_key(request.endpoint, request.repo, commit_hash, request.selection)
        return f"snapshots/{scope}/{content}"


def _client(request: SnapshotRequest) -> "HubClient":
    from metaflow_hf.hub.client import HubClient

    return HubClient(
        request.endpoint, token=request.token, headers=request.headers, timeout_seconds=request.etag_timeout
    )


def content_key(endpoint: Endpoint, repo: Repo, commit_hash: str, selection: Selection) -> str:
    """What every key of a snapshot ends with: hub, repository, commit and selection."""
    return f"{endpoint.key}/{repo.key}/{commit_hash}/{selection.key}.json"


def _manifest_key(endpoint: Endpoint, repo: Repo, commit_hash: str, selection: Selection) -> str:
    return f"manifests/{content_key(endpoint, repo, commit_hash, selection)}"
