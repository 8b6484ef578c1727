"""From a location to a store: a directory, or a URI of the local disk, S3, GCS, Azure or memory."""

import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store
from obstore.store import ObjectStore as Backend

from metaflow_hf.errors import StoreUnavailable, UnsupportedStore
from metaflow_hf.store.objects import ObjectStore
from metaflow_hf.store.obstore_backend import ObstoreBackend

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

_memory_stores: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


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
        # Of one object a time; and not every store has the other way.
        backend = S3Store(bucket, **{"disable_bulk_delete": True, **shared})
    elif scheme == "gs":
        backend = GCSStore(bucket, **shared)
    else:
        backend = AzureStore(bucket, **shared)
    return ObstoreBackend(backend, uri=f"{scheme}://{bucket}", prefix=prefix)
