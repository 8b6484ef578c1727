"""The right to one job, held while a heartbeat moves; no clock is ever compared with another machine's.

``<key>/<term>.json`` is created once by who takes the lease (a takeover is the next term), and
``<key>/<term>.heartbeat`` beside it holds a counter that only the holder moves. An observer holds a lease
expired when two of its own reads, at least the TTL apart on its own monotonic clock, show the same heartbeat.
A released lease says so in its heartbeat and is free at once.

A lease only saves work: what is done under it must still be safe when two do it at once (a stopped process
does not know that its lease was taken over), which is why results are committed by ``create``.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from metaflow_hf.errors import NotFound, StoreUnavailable
from metaflow_hf.store.objects import ObjectStore, encode_json, new_nonce

logger = logging.getLogger("metaflow_hf.store")

RENEWALS_PER_TTL: Final = 5
_TERM_DIGITS: Final = 10


class Lease:
    """A lease that this process holds; renewed by a thread from ``acquire`` until ``release``.

    ``lost`` is true once another holder has a higher term; look at it before an expensive step. As a context
    manager it releases at the end.
    """

    def __init__(self, store: ObjectStore, key: str, term: int, *, owner: str, ttl: float) -> None:
        self.key = key
        self.term = term
        self.owner = owner
        self._store = store
        self._ttl = ttl
        self._nonce = new_nonce()
        self._beats = 0
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def renew(self) -> None:
        """Moves the heartbeat once, and notices a higher term."""
        if _newest_term(self._store, self.key) > self.term:
            self._lost.set()
            return
        self._beats += 1
        self._write_heartbeat(released=False)

    def release(self) -> None:
        """Stops renewing and frees the lease for the next one at once. Idempotent."""
        if self._stop.is_set():
            return
        self.abandon()
        if not self.lost:
            self._write_heartbeat(released=True)

    def abandon(self) -> None:
        """Stops renewing and asks nothing of the store: the lease expires. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def start_renewing(self) -> None:
        """Starts the renewing thread; ``acquire`` does this unless told not to."""
        self._thread = threading.Thread(
            target=self._renew_until_stopped, name=f"lease {self.key}", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _write_heartbeat(self, *, released: bool) -> None:
        beat = {"nonce": self._nonce, "beats": self._beats, "released": released}
        self._store.put(_heartbeat_key(self.key, self.term), encode_json(beat))

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._ttl / RENEWALS_PER_TTL):
            try:
                self.renew()
            except StoreUnavailable as error:
                # The job goes on; at worst another process takes over and does it again.
                logger.warning("the lease %s could not be renewed: %s", self.key, error)
            if self.lost:
                logger.warning("the lease %s was taken over by another process", self.key)
                return


class Observer:
    """Decides by its own reads on its own clock whether a heartbeat has stopped moving."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def still_for(self, key: str, value: Any) -> float:
        """Seconds between the first of this observer's reads that showed ``value`` under ``key`` and now."""
        now = self._clock()
        before = self._seen.get(key)
        if before is None or before[0] != value:
            self._seen[key] = (value, now)
            return 0.0
        return now - before[1]

    def forget(self, key: str) -> None:
        """Drops what was seen under ``key``."""
        self._seen.pop(key, None)


def acquire(
    store: ObjectStore,
    key: str,
    *,
    owner: str,
    ttl: float,
    observer: Observer | None = None,
    renew: bool = True,
) -> Lease | None:
    """One try for the lease ``key``; ``None`` while another holder's heartbeat moves, or may still move.

    ``ttl`` is in seconds, ``owner`` for people only. Keep one ``observer`` for all tries of a waiter: a
    holder that died is seen after one TTL of tries. Raises ``StoreUnavailable``.
    """
    observer = observer or Observer()
    term = _newest_term(store, key)
    if term and not _is_free(store, key, term, ttl=ttl, observer=observer):
        return None
    lease = Lease(store, key, term + 1, owner=owner, ttl=ttl)
    claim = encode_json({"owner": owner, "nonce": new_nonce(), "term": lease.term, "ttl_seconds": ttl})
    if not store.create(_term_key(key, lease.term), claim).created:
        return None
    lease.renew()
    if lease.lost:
        return None
    if renew:
        lease.start_renewing()
    return lease


def wait_for(
    store: ObjectStore,
    key: str,
    *,
    owner: str,
    ttl: float,
    done: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease | None:
    """Waits until the lease is ours, or until ``done()`` says that the job is finished (then ``None``)."""
    observer = Observer(clock=clock)
    pause = min(0.05, ttl / 20)
    while True:
        if done():
            return None
        lease = acquire(store, key, owner=owner, ttl=ttl, observer=observer)
        if lease is not None:
            return lease
        sleep(pause)
        pause = min(pause * 1.5, ttl / 10)


def holder(store: ObjectStore, key: str) -> dict[str, Any] | None:
    """What the newest holder wrote about itself (``owner``, ``term``, …), or ``None`` if nobody ever held it."""
    term = _newest_term(store, key)
    return json.loads(store.get(_term_key(key, term))) if term else None


def is_held(store: ObjectStore, key: str, *, observer: Observer) -> bool:
    """Whether the newest holder's heartbeat moves, or may still move: expired by its own TTL it is not held."""
    newest = holder(store, key)
    return newest is not None and not _is_free(
        store, key, int(newest["term"]), ttl=float(newest["ttl_seconds"]), observer=observer
    )


def current_owner(store: ObjectStore, key: str) -> str | None:
    """Who holds the lease as far as one look can tell: ``None`` if it was never taken, or was released."""
    term = _newest_term(store, key)
    if not term:
        return None
    try:
        beat = json.loads(store.get(_heartbeat_key(key, term)))
    except NotFound:
        beat = {"released": False}
    if beat["released"]:
        return None
    return str(json.loads(store.get(_term_key(key, term)))["owner"])


def _is_free(store: ObjectStore, key: str, term: int, *, ttl: float, observer: Observer) -> bool:
    try:
        beat = json.loads(store.get(_heartbeat_key(key, term)))
    except NotFound:
        # Taken, but the first heartbeat is not written yet, or never will be.
        beat = None
    if beat is not None and beat["released"]:
        return True
    return observer.still_for(f"{key}/{term}", beat) >= ttl


def _newest_term(store: ObjectStore, key: str) -> int:
    terms = [name for name in store.children(key) if name.endswith(".json")]
    return int(terms[-1].removesuffix(".json")) if terms else 0


def _term_key(key: str, term: int) -> str:
    return f"{key}/{term:0{_TERM_DIGITS}d}.json"


def _heartbeat_key(key: str, term: int) -> str:
    return f"{key}/{term:0{_TERM_DIGITS}d}.heartbeat"
