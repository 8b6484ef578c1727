"""Whether a store can do what correctness rests on, asked once per store."""

import time
from collections.abc import Callable
from contextlib import suppress

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
    key = f"probe/{new_nonce()}"
    first = store.create(key, b"first")
    second = store.create(key, b"second")
    store.delete(key)
    if not first.created or second.created or second.content != b"first":
        raise UnsupportedStore(
            f"{store.uri} does not support atomic creation of objects (put-if-absent), on which exactly-once "
            "training rests: use a store that supports conditional writes (If-None-Match)."
        )
    store.create("probe/ok", b"atomic create works here")
    return clock() - began
