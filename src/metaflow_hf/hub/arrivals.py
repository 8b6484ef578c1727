"""Which small files of a commit are stored already, while no manifest says so.

A large file is known to the store by the sha256 in the hub's tree; of a small one the tree tells git's sha1 only. So a
download writes down what it stored, for whoever goes on when it is killed; its manifest makes the note superfluous.
"""

import logging
import threading
from typing import Final

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.collection import ARRIVALS
from metaflow_hf.store.manifests import Manifest, ManifestFile, read_manifest
from metaflow_hf.store.objects import ObjectStore

logger = logging.getLogger("metaflow_hf.hub")

# Of few files each is noted at once; of many, one in so many may be forgotten by a kill, or notes would cost more.
FORGOTTEN: Final = 16


class Arrivals:
    """The note of one commit, at ``arrivals/<content>.json``. Thread-safe; of two writers the last one counts."""

    def __init__(self, store: ObjectStore, content: str) -> None:
        self._store = store
        self._key = f"{ARRIVALS}/{content}.json"
        self._files: dict[str, ManifestFile] = {}
        self._noted = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def read(self) -> list[ManifestFile]:
        """What an earlier download stored before it ended without a manifest."""
        try:
            manifest = read_manifest(self._store, self._key)
        except NotFound:
            return []
        except IntegrityError as error:
            logger.warning("%s What it names is downloaded again.", error)
            return []
        with self._lock:
            self._files = {file.path: file for file in manifest.files} | self._files
            self._noted = len(self._files)
        return list(manifest.files)

    def add(self, file: ManifestFile) -> None:
        """Notes a file whose blob is stored; durable when it returns, for the first files of a commit."""
        with self._lock:
            self._files[file.path] = file
        with self._writing:
            # Who waited may find that its file was noted with another's.
            with self._lock:
                count = len(self._files)
                if count - self._noted <= self._noted // FORGOTTEN:
                    return
                note = Manifest(files=tuple(self._files.values()), about={"type": "arrivals"})
            self._store.put(self._key, note.to_bytes())
            self._noted = count

    def clear(self) -> None:
        """Removes the note: a manifest names the files now."""
        if self._noted:
            self._store.delete(self._key)
            self._noted = 0
