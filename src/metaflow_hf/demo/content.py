"""What the hub holds: repositories with their branches and tags, and who may read them.

Repositories can be given as a builder that runs once, when somebody first asks for the repository, so that
a hub with many of them starts at once.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from metaflow_hf.demo.commits import Commit, HubFile, make_commit

RepoType = Literal["model", "dataset"]
Files = Mapping[str, bytes]
Builder = Callable[[], Files]

MAIN = "main"


class RevisionMissing(KeyError):  # noqa: N818  reads as what it says
    """The repository has no branch, tag, pull request or commit of this name."""


class LfsObjects:
    """The bytes of LFS files of all repositories, by sha256. Thread-safe: entries are only ever added."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def put(self, sha256: str, data: bytes) -> None:
        self._objects[sha256] = data

    def get(self, sha256: str) -> bytes | None:
        return self._objects.get(sha256)


class Repository:
    """One model or dataset: commits, and the branches, tags and pull requests that point at them.

    Thread-safe. ``build`` gives the files of the first commit and ``then`` makes further ones, tags and branches;
    both run once, on first need. Until then only ``tags`` and the other fields of the listing are known.
    """

    def __init__(
        self,
        repo_id: str,
        repo_type: RepoType,
        build: Builder,
        objects: "LfsObjects",
        *,
        private: bool = False,
        gated: bool = False,
        tags: Iterable[str] = (),
        downloads: int = 0,
        likes: int = 0,
        then: "Callable[[Repository], object] | None" = None,
    ) -> None:
        self.repo_id = repo_id
        self.repo_type: RepoType = repo_type
        self.private = private
        self.gated = gated
        self.labels = tuple(tags)
        self.downloads = downloads
        self.likes = likes
        self._build: Builder | None = build
        self._then = then
        self._objects = objects
        self._lock = threading.RLock()
        self._commits: dict[str, Commit] = {}
        self._branches: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._pulls: dict[str, str] = {}

    def _built(self) -> None:
        with self._lock:
            if self._build is not None:
                self._add(self._build(), MAIN, "initial commit")
                self._build = None
                if self._then is not None:
                    self._then(self)

    def _add(self, changes: Mapping[str, bytes | None], branch: str, message: str) -> str:
        head = self._commits.get(self._heads(branch).get(branch) or self._branches.get(MAIN, ""))
        files = dict(head.files) if head else {}
        for path, data in changes.items():
            if data is not None:
                files[path] = HubFile.of(path, data)
                if files[path].is_lfs:
                    self._objects.put(files[path].sha256, data)
            elif files.pop(path, None) is None:
                raise KeyError(f"{self.repo_id} has no file {path!r} to delete on {branch!r}")
        commit = make_commit(files, head, message)
        self._commits[commit.sha] = commit
        self._heads(branch)[branch] = commit.sha
        return commit.sha

    def _heads(self, name: str) -> dict[str, str]:
        return self._pulls if name.startswith("refs/pr/") else self._branches

    def commit(
        self, changes: Mapping[str, bytes | None], *, branch: str = MAIN, message: str = "update"
    ) -> str:
        """Move ``branch`` (made from main when it is new; ``refs/pr/N`` too) to a new commit; return its hash.

        ``changes`` maps a path to its new bytes, or to None to delete it; all other files stay. A path to
        delete that is not there raises KeyError, and nothing is changed.
        """
        with self._lock:
            self._built()
            return self._add(changes, branch, message)

    def tag(self, name: str, revision: str = MAIN) -> None:
        """Name a commit for good. Raises RevisionMissing."""
        with self._lock:
            self._tags[name] = self.resolve(revision).sha

    def branch(self, name: str, revision: str = MAIN) -> None:
        """A new branch at ``revision``. Raises RevisionMissing."""
        with self._lock:
            self._branches[name] = self.resolve(revision).sha

    def resolve(self, revision: str = MAIN) -> Commit:
        """The commit of a branch, tag, ``refs/pr/N``, full hash or unique short hash (7+). Raises RevisionMissing."""
        with self._lock:
            self._built()
            for names in (self._branches, self._tags, self._pulls):
                if revision in names:
                    return self._commits[names[revision]]
            if len(revision) >= 7:
                found = [c for sha, c in self._commits.items() if sha.startswith(revision)]
                if len(found) == 1:
                    return found[0]
        raise RevisionMissing(revision)

    def history(self, revision: str = MAIN) -> list[Commit]:
        """The commits that lead to ``revision``, newest first."""
        with self._lock:
            commits = [self.resolve(revision)]
            while commits[-1].parent:
                commits.append(self._commits[commits[-1].parent])
            return commits

    def refs(self) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """Branches, tags and pull requests, each name -> commit hash."""
        with self._lock:
            self._built()
            return dict(self._branches), dict(self._tags), dict(self._pulls)


