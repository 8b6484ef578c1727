"""Work done ahead of time in a thread, so that a training step never waits for reading or tokenizing."""

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

T = TypeVar("T")

_POLL_SECONDS: Final = 0.1


class Prefetcher(Generic[T]):
    """Iterates over ``items`` in a thread, at most ``depth`` items ahead of the consumer, in the same order.

    An exception of the producer is raised at the place in the iteration where it happened. ``close`` stops the
    thread and returns what was produced but not consumed, so that its claims can be released.
    """

    def __init__(self, items: Iterable[T], *, depth: int = 1) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        self._finished = False
        self._leftover: list[T] = []
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._finished:
            raise StopIteration
        kind, value = self._ready.get()
        if kind == "item":
            return value  # type: ignore[return-value]  # the producer pairs kind and value
        self._finished = True
        if isinstance(value, BaseException):
            raise value
        raise StopIteration

    def close(self) -> list[T]:
        """Stops producing and returns the items that nobody consumed, oldest first. Idempotent."""
        self._stop.set()
        unconsumed: list[T] = []
        while self._thread.is_alive() or not self._ready.empty():
            try:
                kind, value = self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if kind == "item":
                unconsumed.append(value)  # type: ignore[arg-type]  # as above
        self._finished = True
        unconsumed += self._leftover
        self._leftover = []
        return unconsumed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._offer("item", item):
                    self._leftover.append(item)
                    return
        except BaseException as error:
            self._offer("end", error)
        else:
            self._offer("end", None)

    def _offer(self, kind: str, value: T | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put((kind, value), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
