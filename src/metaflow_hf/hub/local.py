"""huggingface_hub's download functions, through the cache: same arguments, local paths.

They may be used in a flow or outside; what they bring is stored in Metaflow's datastore like any snapshot.
"""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from metaflow_hf.events import OnEvent, ignore
from metaflow_hf.hub.progress import progress_on
from metaflow_hf.hub.request import SnapshotRequest
from metaflow_hf.hub.snapshots import Snapshots, content_key
from metaflow_hf.references import SnapshotRef
from metaflow_hf.store.datastore import configured_store
from metaflow_hf.store.eviction import trim
from metaflow_hf.store.filenames import check_filename
from metaflow_hf.store.node_cache import NodeCache

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

logger = logging.getLogger("metaflow_hf.hub")


@overload
def snapshot_download(repo_id: str, *, dry_run: Literal[False] = False, **arguments: Any) -> str: ...


@overload
def snapshot_download(
    repo_id: str, *, dry_run: Literal[True], **arguments: Any
) -> "list[DryRunFileInfo]": ...


def snapshot_download(
    repo_id: str, *, dry_run: bool = False, **arguments: Any
) -> "str | list[DryRunFileInfo]":
    """The path of a directory with the snapshot's files, downloaded only if no one ever stored them.

    Takes huggingface_hub's arguments. Into ``local_dir`` real, writable files; otherwise a directory in the node's
    cache, the same for each call, to be read only. With ``dry_run`` nothing is downloaded or recorded: the answer
    is huggingface_hub's list of what would be. Raises the errors of ``metaflow_hf.errors`` (those of the hub are
    huggingface_hub's classes too).
    """
    request = SnapshotRequest.of(repo_id, dry_run=dry_run, **arguments)
    return _plan(request) if dry_run else str(load_snapshot(request))


@overload
def hf_hub_download(
    repo_id: str,
    filename: str,
    *,
    subfolder: str | None = None,
    dry_run: Literal[False] = False,
    **arguments: Any,
) -> str: ...


@overload
def hf_hub_download(
    repo_id: str, filename: str, *, subfolder: str | None = None, dry_run: Literal[True], **arguments: Any
) -> "DryRunFileInfo": ...


def hf_hub_download(
    repo_id: str, filename: str, *, subfolder: str | None = None, dry_run: bool = False, **arguments: Any
) -> "str | DryRunFileInfo":
    """The path of one file of a repository; arguments, cache and errors as ``snapshot_download``.

    Raises ``EntryNotFoundError`` when the revision has no such file.
    """
    path = check_filename(f"{subfolder}/{filename}" if subfolder else filename)
    request = SnapshotRequest.of(repo_id, filename=path, dry_run=dry_run, **arguments)
    return _plan(request)[0] if dry_run else str(load_snapshot(request) / path)


def resolve_revision(
    repo_id: str,
    repo_type: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    token: bool | str | None = None,
) -> str:
    """The commit hash that a branch, tag or ``refs/pr/N`` names now, after checking this user's access.

    Offline, or with the hub out of reach, the last recorded answer with a warning; else ``HubUnavailable``.
    """
    request = SnapshotRequest.of(
        repo_id, repo_type=repo_type, revision=revision, endpoint=endpoint, token=token
    )
    return open_snapshots().resolve(request).commit_hash


def open_snapshots(on_event: OnEvent = ignore) -> Snapshots:
    """Snapshots of the datastore that Metaflow is configured with, on behalf of no task."""
    return Snapshots(configured_store(), NodeCache.default(), on_event=on_event)


def _plan(request: SnapshotRequest) -> "list[DryRunFileInfo]":
    from dataclasses import replace

    snapshots = open_snapshots()
    files = snapshots.plan(request)
    if request.local_dir is not None:
        return files
    key = content_key(request.endpoint, request.repo, files[0].commit_hash, request.selection)
    tree = _tree(snapshots.cache, key)
    return [replace(file, local_path=str(tree / file.filename)) for file in files]


def load_snapshot(request: SnapshotRequest, on_event: OnEvent | None = None) -> Path:
    """The directory of a whole request, as ``snapshot_download`` gives it."""
    return bring_snapshot(request, on_event)[1]


def bring_snapshot(request: SnapshotRequest, on_event: OnEvent | None = None) -> tuple[SnapshotRef, Path]:
    """A request's reference and directory. Progress is a bar on a terminal, else lines in the log, unless ``on_event``."""
    with progress_on(sys.stderr, logger.info) as progress:
        snapshots = open_snapshots(on_event or progress)
        reference = snapshots.ensure(request)
        if request.local_dir is not None:
            return reference, snapshots.load(reference, Path(request.local_dir), token=request.token)
        target = _tree(snapshots.cache, reference.key.removeprefix("snapshots/global/"))
        snapshots.load(reference, target, link_large=True, token=request.token)
    os.utime(target)
    trim(snapshots.cache)
    return reference, target


def _tree(cache: NodeCache, key: str) -> Path:
    return cache.root / "trees" / key.removesuffix(".json")
