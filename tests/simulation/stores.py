"""An object store in a dict, one request at a time, that may fail before or after it did what was asked."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from metaflow_hf.errors import NotFound, StoreUnavailable
from metaflow_hf.store.objects import CreateResult, Digest, ObjectInfo

from .processes import Killed, Process

if TYPE_CHECKING:
    from .world import World

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Objects(dict[str, bytes]):
    """What is stored; what lies below each prefix is kept at hand, for most requests are looks that find nothing new."""

    def __init__(self) -> None:
        super().__init__()
        self._below: defaultdict[str, dict[str, ObjectInfo]] = defaultdict(dict)
        self._listings: dict[str, list[ObjectInfo]] = {}

    def __setitem__(self, key: str, data: bytes) -> None:
        super().__setitem__(key, data)
        info = ObjectInfo(key, len(data), EPOCH)
        for prefix in _prefixes(key):
            self._below[prefix][key] = info
            self._listings.pop(prefix, None)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        for prefix in _prefixes(key):
            del self._below[prefix][key]
            self._listings.pop(prefix, None)

    def below(self, prefix: str) -> list[ObjectInfo]:
        """The objects below ``prefix/``, in order of their keys."""
        listing = self._listings.get(prefix)
        if listing is None:
            infos = self._below[prefix]
            listing = self._listings[prefix] = [infos[key] for key in sorted(infos)]
        return listing


def _prefixes(key: str) -> list[str]:
    prefixes, end = [""], key.find("/")
    while end >= 0:
        prefixes.append(key[:end])
        end = key.find("/", end + 1)
    return prefixes


class SimStore:
    """The store as one process sees it; every request is a moment at which anything may happen to that process."""

    uri = "memory://simulation"

    def __init__(self, world: "World", process: Process | None = None) -> None:
        self._world = world
        self._objects = world.objects
        self._process = process

    def create(self, key: str, data: bytes) -> CreateResult:
        self._request()
        taken = key in self._objects
        if not taken:
            self._write(key, data)
        self._answer()
        if taken or self._take("sent twice"):
            # "sent twice": the client's own second try meets its first one.
            return self.read_winner(key, data)
        return CreateResult(created=True, content=data)

    def read_winner(self, key: str, data: bytes) -> CreateResult:
        content = self._objects[key]
        return CreateResult(created=content == data, content=content)

    def put(self, key: str, data: bytes) -> None:
        self._request()
        self._write(key, data)
        self._answer()

    def get(self, key: str) -> bytes:
        self._request()
        content = self._objects.get(key)
        if content is None:
            raise NotFound(key)
        return content

    def delete(self, key: str) -> None:
        self._request()
        self._world.wrote(key)
        if key in self._objects:
            del self._objects[key]
        self._answer()

    def children(self, prefix: str = "") -> list[str]:
        self._request()
        start = len(prefix) + 1
        return sorted({info.key[start:].partition("/")[0] for info in self._objects.below(prefix)})

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectInfo]:
        self._request()
        listing = self._objects.below(prefix)
        return iter(listing if after is None else [info for info in listing if info.key > after])

    def share(self, path: Path, key: str, digest: Digest) -> None:
        self._request()
        assert digest.size >= 0
        self._write(key, path.read_bytes())
        self._answer()

    def download(
        self, key: str, path: Path, *, expected: Digest | None = None, shared: bool = False
    ) -> Digest:
        assert shared
        path.write_bytes(self.get(key))
        assert expected is not None
        return expected

    def _write(self, key: str, data: bytes) -> None:
        self._world.wrote(key)
        self._objects[key] = data
        if key.startswith("claims/"):
            self._world.claimed(key, data)

    def _request(self) -> None:
        process = self._process
        if process is None:
            return
        if process.killed:
            raise Killed
        process.wakes_at = self._world.now
        process.pause()
        if process.fault and self._take("lost request"):
            raise StoreUnavailable("the request did not arrive")

    def _answer(self) -> None:
        if self._take("lost answer"):
            raise StoreUnavailable("the answer did not arrive")

    def _take(self, fault: str) -> bool:
        if self._process is None or self._process.fault != fault:
            return False
        self._process.fault = ""
        return True
