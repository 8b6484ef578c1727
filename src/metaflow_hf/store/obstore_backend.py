"""The object store on obstore: local disk, S3, GCS, Azure and memory behind one class.

What obstore leaves open is settled here: which errors mean what, that a lost answer to ``create`` is looked
up, that local writes are durable (obstore does not fsync), and that listings are in order everywhere.
"""

import errno
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions as obstore_errors
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store
from obstore.store import ObjectStore as Backend

from metaflow_hf.errors import IntegrityError, NotFound, StoreUnavailable, UnsupportedStore
from metaflow_hf.store import streams
from metaflow_hf.store.objects import CreateResult, Digest, ObjectInfo, ObjectStore, Unfinished, check_key

logger = logging.getLogger("metaflow_hf.store")

T = TypeVar("T")

# Parts of an upload, and how many are under way at once.
CHUNK_BYTES: Final = 8 * 1024 * 1024
UPLOADS: Final = 4
RETRY_SECONDS: Final = 60.0
# How obstore itself retries one request (5xx, 429, connection errors), within RETRY_SECONDS in all.
RETRY_CONFIG: Final[Any] = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
CLIENT_OPTIONS: Final[Any] = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=30),
}

# What a disk answers that cannot take more bytes of one file, one user or at all.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_memory_stores: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


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
        path = self._path(key)
        try:
            self._ask(key, lambda: obstore.put(self._backend, path, data, mode="create", use_multipart=False))
        except _Taken:
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
        self._ask(key, lambda: obstore.put(self._backend, path, data, use_multipart=False))
        self._make_durable(path)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        return self._ask(key, lambda: obstore.get(self._backend, path).bytes().to_bytes())

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop:
            raise ValueError(f"{key}: [{start}, {stop}) is no range of bytes.")
        if start == stop:
            self.head(key)
            return b""
        path = self._path(key)
        try:
            return self._ask(
                key, lambda: obstore.get_range(self._backend, path, start=start, end=stop).to_bytes()
            )
        except StoreUnavailable:
            # Stores refuse a range that begins at or after the end; that is an empty answer, not an outage.
            if self.head(key).size <= start:
                return b""
            raise

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        return self._info(self._ask(key, lambda: obstore.head(self._backend, path)))

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
        if self._local_root is not None:
            place = self._local_root / target
            check = partial(check_digest, expected=expected, what=str(path))
            digest = self._ask(key, lambda: streams.copy_durably(path, place, check))
            self._sync(place.parent)
            return digest
        reader = _HashingReader(path, expected)
        # An error of the reader at its end aborts the upload before anything appears.
        self._ask(
            key,
            lambda: obstore.put(
                self._backend, target, reader.chunks(), chunk_size=CHUNK_BYTES, max_concurrency=UPLOADS
            ),
        )
        return reader.digest

    def take(self, path: Path, key: str, digest: Digest) -> None:
        if not self._rename(path, self._path(key)):
            self.upload(path, key, expected=digest)
            path.unlink()

    def download(self, key: str, path: Path, *, expected: Digest | None = None) -> Digest:
        source = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as out:
                try:
                    digest = self._ask(key, lambda: self._bring(source, out.fileno(), expected))
                except StoreUnavailable as error:
                    if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_ROOM:
                        # It is this machine's disk, not the store, that is full.
                        raise error.__cause__ from error
                    raise
            check_digest(digest, expected, what=f"{self.uri}/{key}")
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
                yield from map(self._info, page)

        # Object stores list in order of keys; directories and memory in any.
        ordered = isinstance(self._backend, (S3Store, GCSStore, AzureStore))
        return pages() if ordered else iter(sorted(pages(), key=lambda info: info.key))

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
            raise self._translate(target, error) from error
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

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        try:
            return request()
        except Exception as error:
            raise self._translate(key, error) from error

    def _ask_each(self, key: str, pages: Iterator[T]) -> Iterator[T]:
        while True:
            page = self._ask(key, lambda: next(pages, None))
            if page is None:
                return
            yield page

    def _translate(self, key: str, error: Exception) -> Exception:
        """The error of ours that says what ``error`` means; anything unknown is passed through unchanged."""
        where = f"{self.uri}/{key}" if key else self.uri
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{where} does not exist.")
        if isinstance(error, (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError)):
            return _Taken(where)
        reason = str(error).partition("\n")[0].strip()
        if isinstance(error, (PermissionError, obstore_errors.UnauthenticatedError)):
            return StoreUnavailable(
                f"access to {where} was refused: {reason}. Check the credentials and that they may read, write "
                "and list there."
            )
        if isinstance(error, (obstore_errors.BaseError, OSError)) and not isinstance(error, StoreUnavailable):
            return StoreUnavailable(
                f"{where} cannot be used: {reason}. Check that the datastore can be reached, may be written and has room."
            )
        return error


