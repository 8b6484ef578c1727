"""How many bytes of a snapshot are here: counted from many threads, told to whoever listens.

Bytes that no network brought (stored by somebody before, left by an interrupted try, lying in huggingface_hub's own
cache) are told apart, so that a rate is one of the network.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from metaflow_hf.events import DownloadProgress, OnEvent


class Stopped(Exception):  # noqa: N818  never leaves a download
    """Another file of the snapshot failed, or the user interrupted it."""


@dataclass(frozen=True, slots=True)
class _File:
    """``here`` of ``size`` bytes needed no network."""

    here: int = 0
    size: int = 0
    tries: int = 0


class Tally:
    """The bytes of one download; ``cached_bytes`` of ``total_bytes`` are stored already."""

    def __init__(self, name: str, total_bytes: int, on_event: OnEvent, *, cached_bytes: int = 0) -> None:
        self._name = name
        self._total = total_bytes
        self._done = self._cached = cached_bytes
        self._retries = 0
        self._on_event = on_event
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def file(self, path: str) -> "FileTally":
        """What one file's transfer tells."""
        return FileTally(self, path)

    def tell(self) -> None:
        """Says how far it is."""
        with self._lock:
            self._tell()

    def stop(self) -> None:
        """Ends the transfers under way at their next bytes; what has arrived stays in the staging directory."""
        self._stopped = True

    def __str__(self) -> str:
        with self._lock:
            return f"{self._name}: {self._done} of {self._total} bytes"

    def _change(self, path: str, change: Callable[[_File], _File]) -> None:
        with self._lock:
            before = self._files.get(path, _File())
            now = self._files[path] = change(before)
            self._done += now.size - before.size
            self._cached += _without_network(now) - _without_network(before)
            self._retries += max(now.tries - 1, 0) - max(before.tries - 1, 0)
            self._tell()

    def _tell(self) -> None:
        self._on_event(
            DownloadProgress(
                time=time.time(),
                name=self._name,
                done_bytes=self._done,
                total_bytes=self._total,
                cached_bytes=self._cached,
                retries=self._retries,
            )
        )


def _without_network(file: _File) -> int:
    # A server that knows no ranges sends again what was here.
    return min(file.here, file.size)


class FileTally:
    """One file of a ``Tally``."""

    def __init__(self, tally: Tally, path: str) -> None:
        self._tally = tally
        self._path = path

    def found(self, size: int) -> None:
        """``size`` bytes of the file are on this node without any network."""
        self._change(lambda file: replace(file, here=size, size=size))

    def trying(self) -> None:
        """The hub is asked for the file, or for the rest of it; every time but the first is a retry.

        Raises ``Stopped`` once the download was stopped.
        """
        self._go_on()
        self._change(lambda file: replace(file, tries=file.tries + 1))

    def noted(self, size: int) -> None:
        """``size`` bytes of the file are here now."""
        self._change(lambda file: replace(file, size=size))

    def arrived(self, size: int) -> None:
        """``noted``; raises ``Stopped`` once the download was stopped."""
        self._go_on()
        self.noted(size)

    def _go_on(self) -> None:
        if self._tally._stopped:  # noqa: SLF001
            raise Stopped

    def _change(self, change: Callable[[_File], _File]) -> None:
        self._tally._change(self._path, change)  # noqa: SLF001
