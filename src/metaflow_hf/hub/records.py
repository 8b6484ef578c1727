"""What a revision resolved to: once per run (pins), and last (refs), so that work goes on without a hub.

Both are numbered, create-only objects of which the newest counts.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo
from metaflow_hf.store.objects import ObjectStore, encode_json, new_nonce, quote_part

_DIGITS: Final = 8
# A ref is written again when it is older than this, so that its age is true to the hour.
REFRESH: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class RunContext:
    """The task on whose behalf something is cached. ``namespace`` is Metaflow's; ``""`` is the global one."""

    flow: str
    run: str
    step: str
    task: str
    namespace: str = ""
    origin_run: str | None = None

    @property
    def pathspec(self) -> str:
        return f"{self.flow}/{self.run}/{self.step}/{self.task}"


@dataclass(frozen=True, slots=True)
class Resolved:
    """A commit, whether only some may read the repository (private or gated), and when the hub said so."""

    commit_hash: str
    restricted: bool
    resolved_on: datetime

    def to_json(self) -> dict[str, Any]:
        return {
            "commit_hash": self.commit_hash,
            "restricted": self.restricted,
            "resolved_on": self.resolved_on.isoformat(timespec="seconds"),
            "nonce": new_nonce(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Resolved":
        return cls(value["commit_hash"], value["restricted"], datetime.fromisoformat(value["resolved_on"]))


class Pins:
    """The commit that each revision means within one run, whichever task asked first."""

    def __init__(self, store: ObjectStore, run: RunContext) -> None:
        self._store = store
        self._run = run

    def get(self, endpoint: Endpoint, repo: Repo, revision: str) -> Resolved | None:
        """The pin of this run; a resumed run takes over that of its origin the first time it is asked for.

        Not that of a private or gated repository, which someone else may have been allowed to read: see ``inherited``.
        """
        newest = _newest(self._store, self._prefix(self._run.run, endpoint, repo, revision))
        if newest is not None:
            return newest[1]
        origin = self.inherited(endpoint, repo, revision)
        return None if origin is None or origin.restricted else self.add(endpoint, repo, revision, origin)

    def inherited(self, endpoint: Endpoint, repo: Repo, revision: str) -> Resolved | None:
        """The pin of the run that this one resumes, whoever started it."""
        if self._run.origin_run is None:
            return None
        origin = _newest(self._store, self._prefix(self._run.origin_run, endpoint, repo, revision))
        return origin and origin[1]

    def add(
        self, endpoint: Endpoint, repo: Repo, revision: str, resolved: Resolved, *, renew: bool = False
    ) -> Resolved:
        """Pins a revision; returns the pin that holds, which is another task's if that came first.

        ``renew`` adds a newer pin, for those who asked for a fresh download.
        """
        prefix = self._prefix(self._run.run, endpoint, repo, revision)
        newest = _newest(self._store, prefix) if renew else None
        return _add(self._store, prefix, newest[0] if newest else 0, resolved)

    def _prefix(self, run: str, endpoint: Endpoint, repo: Repo, revision: str) -> str:
        return f"pins/{quote_part(self._run.flow)}/{quote_part(run)}/{_name(endpoint, repo, revision)}"


class Refs:
    """The commit that each revision last meant, for whoever cannot ask the hub."""

    def __init__(
        self, store: ObjectStore, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._store = store
        self._now = now

    def get(self, endpoint: Endpoint, repo: Repo, revision: str) -> Resolved | None:
        newest = _newest(self._store, self._prefix(endpoint, repo, revision))
        return newest and newest[1]

    def find(self, endpoint: Endpoint, repo: Repo, commit_hash: str) -> Resolved | None:
        """The newest record of any revision that named this commit."""
        prefix = f"refs/{endpoint.key}/{repo.key}"
        newest = [_newest(self._store, f"{prefix}/{name}") for name in self._store.children(prefix)]
        found = [item[1] for item in newest if item is not None and item[1].commit_hash == commit_hash]
        return max(found, key=lambda resolved: resolved.resolved_on, default=None)

    def age(self, resolved: Resolved) -> timedelta:
        """How long ago the hub said so."""
        return max(self._now() - resolved.resolved_on, timedelta(0))

    def add(self, endpoint: Endpoint, repo: Repo, revision: str, resolved: Resolved) -> None:
        """Records a resolution, unless the newest record says the same and is fresh."""
        prefix = self._prefix(endpoint, repo, revision)
        newest = _newest(self._store, prefix)
        if newest is None:
            _add(self._store, prefix, 0, resolved)
            return
        number, last = newest
        is_same = (last.commit_hash, last.restricted) == (resolved.commit_hash, resolved.restricted)
        if is_same and self.age(last) < REFRESH:
            return
        _add(self._store, prefix, number, resolved)
        self._store.delete(_key(prefix, number))

    def _prefix(self, endpoint: Endpoint, repo: Repo, revision: str) -> str:
        return f"refs/{_name(endpoint, repo, revision)}"


def _name(endpoint: Endpoint, repo: Repo, revision: str) -> str:
    return f"{endpoint.key}/{repo.key}/{quote_part(revision)}"


def _key(prefix: str, number: int) -> str:
    return f"{prefix}/{number:0{_DIGITS}d}.json"


def _newest(store: ObjectStore, prefix: str) -> tuple[int, Resolved] | None:
    while names := [name for name in store.children(prefix) if name.endswith(".json")]:
        key = f"{prefix}/{names[-1]}"
        try:
            data = store.get(key)
        except NotFound:  # replaced by a newer one since it was listed
            continue
        try:
            return int(names[-1].removesuffix(".json")), Resolved.from_json(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"the record {store.uri}/{key} is damaged ({type(error).__name__}): delete it, and the hub is asked "
                "again."
            ) from error
    return None


def _add(store: ObjectStore, prefix: str, after: int, resolved: Resolved) -> Resolved:
    outcome = store.create(_key(prefix, after + 1), encode_json(resolved.to_json()))
    return Resolved.from_json(outcome.json())
