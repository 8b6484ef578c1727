"""What a revision means while the hub may not, or cannot, be asked; and the user's huggingface_hub cache in its place.

    the datastore's record of this revision, or of another that named this commit          refs
    the user's huggingface_hub cache: a pre-filled image, a shared volume                  refs/, trees/, blobs/ there
    a full commit hash whose snapshot this user's own scope holds already

Files of huggingface_hub's cache are verified like downloaded ones.
"""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from metaflow_hf import environment
from metaflow_hf.errors import HubUnavailable
from metaflow_hf.hub.client import HubClient, RemoteFile
from metaflow_hf.hub.errors import AccessRefused
from metaflow_hf.hub.names import Repo, is_commit_hash
from metaflow_hf.hub.records import Refs, Resolved
from metaflow_hf.hub.request import SnapshotRequest

logger = logging.getLogger("metaflow_hf.hub")

T = TypeVar("T")


def recorded(
    request: SnapshotRequest,
    refs: Refs,
    reason: str,
    *,
    cause: Exception | None,
    in_scope: Callable[[str], bool],
) -> Resolved:
    """The commit of the request by what was recorded, with a warning that names its age.

    ``in_scope`` tells whether this user's own scope holds a commit. Raises ``cause``, or ``HubUnavailable``, when
    nothing is known, and for restricted content that is not in scope.
    """
    endpoint, repo, revision = request.endpoint, request.repo, request.revision
    is_refused = isinstance(cause, AccessRefused)
    found = refs.get(endpoint, repo, revision)
    if found is None and is_commit_hash(revision):
        found = refs.find(endpoint, repo, revision)
    if found is None and not is_refused and (held := _in_hub_cache(repo, revision)) is not None:
        _tell(request, held, refs.age(held), f"huggingface_hub's cache said {{}} ago; {reason}")
        return held
    if found is None and is_commit_hash(revision) and in_scope(revision) and not is_refused:
        return Resolved(revision, restricted=True, resolved_on=datetime.now(UTC))
    if found is None:
        raise cause or HubUnavailable(
            f"{repo} at revision {revision!r} was never resolved from this datastore, so it cannot be used without the "
            f"hub ({reason}). Run once online."
        )
    if found.restricted and cause is not None and is_refused:
        raise cause
    if found.restricted and not in_scope(found.commit_hash):
        raise HubUnavailable(
            f"{repo} is private or gated, and your access to it cannot be checked without the hub ({reason})."
        ) from cause
    _tell(request, found, refs.age(found), f"which the hub named {{}} ago ({reason})")
    return found


def cached_hub(request: SnapshotRequest, commit_hash: str) -> "CachedHub | None":
    """The user's huggingface_hub cache as a hub, if it knows which files the commit has."""
    hub = CachedHub(request.endpoint)
    return hub if hub.listing(request.repo, commit_hash).is_file() else None


class CachedHub(HubClient):
    """Answers from the user's huggingface_hub cache, and never asks the network."""

    __slots__ = ()

    def listing(self, repo: Repo, commit_hash: str) -> Path:
        """Where huggingface_hub keeps the list of a commit's files."""
        return _folder(repo) / "trees" / f"{commit_hash}.json"

    def tree(self, repo: Repo, commit_hash: str) -> list[RemoteFile]:
        """All files of a commit, as the hub listed them. Raises ``HubUnavailable`` for a list that is damaged."""
        path = self.listing(repo, commit_hash)
        try:
            files = json.loads(path.read_text("utf-8"))["files"]
            return [
                RemoteFile(
                    path=name,
                    size=int(about.get("lfs_size") or about["size"]),
                    oid=str(about["blob_id"]),
                    sha256=about.get("lfs_sha256"),
                )
                for name, about in files.items()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubUnavailable(
                f"the files of {repo} at {commit_hash[:12]}: {path} cannot be read ({type(error).__name__}), and the hub "
                "cannot be asked."
            ) from error

    def repeat(self, what: str, request: Callable[[], T]) -> T:  # noqa: ARG002  it would ask the network
        """Raises ``HubUnavailable``: what is not in the cache cannot be had."""
        raise HubUnavailable(
            f"{what} is not in huggingface_hub's cache {environment.hub_cache()}, or is damaged there, and the hub cannot "
            "be asked. Run once online."
        )


def _folder(repo: Repo) -> Path:
    return environment.hub_cache() / repo.key


def _in_hub_cache(repo: Repo, revision: str) -> Resolved | None:
    folder = _folder(repo)
    record = folder / "refs" / revision
    if is_commit_hash(revision):
        record = folder / "trees" / f"{revision}.json"
    elif ".." in Path(revision).parts or Path(revision).is_absolute():
        return None
    try:
        commit = revision if is_commit_hash(revision) else record.read_text("utf-8").strip()
        since = datetime.fromtimestamp(record.stat().st_mtime, UTC)
    except (OSError, ValueError):
        return None
    if not is_commit_hash(commit) or not (folder / "trees" / f"{commit}.json").is_file():
        return None
    # Whether the repository is restricted is not known there: it is, for whoever asks the datastore next.
    return Resolved(commit, restricted=True, resolved_on=since)


def _tell(request: SnapshotRequest, found: Resolved, age: timedelta, how: str) -> None:
    logger.warning(
        "%s at revision %r: using commit %s, %s",
        request.repo,
        request.revision,
        found.commit_hash[:12],
        how.format(_in_words(age)),
    )


def _in_words(age: timedelta) -> str:
    for unit, seconds in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(age.total_seconds() // seconds)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