@dataclass(frozen=True, slots=True)
class User:
    """Who a token belongs to: ``granted`` gated repositories may be downloaded, ``namespaces`` are also the
    owners whose private repositories are visible and writable.
    """

    name: str
    granted: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()


class HubContent:
    """All repositories and users of one hub. Thread-safe; in memory only.

    A token that nobody registered counts as no token (people have a real one in their environment), unless
    ``reject_unknown_tokens``, which answers it as the real hub does: 401 to everything.
    """

    def __init__(self, *, reject_unknown_tokens: bool = False) -> None:
        self.reject_unknown_tokens = reject_unknown_tokens
        self._lock = threading.Lock()
        self._repos: dict[tuple[RepoType, str], Repository] = {}
        self._moved: dict[tuple[RepoType, str], str] = {}
        self._users: dict[str, User] = {}
        self._objects = LfsObjects()

    def add(
        self,
        repo_id: str,
        files: Files | Builder,
        *,
        repo_type: RepoType = "model",
        private: bool = False,
        gated: bool = False,
        tags: Iterable[str] = (),
        downloads: int = 0,
        likes: int = 0,
        then: Callable[[Repository], object] | None = None,
    ) -> Repository:
        """A new repository with one commit on main, and what ``then`` adds. Raises ValueError when the id is taken."""
        build = files if callable(files) else lambda: files
        repo = Repository(
            repo_id,
            repo_type,
            build,
            self._objects,
            private=private,
            gated=gated,
            tags=tags,
            downloads=downloads,
            likes=likes,
            then=then,
        )
        with self._lock:
            if (repo_type, repo_id) in self._repos:
                raise ValueError(f"the hub already has a {repo_type} {repo_id!r}")
            self._repos[repo_type, repo_id] = repo
        return repo

    def rename(self, old: str, new: str, *, repo_type: RepoType = "model") -> None:
        """Requests for ``old`` are redirected to ``new`` from now on. Raises KeyError when ``old`` is unknown."""
        with self._lock:
            repo = self._repos.pop((repo_type, old))
            repo.repo_id = new
            self._repos[repo_type, new] = repo
            self._moved[repo_type, old] = new

    def add_user(
        self, token: str, name: str, *, granted: Iterable[str] = (), namespaces: Iterable[str] = ()
    ) -> User:
        """Make ``token`` known."""
        user = User(name, frozenset(granted), frozenset({name, *namespaces}))
        with self._lock:
            self._users[token] = user
        return user

    def user(self, token: str | None) -> User | None:
        """Whose token this is; None for no or an unknown token."""
        return self._users.get(token) if token else None

    def stored(self, sha256: str) -> bytes | None:
        """The bytes of an LFS object; None when the hub does not hold it (yet)."""
        return self._objects.get(sha256)

    def store(self, sha256: str, data: bytes) -> bool:
        """Keep an uploaded LFS object; False when the bytes do not have this hash."""
        if hashlib.sha256(data).hexdigest() != sha256:
            return False
        self._objects.put(sha256, data)
        return True

    def repo(self, repo_id: str, *, repo_type: RepoType = "model") -> Repository:
        """The repository of this id, renames followed. Raises KeyError."""
        found = self.find(repo_id, repo_type)
        if found is None:
            raise KeyError(f"the hub has no {repo_type} {repo_id!r}")
        return found

    def find(self, repo_id: str, repo_type: RepoType) -> Repository | None:
        with self._lock:
            moved = self._moved.get((repo_type, repo_id), repo_id)
            return self._repos.get((repo_type, moved))

    def repos(self, repo_type: RepoType) -> list[Repository]:
        with self._lock:
            return [repo for (kind, _), repo in self._repos.items() if kind == repo_type]
