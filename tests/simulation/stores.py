"""An object store in a dict, one request at a time, that may fail before or after it did what was asked."""

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


class SimStore:
    """The store as one process sees it; every request is a moment at which anything may happen to that process."""

    uri = "memory://simulation"

    def __init__(self, world: "World", process: Process | None = None) -> None:
        self._world = world
        self._process = process

    def create(self, key: str, data: bytes) -> CreateResult:
        self._request()
        taken = key in self._world.objects
        if not taken:
            self._write(key, data)
            if key.startswith("claims/"):
                self._world.claimed(key, data)
        self._answer()
        if taken or self._take("sent twice"):
            # "sent twice": the client's own second try meets its first one.
            return self.read_winner(key, data)
        return CreateResult(created=True, content=data)

    def read_winner(self, key: str, data: bytes) -> CreateResult:
        content = self._world.objects[key]
        return CreateResult(created=content == data, content=content)

    def put(self, key: str, data: bytes) -> None:
        self._request()
        self._write(key, data)
        self._answer()

    def get(self, key: str) -> bytes:
        self._request()
        if key not in self._world.objects:
            raise NotFound(key)
        return self._world.objects[key]

    def delete(self, key: str) -> None:
        self._request()
        self._world.writes += 1
        self._world.objects.pop(key, None)
        self._answer()

    def children(self, prefix: str = "") -> list[str]:
        self._request()
        start = f"{prefix}/"
        return sorted(
            {key[len(start) :].split("/")[0] for key in self._world.objects if key.startswith(start)}
        )

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectInfo]:
        self._request()
        start, objects = f"{prefix}/", self._world.objects
        keys = sorted(key for key in objects if key.startswith(start) and (after is None or key > after))
        return iter([ObjectInfo(key, len(objects[key]), EPOCH) for key in keys])

    def upload(self, path: Path, key: str, *, expected: Digest | None = None) -> Digest:
        self._request()
        assert expected is not None
        self._write(key, path.read_bytes())
        self._answer()
        return expected

    def download(self, key: str, path: Path, *, expected: Digest | None = None) -> Digest:
        path.write_bytes(self.get(key))
        assert expected is not None
        return expected

    def _write(self, key: str, data: bytes) -> None:
        self._world.writes += 1
        self._world.objects[key] = data

    def _request(self) -> None:
        if self._process is None:
            return
        if self._process.killed:
            raise Killed
        self._world.pause(self._process)
        if self._take("lost request"):
            raise StoreUnavailable("the request did not arrive")

    def _answer(self) -> None:
        if self._take("lost answer"):
            raise StoreUnavailable("the answer did not arrive")

    def _take(self, fault: str) -> bool:
        if self._process is None or self._process.fault != fault:
            return False
        self._process.fault = ""
        return True
