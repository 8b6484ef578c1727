"""The blocks of a dataset as they become known: all at once, or one by one while it is built.

A dataset grows while somebody writes it: a thread of this process, or another process under the writer's lease.
Whoever asks for more than is committed waits for as long as somebody writes, and no longer: an incomplete
dataset that nobody writes is neither the end of the data nor worth waiting for.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from metaflow_hf.data.build import write_dataset
from metaflow_hf.data.manifest import BlockManifest, DatasetSpec
from metaflow_hf.data.records import commits_after, read_completion, read_manifest
from metaflow_hf.data.sources import Source
from metaflow_hf.data.writer import LEASE_KEY
from metaflow_hf.errors import DatasetMismatch, UserError
from metaflow_hf.store import ObjectStore
from metaflow_hf.store.leases import Observer, is_held

logger = logging.getLogger("metaflow_hf.data")

POLL_SECONDS: Final = 0.5
JOIN_SECONDS: Final = 10.0


class KnownBlocks(Protocol):
    """Which blocks there are."""

    @property
    def manifest(self) -> BlockManifest:
        """What is known now, at most ``POLL_SECONDS`` old."""
        ...

    def wait_until(self, is_enough: Callable[[BlockManifest], bool]) -> BlockManifest:
        """The first manifest that is complete or enough; what there is once nobody writes more, or after ``close``.

        Raises the error of a builder of this process.
        """
        ...

    def check_growing(self) -> None:
        """Raises ``UserError``, or the builder's error, if more blocks are missing and nobody writes them."""
        ...

    def close(self) -> None: ...


class StoredBlocks:
    """A dataset that this process only reads; while it is incomplete, it is looked at again and again.

    ``manifest`` is what the store holds at first.
    """

    def __init__(
        self, store: ObjectStore, manifest: BlockManifest, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._clock = clock
        self._looked_at = clock()
        self._observer = Observer(clock=clock)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def manifest(self) -> BlockManifest:
        with self._lock:
            if not self._manifest.is_complete and self._clock() - self._looked_at >= POLL_SECONDS:
                self._look()
            return self._manifest

    def wait_until(self, is_enough: Callable[[BlockManifest], bool]) -> BlockManifest:
        while True:
            with self._lock:
                known = self._manifest
                if known.is_complete or is_enough(known):
                    return known
                # Whether somebody writes is asked first: what was written last is then seen in any case.
                is_written = self._is_written()
                newest = self._look()
            if newest is known and (not is_written or self._stop.wait(POLL_SECONDS)):
                return newest

    def check_growing(self) -> None:
        with self._lock:
            is_written = self._is_written()
            newest = self._look()
        if not newest.is_complete and not is_written:
            raise not_complete(self._store, newest)

    def close(self) -> None:
        self._stop.set()

    def _is_written(self) -> bool:
        return is_held(self._store, LEASE_KEY, observer=self._observer)

    def _look(self) -> BlockManifest:
        self._looked_at = self._clock()
        if not self._manifest.is_complete:
            self._manifest = newer_manifest(self._store, self._manifest)
        return self._manifest


class GrowingBlocks:
    """A dataset that is built in a thread while it is read; if another process builds it, this one follows.

    An error of the builder is raised to whoever waits for more than there is.
    """

    def __init__(self, source: Source, spec: DatasetSpec, store: ObjectStore) -> None:
        self._source = source
        self._spec = spec
        self._store = store
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._looked_at = time.monotonic()
        self._manifest = read_manifest(store) or BlockManifest.of(spec, [], skipped_rows=0, is_complete=False)
        if self._manifest.spec_digest != spec.digest():
            raise DatasetMismatch(f"{store.uri} holds another dataset: choose another cache_dir.")
        self._thread = threading.Thread(target=self._build, name=f"build {spec.dataset_name}", daemon=True)
        if not self._manifest.is_complete:
            self._thread.start()

    @property
    def manifest(self) -> BlockManifest:
        with self._changed:
            if not self._manifest.is_complete and time.monotonic() - self._looked_at >= POLL_SECONDS:
                self._look()
            return self._manifest

    def wait_until(self, is_enough: Callable[[BlockManifest], bool]) -> BlockManifest:
        with self._changed:
            while True:
                if self._manifest.is_complete or is_enough(self._manifest):
                    return self._manifest
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    return self._manifest
                if not self._changed.wait(POLL_SECONDS):
                    # Another process may be the one that builds.
                    self._look()

    def check_growing(self) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._stop.is_set() and not self._manifest.is_complete:
                raise not_complete(self._store, self._manifest)

    def close(self) -> None:
        """Stops building; what is committed stays, and the next reader goes on from there."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
        with self._changed:
            self._changed.notify_all()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        self._take(newer_manifest(self._store, self._manifest))

    def _take(self, manifest: BlockManifest) -> None:
        with self._changed:
            self._looked_at = time.monotonic()
            is_newer = manifest.total_blocks > self._manifest.total_blocks
            if is_newer or (manifest.is_complete and not self._manifest.is_complete):
                self._manifest = manifest
                self._changed.notify_all()

    def _build(self) -> None:
        try:
            self._take(
                write_dataset(
                    self._source, self._spec, self._store, progress=self._take, stop=self._stop.is_set
                )
            )
        except BaseException as error:
            logger.warning("building %s ended: %s", self._spec.dataset_name, error)
            with self._changed:
                self._error = error
                self._changed.notify_all()


def first_manifest(store: ObjectStore) -> BlockManifest | None:
    """What the store holds of a dataset; of one that was only just begun, once its first block is committed."""
    observer = Observer()
    while True:
        is_written = is_held(store, LEASE_KEY, observer=observer)
        manifest = read_manifest(store)
        if manifest is not None or not is_written:
            return manifest
        time.sleep(POLL_SECONDS)


def newer_manifest(store: ObjectStore, known: BlockManifest) -> BlockManifest:
    """``known`` with the blocks that were committed since; what it costs does not grow with the dataset."""
    if read_completion(store) is not None:
        return read_manifest(store) or known
    commits = list(commits_after(store, known.total_blocks))
    if not commits:
        return known
    blocks = [*known.blocks, *(commit.block for commit in commits)]
    last = commits[-1]
    return BlockManifest.of(last.spec, blocks, skipped_rows=last.skipped_rows, is_complete=False)


def not_complete(store: ObjectStore, manifest: BlockManifest) -> UserError:
    """The error for whoever needs the end of a dataset that nobody brings to an end."""
    return UserError(
        f"{store.uri} is not complete: {manifest.total_blocks} blocks are committed, and nobody is writing the rest. "
        "Build it again with the same arguments; that goes on from the last block."
    )
