"""The object store on obstore: local disk, S3, GCS, Azure and memory behind one class.

What obstore leaves open is settled here: which errors mean what, that a lost answer to ``create`` is looked
up, that local writes are durable (obstore does not fsync), and that listings are in order everywhere.
"""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store
from obstore.store import ObjectStore as Backend

from metaflow_hf.errors import NotFound, StoreUnavailable
from metaflow_hf.store import streams
from metaflow_hf.store.objects import CreateResult, Digest, ObjectInfo, Unfinished, check_key
from metaflow_hf.store.obstore_answers import AccessDenied, Taken, meaning_of

logger = logging.getLogger("metaflow_hf.store")

T = TypeVar("T")

# Parts of an upload, and how many are under way at once.
CHUNK_BYTES: Final = 8 * 1024 * 1024
UPLOADS: Final = 4

# Seconds between the tries to create what others seem to be creating.
_CONFLICT_PAUSES: Final = (0.05, 0.1, 0.2, 0.4, 0.8, *(1.0,) * 10)

# What a disk answers that cannot take more bytes of one file, one user or at all.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class ObstoreBackend:
    """``ObjectStore`` on an obstore backend; see the protocol for the guarantees of each method."""

    def __init__(
        self, backend: Backend, *, uri: str, prefix: str = "", local_root: Path | None = None
    ) -> None:
        self._backend = backend
        self._uri = uri.rstrip("/")
        self._prefix = prefix
        self._local_root = local_root

    def __repr__(self) -> str:
        return f"ObstoreBackend({self.uri!r})"

    @property
    def uri(self) -> str:
        return f"{self._uri}/{self._prefix}" if self._prefix else self._uri

    def create(self, key: str, data: bytes) -> CreateResult:
        for pause in _CONFLICT_PAUSES:
            # S3 answers "conflict" while another create is under way, which may still fail: then nothing is there.
            with suppress(NotFound):
                return self._create(key, data)
            time.sleep(pause)
        raise StoreUnavailable(
            f"{self.uri}/{key} cannot be created: the store says again and again that others are creating it, and shows "
            "nothing. Try again later."
        )

    def _create(self, key: str, data: bytes) -> CreateResult:
        path = self._path(key)
        try:
            self._write(
                key, lambda: obstore.put(self._backend, path, data, mode="create", use_multipart=False)
            )
        except Taken:
            return self._read_winner(key, data)
        except StoreUnavailable:
            # The request may have been carried out although its answer was lost.
            with suppress(StoreUnavailable, NotFound):
                return self._read_winner(key, data)
            raise
        self._make_durable(path)
        return CreateResult(created=True, content=data)

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        self._write(key, lambda: obstore.put(self._backend, path, data, use_multipart=False))
        self._make_durable(path)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        return self._read(key, lambda: obstore.get(self._backend, path).bytes().to_bytes())

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop:
            raise ValueError(f"{key}: [{start}, {stop}) is no range of bytes.")
        if start == stop:
            self.head(key)
            return b""
        path = self._path(key)
        try:
            return self._read(
                key, lambda: obstore.get_range(self._backend, path, start=start, end=stop).to_bytes()
            )
        except StoreUnavailable:
            # Stores refuse a range that begins at or after the end; that is an empty answer, not an outage.
            if self.head(key).size <= start:
                return b""
            raise

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        return self._info(self._read(key, lambda: obstore.head(self._backend, path)))

    def children(self, prefix: str = "") -> list[str]:
        path = self._path(prefix) if prefix else self._prefix
        listing = self._ask(prefix, lambda: obstore.list_with_delimiter(self._backend, path or None))
        found = [*listing["common_prefixes"], *(item["path"] for item in listing["objects"])]
        return sorted({str(item).rstrip("/").rpartition("/")[2] for item in found})

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(NotFound):
            self._ask(key, lambda: obstore.delete(self._backend, path))

    def upload(self, path: Path, key: str, *, expected: Digest | None = None) -> Digest:
        target = self._path(key)
        if not path.exists():
            # Otherwise the store would seem to be what is missing.
            raise NotFound(f"{path}, which is to be stored as {self._where(key)}, does not exist.")
        if self._local_root is not None:
            place = self._local_root / target
            check = partial(streams.check_digest, expected=expected, what=str(path))
            digest = self._ask(key, lambda: streams.copy_durably(path, place, check))
            self._sync(place.parent)
            return digest
        reader = streams.HashingReader(path, expected)
        # An error of the reader at its end aborts the upload before anything appears.
        self._write(
            key,
            lambda: obstore.put(
                self._backend,
                target,
                reader.chunks(CHUNK_BYTES),
                chunk_size=CHUNK_BYTES,
                max_concurrency=UPLOADS,
            ),
        )
        return reader.digest

    def take(self, path: Path, key: str, digest: Digest) -> None:
        if not self._rename(path, self._path(key)):
            self.upload(path, key, expected=digest)
            path.unlink()

    def share(self, path: Path, key: str, digest: Digest) -> None:
        place = None if self._local_root is None else self._local_root / self._path(key)
        if place is None or not self._ask(key, lambda: streams.link_durably(path, place)):
            self.upload(path, key, expected=digest)
        else:
            self._sync(place.parent)

    def download(
        self, key: str, path: Path, *, expected: Digest | None = None, shared: bool = False
    ) -> Digest:
        source = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared and self._local_root is not None:
            place = self._local_root / source
            found = self._read(key, lambda: streams.link_hashed(place, path, self._check(expected, key)))
            if found is not None:
                return found
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as out:
                try:
                    digest = self._read(key, lambda: self._bring(source, out.fileno(), expected))
                except StoreUnavailable as error:
                    if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_ROOM:
                        # It is this machine's disk, not the store, that is full.
                        raise error.__cause__ from error
                    raise
            self._check(expected, key)(digest)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return digest

    def unfinished(self) -> Iterator[Unfinished]:
        if self._local_root is not None:
            yield from streams.unfinished_files(self._local_root / self._prefix)

    def child(self, prefix: str) -> "ObstoreBackend":
        return ObstoreBackend(
            self._backend, uri=self._uri, prefix=self._path(prefix), local_root=self._local_root
        )

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectInfo]:
        path = self._path(prefix) if prefix else self._prefix
        offset = None if after is None else self._path(after)

        def pages() -> Iterator[ObjectInfo]:
            for page in self._ask_each(prefix, obstore.list(self._backend, path or None, offset=offset)):
                # Not every server of Azure's protocol begins where it is asked to.
                yield from (info for info in map(self._info, page) if after is None or info.key > after)

        # Object stores list in order of keys; directories and memory in any.
        ordered = isinstance(self._backend, (S3Store, GCSStore, AzureStore))
        return pages() if ordered else iter(sorted(pages(), key=lambda info: info.key))

    def _check(self, expected: Digest | None, key: str) -> Callable[[Digest], None]:
        return partial(streams.check_digest, expected=expected, what=f"{self.uri}/{key}")

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    def _info(self, meta: Any) -> ObjectInfo:
        path = str(meta["path"])
        key = path[len(self._prefix) + 1 :] if self._prefix else path
        return ObjectInfo(key=key, size=int(meta["size"]), last_modified=meta["last_modified"])

    def _rename(self, path: Path, target: str) -> bool:
        """Moves a file below this store's directory, durably; ``False`` where it lies on another file system."""
        if self._local_root is None:
            return False
        place = self._local_root / target
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(place)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            raise meaning_of(error, self._where(target)) from error
        self._make_durable(target)
        return True

    def _read_winner(self, key: str, data: bytes) -> CreateResult:
        content = self.get(key)
        return CreateResult(created=content == data, content=content)

    def _bring(self, source: str, descriptor: int, expected: Digest | None) -> Digest:
        # A retry of the whole request begins the file anew.
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        if self._local_root is not None:
            return streams.copy_hashed(self._local_root / source, descriptor)
        if expected is not None and expected.size <= streams.RANGE_BYTES:
            whole = memoryview(obstore.get(self._backend, source).bytes())
            return streams.write_hashed([whole], descriptor)

        def read(start: int, stop: int) -> memoryview:
            return memoryview(obstore.get_range(self._backend, source, start=start, end=stop))

        # Its own size, not the expected one: what is too long is damaged too.
        size = int(obstore.head(self._backend, source)["size"])
        return streams.write_hashed(streams.read_ahead(read, size), descriptor)

    def _make_durable(self, path: str) -> None:
        if self._local_root is not None:
            target = self._local_root / path
            self._sync(target, target.parent)

    def _sync(self, *places: Path) -> None:
        try:
            for place in places:
                descriptor = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except FileNotFoundError as error:
            # Deleted by another process in the meantime: then nobody needs it to last.
            logger.debug("%s went away while it was written", error.filename)

    def _read(self, key: str, request: Callable[[], T]) -> T:
        """Asks for an object. Who may not list a whole bucket is told 403, not 404, of one that is missing."""
        try:
            return self._ask(key, request)
        except AccessDenied as error:
            if self._is_listed(key):
                raise
            raise NotFound(f"{self.uri}/{key} does not exist.") from error

    def _write(self, key: str, request: Callable[[], T]) -> T:
        """Asks to store an object. What does not exist then is the bucket."""
        try:
            return self._ask(key, request)
        except NotFound as error:
            raise StoreUnavailable(
                f"{self.uri}/{key} cannot be written: there is no {self._uri}. Create this bucket (container, directory) "
                "or check its name."
            ) from error

    def _is_listed(self, key: str) -> bool:
        """Whether a listing has the key; raises ``AccessDenied`` where that is refused too."""
        path = self._path(key)
        # Listings are of whole directories, and begin after a name: the longest one that is before the key.
        pages = obstore.list(self._backend, path.rpartition("/")[0] or None, offset=path[:-1])
        for page in self._ask_each(key, pages):
            for meta in page:
                if meta["path"] >= path:
                    return bool(meta["path"] == path)
        return False

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        try:
            return request()
        except Exception as error:
            raise meaning_of(error, self._where(key)) from error

    def _ask_each(self, key: str, pages: Iterator[T]) -> Iterator[T]:
        while True:
            page = self._ask(key, lambda: next(pages, None))
            if page is None:
                return
            yield page
