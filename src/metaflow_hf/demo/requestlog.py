"""What the hub was asked, and how much it sent: the witness of tests that say "nothing was downloaded"."""

import fnmatch
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["hub", "storage"]


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One answered request.

    ``path`` is percent-decoded and without the query. ``body_bytes`` counts the bytes of the answer's body
    that were handed to the socket (0 for HEAD); ``role`` is "storage" for LFS content, which a second port
    serves; ``is_file`` is true where the body is (a part of) a repository's file.
    """

    method: str
    path: str
    query: str
    status: int
    body_bytes: int
    range: str | None
    has_token: bool
    role: Role
    is_file: bool


class RequestLog:
    """Thread-safe. An entry exists before the first byte of its answer leaves the server, so a client that
    has its answer finds it here; only where sending failed is ``body_bytes`` corrected afterwards.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, LoggedRequest] = {}
        self._next = 0

    def begin(self, entry: LoggedRequest) -> int:
        with self._lock:
            self._next += 1
            self._entries[self._next] = entry
            return self._next

    def correct(self, number: int, body_bytes: int) -> None:
        with self._lock:
            if number in self._entries:  # not cleared meanwhile
                self._entries[number] = replace(self._entries[number], body_bytes=body_bytes)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def entries(self, method: str = "*", path: str = "*") -> list[LoggedRequest]:
        """The requests so far, oldest first, whose method and path match these glob patterns."""
        with self._lock:
            return [
                e
                for e in self._entries.values()
                if fnmatch.fnmatchcase(e.method, method) and fnmatch.fnmatchcase(e.path, path)
            ]

    def __iter__(self) -> Iterator[LoggedRequest]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self.entries())

    def count(self, method: str = "*", path: str = "*") -> int:
        """How many requests match."""
        return len(self.entries(method, path))

    def file_bytes(self, path: str = "*") -> int:
        """How many bytes of repositories' files were sent, from both ports."""
        return sum(e.body_bytes for e in self.entries(path=path) if e.is_file)

    @contextmanager
    def new(self) -> Iterator["RequestLog"]:
        """A log that holds, after the block, only what was asked within it: ``with hub.log.new() as log:``."""
        view = RequestLog()
        with self._lock:
            start = self._next
        yield view
        with self._lock:
            view._entries = {n: e for n, e in self._entries.items() if n > start}
            view._next = self._next
