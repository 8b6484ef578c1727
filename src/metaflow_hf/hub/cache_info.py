"""What snapshots the datastore holds, repository by repository, and how to let some go."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.progress import format_bytes
from metaflow_hf.store.datastore import configured_store
from metaflow_hf.store.manifests import Manifest, read_manifests
from metaflow_hf.store.objects import ObjectInfo, ObjectStore


@dataclass(frozen=True, slots=True)
class CachedRevision:
    """One commit of a repository, with all selections of its files that are stored.

    ``selections`` counts these, ``keys`` names their manifests, ``blobs_of`` what each names with its size in bytes.
    """

    commit_hash: str
    size_on_disk: int
    num_files: int
    selections: int
    last_modified: datetime
    keys: tuple[str, ...] = field(repr=False)
    blobs_of: tuple[dict[str, int], ...] = field(repr=False)

    @property
    def size_on_disk_str(self) -> str:
        return format_bytes(self.size_on_disk)


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """One repository of one hub; ``size_on_disk`` counts bytes that its revisions share once."""

    repo_id: str
    repo_type: str
    endpoint: str
    size_on_disk: int
    revisions: tuple[CachedRevision, ...]

    @property
    def size_on_disk_str(self) -> str:
        return format_bytes(self.size_on_disk)


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """All snapshots of one datastore; ``size_on_disk`` counts bytes that repositories share once."""

    repos: tuple[CachedRepo, ...]
    size_on_disk: int
    store: ObjectStore = field(repr=False)

    @property
    def size_on_disk_str(self) -> str:
        return format_bytes(self.size_on_disk)

    def delete_revisions(self, *commit_hashes: str) -> "Deletion":
        """What letting these commits go would free; ``execute()`` does it. Raises ``SelectionError`` for unknown ones."""
        known = [revision for repo in self.repos for revision in repo.revisions]
        gone = [revision for revision in known if revision.commit_hash in commit_hashes]
        unknown = set(commit_hashes) - {revision.commit_hash for revision in gone}
        if unknown:
            raise SelectionError(f"no snapshot of commit {', '.join(sorted(unknown))} is stored.")
        return self.delete_selections(*(key for revision in gone for key in revision.keys))

    def delete_selections(self, *keys: str) -> "Deletion":
        """``delete_revisions`` for single manifests, by the keys that revisions list."""
        kept: dict[str, int] = {}
        gone: dict[str, int] = {}
        unknown = set(keys)
        for repo in self.repos:
            for revision in repo.revisions:
                unknown -= set(revision.keys)
                for key, blobs in zip(revision.keys, revision.blobs_of, strict=True):
                    (gone if key in keys else kept).update(blobs)
        if unknown:
            raise SelectionError(f"no snapshot is stored under {', '.join(sorted(unknown))}.")
        freed = sum(size for blob, size in gone.items() if blob not in kept)
        return Deletion(tuple(dict.fromkeys(keys)), freed, self.store)


@dataclass(frozen=True, slots=True)
class Deletion:
    """Manifests to delete. ``expected_freed_size`` is what ``metaflow hf gc`` frees later, unless models or
    checkpoints hold the same bytes.
    """

    keys: tuple[str, ...]
    expected_freed_size: int
    store: ObjectStore = field(repr=False)

    @property
    def expected_freed_size_str(self) -> str:
        return format_bytes(self.expected_freed_size)

    def execute(self) -> int:
        """Deletes the manifests and every entry that names one; returns how many objects went."""
        contents = {key.removeprefix("manifests/") for key in self.keys}
        entries = [
            info.key
            for info in self.store.list("snapshots")
            if "/".join(info.key.split("/")[-4:]) in contents
        ]
        for key in (*entries, *self.keys):
            self.store.delete(key)
        return len(entries) + len(self.keys)


def scan_cache() -> CacheInfo:
    """The snapshots in the datastore that Metaflow is configured with, largest repository first."""
    return scan(configured_store())


def scan(store: ObjectStore) -> CacheInfo:
    """``scan_cache`` of any store. Raises ``IntegrityError`` naming a damaged manifest."""
    found = list(read_manifests(store, "manifests"))
    by_repo: defaultdict[tuple[str, str], list[tuple[ObjectInfo, Manifest]]] = defaultdict(list)
    for info, manifest in found:
        _, endpoint, repo, *_ = info.key.split("/")
        by_repo[endpoint, repo].append((info, manifest))
    repos = [_repo(endpoint, items) for (endpoint, _), items in by_repo.items()]
    repos.sort(key=lambda repo: (-repo.size_on_disk, repo.repo_id))
    return CacheInfo(tuple(repos), sum(_blobs(manifest for _, manifest in found).values()), store)


def _repo(endpoint: str, items: list[tuple[ObjectInfo, Manifest]]) -> CachedRepo:
    by_commit: defaultdict[str, list[tuple[ObjectInfo, Manifest]]] = defaultdict(list)
    for info, manifest in items:
        by_commit[manifest.about["commit_hash"]].append((info, manifest))
    about: Any = items[0][1].about
    revisions = [_revision(commit, selections) for commit, selections in by_commit.items()]
    return CachedRepo(
        repo_id=about["repo_id"],
        repo_type=about["repo_type"],
        endpoint=endpoint,
        size_on_disk=sum(_blobs(manifest for _, manifest in items).values()),
        revisions=tuple(sorted(revisions, key=lambda revision: revision.last_modified, reverse=True)),
    )


def _revision(commit: str, items: list[tuple[ObjectInfo, Manifest]]) -> CachedRevision:
    blobs = _blobs(manifest for _, manifest in items)
    return CachedRevision(
        commit_hash=commit,
        size_on_disk=sum(blobs.values()),
        num_files=len({file.path for _, manifest in items for file in manifest.files}),
        selections=len(items),
        last_modified=max(info.last_modified for info, _ in items),
        keys=tuple(info.key for info, _ in items),
        blobs_of=tuple(_blobs([manifest]) for _, manifest in items),
    )


def _blobs(manifests: Iterable[Manifest]) -> dict[str, int]:
    return {file.blob: file.size for manifest in manifests for file in manifest.files}
