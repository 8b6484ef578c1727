"""Whether a store can do what correctness rests on, asked once per store."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from metaflow_hf.errors import NotFound, UnsupportedStore
from metaflow_hf.store.objects import ObjectStore, new_nonce


def probe(store: ObjectStore, *, clock: Callable[[], float] = time.monotonic) -> float:
    """Shows that the store can be written and creates atomically; returns the seconds that took.

    A mark is left at ``probe/ok`` so that a store is tried once, not by every task. Raises
    ``UnsupportedStore`` where a second ``create`` of one key succeeds, ``StoreUnavailable`` where nothing can
    be written.
    """
    began = clock()
    with suppress(NotFound):
        store.get("probe/ok")
        return clock() - began
    try_out(store)
    store.create("probe/ok", b"atomic create works here")
    return clock() - began


def try_out(store: ObjectStore) -> datetime:
    """Writes, reads, lists, creates and deletes one small object; returns the store's own time.

    Raises ``UnsupportedStore`` where a second ``create`` of one key succeeds, ``StoreUnavailable`` where the store
    refuses something.
    """
    key = f"probe/{new_nonce()}"
    first = store.create(key, b"first")
    second = store.create(key, b"second")
    content, listed = store.get(key), [info for info in store.list("probe") if info.key == key]
    store.delete(key)
    if not first.created or second.created or second.content != b"first":
        raise UnsupportedStore(
            f"{store.uri} does not support atomic creation of objects (put-if-absent), on which exactly-once "
            "training rests: use a store that supports conditional writes (If-None-Match)."
        )
    if content != b"first" or not listed:
        raise UnsupportedStore(f"{store.uri} does not show at once what was written to it.")
    return listed[0].last_modified
