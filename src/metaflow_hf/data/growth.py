"""The blocks of a dataset as they become known: all at once, or one by one while it is built."""

import logging
import threading
from collections.abc import Callable
from typing import Final, Protocol

from metaflow_hf.data.build import write_dataset
from metaflow_hf.data.manifest import BlockManifest, DatasetSpec
from metaflow_hf.data.records import read_manifest
from metaflow_hf.data.sources import Source
from metaflow_hf.errors import DatasetMismatch
from metaflow_hf.store import ObjectStore

logger = logging.getLogger("metaflow_hf.data")

POLL_SECONDS: Final = 0.5
JOIN_SECONDS: Final = 10.0


class KnownBlocks(Protocol):
    """Which blocks there are."""

    @property
    def manifest(self) -> BlockManifest:
        """What is known now."""
        ...

    def wait_until(self, is_enough: Callable[[BlockManifest], bool]) -> BlockManifest:
        """The first manifest known that is complete or enough."""
        ...

    def close(self) -> None: ...


class StoredBlocks:
    """A dataset that nobody of this process builds; an incomplete one is looked at again when more is asked for."""

    def __init__(self, store: ObjectStore, manifest: BlockManifest) -> None:
        self._store = store
        self.manifest = manifest

    def wait_until(self, is_enough: Callable[[BlockManifest], bool]) -> BlockManifest:
        if not self.manifest.is_complete and not is_enough(self.manifest):
            self.manifest = read_manifest(self._store) or self.manifest
        return self.manifest

    def close(self) -> None:
        """Nothing runs."""


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
        self._manifest = read_manifest(store) or BlockManifest.of(spec, [], skipped_rows=0, is_complete=False)
        if self._manifest.spec_digest != spec.digest():
            raise DatasetMismatch(f"{store.uri} holds another dataset: choose another cache_dir.")
        self._thread = threading.Thread(target=self._build, name=f"build {spec.dataset_name}", daemon=True)
        if not self._manifest.is_complete:
            self._thread.start()

    @property
    def manifest(self) -> BlockManifest:
        with self._changed:
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
                    self._take(read_manifest(self._store))

    def close(self) -> None:
        """Stops building; what is committed stays, and the next reader goes on from there."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
        with self._changed:
            self._changed.notify_all()

    def _take(self, manifest: BlockManifest | None) -> None:
        with self._changed:
            if manifest is not None and manifest.total_blocks >= self._manifest.total_blocks:
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
