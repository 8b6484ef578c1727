"""What the arguments of ``metaflow hf snapshots`` mean: a repository, one of its commits, or a key."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from metaflow_hf.errors import NotFound, SelectionError

if TYPE_CHECKING:
    from metaflow_hf.hub.cache_info import CachedRepo, CachedRevision

KEYS: Final = ("manifests/", "snapshots/", "models/", "checkpoints/")


@dataclass(frozen=True, slots=True)
class StoredRevision:
    """One stored commit and the repository that it is of."""

    repo: "CachedRepo"
    revision: "CachedRevision"


def is_key(target: str) -> bool:
    """Whether the argument is a key rather than the id of a repository."""
    return target.startswith(KEYS)


def find_stored(target: str, repo_type: str | None, revision: str | None = None) -> list[StoredRevision]:
    """The stored commits of ``org/name`` or ``org/name@revision``, of any type unless one is given.

    A revision is a branch or tag as the hub last named it, else the beginning of one commit hash. Raises ``NotFound``
    when none is stored, ``SelectionError`` when two revisions are given, an empty one, or the beginning of several.
    """
    from metaflow_hf.hub import scan_cache

    repo_id, at, named = target.partition("@")
    if (at and not named) or revision == "":
        raise SelectionError(
            f"the revision of {repo_id!r} is empty: leave it out to mean every stored commit."
        )
    if named and revision and named != revision:
        raise SelectionError(f"{target!r} names a revision, and --revision {revision!r} another: give one.")
    wanted = named or revision or ""
    repos = [
        repo for repo in scan_cache().repos if repo.repo_id == repo_id and repo_type in (None, repo.repo_type)
    ]
    if not repos:
        raise NotFound(
            f"no snapshot of {repo_type or 'a repository'} {repo_id!r} is stored: see `metaflow hf snapshots ls`."
        )
    found = [StoredRevision(repo, item) for repo in repos for item in _chosen(repo, wanted)]
    if not found:
        raise NotFound(
            f"no commit {wanted!r} of {repo_id} is stored: see `metaflow hf snapshots show {repo_id}`."
        )
    return found


def _chosen(repo: "CachedRepo", wanted: str) -> "list[CachedRevision]":
    from metaflow_hf.hub.endpoint import Endpoint
    from metaflow_hf.hub.names import Repo
    from metaflow_hf.hub.records import Refs
    from metaflow_hf.store import configured_store

    if wanted and Endpoint.of().key == repo.endpoint:
        resolved = Refs(configured_store()).get(Endpoint.of(), Repo.of(repo.repo_id, repo.repo_type), wanted)
        if resolved is not None:
            return [item for item in repo.revisions if item.commit_hash == resolved.commit_hash]
    found = [item for item in repo.revisions if item.commit_hash.startswith(wanted)]
    if wanted and len(found) > 1:
        raise SelectionError(
            f"{wanted!r} is the beginning of {len(found)} commits of {repo.repo_id}: "
            f"{', '.join(item.commit_hash for item in found)}. Give more of one."
        )
    return found
