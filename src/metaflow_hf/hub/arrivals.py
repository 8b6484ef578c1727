"""Which bytes the small files of a commit have, while no manifest says so.

A large file is known to the store by the sha256 in the hub's tree; of a small one the tree tells git's sha1 only. So a
download writes down the sha256 of each that arrived, before its blob, for whoever goes on when it is killed; its
manifest makes the note superfluous. A note says nothing of whether the blob is there: who reads it looks.
"""

import logging
import threading
from typing import Final

from metaflow_hf.errors import IntegrityError
from metaflow_hf.store.blobs import blob_key
from metaflow_hf.store.collection import ARRIVALS
from metaflow_hf.store.manifests import Manifest, ManifestFile, read_manifests
from metaflow_hf.store.objects import Digest, ObjectStore, new_nonce

logger = logging.getLogger("metaflow_hf.hub")

# A note is written anew for each file, so it must stay small: the next file begins another one.
FILES_OF_A_NOTE: Final = 64


class Arrivals:
    """The notes of one commit, at ``arrivals/<content>/<nonce>.json``. Thread-safe."""

    def __init__(self, store: ObjectStore, content: str) -> None:
        self._store = store
        self._prefix = f"{ARRIVALS}/{content}"
        self._key = self._new_key()
        # Notes, each with the paths that it names.
        self._notes: dict[str, set[str]] = {}
        self._files: dict[str, ManifestFile] = {}
        self._noted: set[str] = set()
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def read(self) -> list[ManifestFile]:
        """What earlier downloads noted that ended without a manifest."""
        files: list[ManifestFile] = []
        try:
            for info, note in read_manifests(self._store, self._prefix):
                files += note.files
                self._notes[info.key] = {file.path for file in note.files}
        except IntegrityError as error:
            logger.warning("%s What it names is downloaded again.", error)
        return files

    def add(self, path: str, oid: str, digest: Digest) -> None:
        """Notes a file whose bytes were verified; durable when it returns."""
        file = ManifestFile(path, digest.size, digest.sha256, blob_key(digest.sha256), oid)
        with self._lock:
            self._files[path] = file
        with self._writing:
            # Who waited may find that its file was noted with another's.
            with self._lock:
                if path in self._noted:
                    return
                files = dict(self._files)
                note = Manifest(files=tuple(files.values()), about={"type": "arrivals"})
            self._store.put(self._key, note.to_bytes())
            self._notes[self._key] = set(files)
            self._noted |= files.keys()
            if len(files) >= FILES_OF_A_NOTE:
                with self._lock:
                    self._files = {name: file for name, file in self._files.items() if name not in files}
                self._key = self._new_key()

    def clear(self, manifest: Manifest) -> None:
        """Removes the notes, those read too, of which a manifest names all files now."""
        named = {file.path for file in manifest.files}
        for key in [key for key, paths in self._notes.items() if paths <= named]:
            self._store.delete(key)
            del self._notes[key]

    def _new_key(self) -> str:
        return f"{self._prefix}/{new_nonce()}.json"