class _Taken(Exception):  # noqa: N818  never leaves this module
    """The key is taken."""


class _HashingReader:
    """Chunks of a file with their digest on the side; the last chunk is held back until the digest is right."""

    def __init__(self, path: Path, expected: Digest | None) -> None:
        self._path = path
        self._expected = expected
        self.digest = Digest(sha256="", size=-1)

    def chunks(self) -> Iterator[bytes]:
        sha, size = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha.update(chunk)
                size += len(chunk)
                yield chunk
        self.digest = Digest(sha256=sha.hexdigest(), size=size)
        check_digest(self.digest, self._expected, what=str(self._path))


def check_digest(actual: Digest, expected: Digest | None, *, what: str) -> None:
    """Raises ``IntegrityError`` naming ``what`` when the bytes are not the expected ones."""
    if expected is not None and actual != expected:
        raise IntegrityError(
            f"{what} is damaged: expected {expected.size} bytes with sha256 {expected.sha256}, found {actual.size} "
            f"bytes with sha256 {actual.sha256}."
        )


def open_store(
    location: str | Path,
    *,
    backend_options: Mapping[str, Any] | None = None,
) -> ObjectStore:
    """The store at a directory or at a ``file://``, ``s3://``, ``gs://``, ``az://`` or ``memory://`` URI.

    A missing directory is created. ``memory://name`` is shared by name within the process. Cloud credentials
    and endpoints are those of Metaflow's configuration unless ``backend_options`` (obstore's own names) say
    otherwise. Raises ``UnsupportedStore`` for another scheme and ``StoreUnavailable`` for a directory that
    cannot be made.
    """
    text = str(location)
    parts = urlsplit(text) if "://" in text else None
    if parts is None or parts.scheme == "file":
        return _open_directory(Path(unquote(parts.path)) if parts else Path(text))
    prefix = parts.path.strip("/")
    if parts.scheme == "memory":
        with _memory_lock:
            memory = _memory_stores.setdefault(parts.netloc, MemoryStore())
        return ObstoreBackend(memory, uri=f"memory://{parts.netloc}", prefix=prefix)
    if parts.scheme not in ("s3", "gs", "az") or not parts.netloc:
        raise UnsupportedStore(
            f"{text!r} is not a store that can be used: give a directory, or s3://bucket/…, gs://bucket/… or "
            "az://container/…."
        )
    if backend_options is None:
        from metaflow_hf.store import datastore

        backend_options = datastore.backend_options(parts.scheme)
    return _open_cloud(parts.scheme, parts.netloc, prefix, dict(backend_options))


def _open_directory(directory: Path) -> ObstoreBackend:
    root = directory.expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        backend = LocalStore(root)
    except OSError as error:
        raise StoreUnavailable(
            f"the directory {root} cannot be used as a datastore: {error.strerror or error}. Choose another place "
            "(METAFLOW_DATASTORE_SYSROOT_LOCAL) or make it writable."
        ) from error
    return ObstoreBackend(backend, uri=root.as_uri(), local_root=root)


def _open_cloud(scheme: str, bucket: str, prefix: str, options: dict[str, Any]) -> ObstoreBackend:
    client_options = {**CLIENT_OPTIONS, **options.pop("client_options", {})}
    shared: Any = {"retry_config": RETRY_CONFIG, "client_options": client_options, **options}
    backend: Backend
    if scheme == "s3":
        backend = S3Store(bucket, **shared)
    elif scheme == "gs":
        backend = GCSStore(bucket, **shared)
    else:
        backend = AzureStore(bucket, **shared)
    return ObstoreBackend(backend, uri=f"{scheme}://{bucket}", prefix=prefix)
