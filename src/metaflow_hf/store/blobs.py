"""Files by content: each is stored once, under its sha256, whoever saves it and however often.

A blob that ``gc`` has condemned is never used again, because a deletion may be under way: a writer then takes
the next generation of the key (``<sha256>.1``). Manifests name the full key.
"""

from pathlib import Path
from typing import Final

from metaflow_hf.errors import IntegrityError, NotFound
from metaflow_hf.store.objects import Digest, ObjectStore
from metaflow_hf.store.streams import file_chunks, hash_chunks

CONDEMNED: Final = "gc/condemned"


def blob_key(sha256: str, generation: int = 0) -> str:
    """The key of a blob; ``generation`` counts how often a key of these bytes was condemned."""
    key = f"blobs/{sha256[:2]}/{sha256}"
    return f"{key}.{generation}" if generation else key


def content_of(key: str) -> str:
    """The sha256 that a blob's key names, whatever its generation."""
    return key.rpartition("/")[2].partition(".")[0]


def condemned_blobs(store: ObjectStore) -> frozenset[str]:
    """The blob keys that a collection may be deleting; nobody may rely on them any more."""
    return frozenset(info.key.removeprefix(f"{CONDEMNED}/") for info in store.list(CONDEMNED))


def hash_file(path: Path) -> Digest:
    """Size and sha256 of a file, read once."""
    return hash_chunks(file_chunks(path))


class Blobs:
    """The blobs of one store as one writer sees them: it looks once at what is condemned, when it begins."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._condemned = condemned_blobs(store)

    def find(self, digest: Digest) -> str | None:
        """The key under which these bytes are stored in full length, or ``None``."""
        key = self._usable_key(digest.sha256)
        try:
            return key if self._store.head(key).size == digest.size else None
        except NotFound:
            return None

    def put(self, path: Path, digest: Digest) -> str:
        """Stores a file under its digest unless it is there already; returns the key. Durable when it returns.

        The bytes are hashed on their way: raises ``IntegrityError``, and stores nothing, when the file is not
        what ``digest`` says.
        """
        return self.find(digest) or self.replace(path, digest)

    def replace(self, path: Path, digest: Digest) -> str:
        """Stores a file under its digest whatever lies there."""
        key = self._usable_key(digest.sha256)
        self._store.upload(path, key, expected=digest)
        return key

    def heal(self, path: Path, key: str, digest: Digest) -> str:
        """Stores a damaged or lost blob anew: under its key, or the next generation where that is condemned."""
        if key in self._condemned:
            return self.replace(path, digest)
        self._store.upload(path, key, expected=digest)
        return key

    def _usable_key(self, sha256: str) -> str:
        generation = 0
        while blob_key(sha256, generation) in self._condemned:
            generation += 1
        return blob_key(sha256, generation)


def put_blob(store: ObjectStore, path: Path, digest: Digest) -> str:
    """``Blobs(store).put(path, digest)``, for a single file."""
    return Blobs(store).put(path, digest)


def download_blob(store: ObjectStore, key: str, path: Path, digest: Digest, *, verify: bool) -> Digest:
    """Brings a blob's bytes into a file; from another generation of the key where this one is lost or damaged.

    With ``verify`` sha256 is compared, the size always. Raises ``NotFound`` and ``IntegrityError`` for this key.
    """

    def bring(place: str) -> Digest:
        found = store.download(place, path, expected=digest if verify else None)
        if found.size != digest.size:
            raise IntegrityError(
                f"{store.uri}/{place} has {found.size} bytes instead of {digest.size}: it was damaged."
            )
        return found

    try:
        return bring(key)
    except (NotFound, IntegrityError):
        other = Blobs(store).find(digest)
        if other is None or other == key:
            raise
        return bring(other)


def has_blob(store: ObjectStore, digest: Digest) -> bool:
    """Whether these bytes are stored in full length; to store several files, use ``Blobs``."""
    return Blobs(store).find(digest) is not None
